"""Packed attention: softmax attention of chosen queries, in work proportional to the choice.

`worklist` says what is to do, as arrays; `portable` does it on every platform, `gpu` on
NVIDIA's; `select` says which.
"""
