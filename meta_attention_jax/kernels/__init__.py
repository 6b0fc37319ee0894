"""Packed attention: softmax attention of chosen queries, in work proportional to the choice.

`worklist` says what is to do, as arrays; a kernel does it; `select` names the kernel of a platform.
"""
