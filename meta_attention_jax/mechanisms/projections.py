"""The projections of a layer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from meta_attention_jax.types import Keys, Queries, Values

Residual = Float[Array, "batch time model"]


class Projections(nn.Module):
    """The projections that every mechanism of a layer shares. Parameters: query, key, value, out."""

    num_heads: int
    head_dim: int
    features: int  # Width of the output.
    num_kv_heads: int | None = None  # A divisor of H; None for G = H.
    use_bias: bool = False  # On all four.
    dtype: Any = jnp.float32  # Of the computation.
    param_dtype: Any = jnp.float32
    # Of query, key and value; of out (None: the same).
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    out_kernel_init: nn.initializers.Initializer | None = None

    def setup(self):
        kv_heads = self.num_kv_heads or self.num_heads
        common = dict(use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        into = dict(kernel_init=self.kernel_init, **common)
        self.query = nn.DenseGeneral((self.num_heads, self.head_dim), **into)
        self.key = nn.DenseGeneral((kv_heads, self.head_dim), **into)
        self.value = nn.DenseGeneral((kv_heads, self.head_dim), **into)
        self.out = nn.DenseGeneral(
            self.features, axis=(-2, -1), kernel_init=self.out_kernel_init or self.kernel_init, **common
        )

    def project(self, x: Residual) -> tuple[Queries, Keys, Values]:
        """q, k, v of every token: [B, T, D] -> [B, T, H, d] and twice [B, T, G, d]."""
        return self.query(x), self.key(x), self.value(x)

    def merge(self, heads: Queries) -> Residual:
        """The output projection: [B, T, H, d] -> [B, T, features]."""
        return self.out(heads)

    def __call__(self, x: Residual) -> Residual:
        """merge(q): touches every parameter; the two halves are what a layer calls."""
        q, _, _ = self.project(x)
        return self.merge(q)
