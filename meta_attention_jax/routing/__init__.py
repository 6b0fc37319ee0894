"""Routing: from a controller's `Routing` to the output of every token.

`decide` says what every token uses, `gate` when tokens harden, `dispatch` does it, `accounting` counts what that
spends.
"""
