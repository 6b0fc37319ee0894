"""The projections of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meta_attention_jax.types import Keys, Queries, Values

Residual = Float[Array, "batch time model"]


class Norm(nn.RMSNorm):
    """`nn.RMSNorm`, which mixes its float32 statistics with what it normalises, in strict promotion too."""

    def __call__(self, x: Float[Array, "*batch model"]) -> Float[Array, "*batch model"]:
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)


class Adapters(nn.Module):
    """B A x for each of several outputs; A from N(0, 1 / inputs), B = 0."""

    outputs: Mapping[str, int | tuple[int, int]]  # Shape of each output.
    rank: int
    dtype: Any = jnp.float32  # Of the computation; parameters are float32, as all that is trained.

    def setup(self):
        common = dict(use_bias=False, dtype=self.dtype)
        self.down = {
            name: nn.DenseGeneral(self.rank, axis=(-2, -1) if name == "out" else -1, **common) for name in self.outputs
        }
        self.up = {
            name: nn.DenseGeneral(shape, kernel_init=nn.initializers.zeros_init(), **common)
            for name, shape in self.outputs.items()
        }

    def __call__(self, x: Float[Array, "batch time *features"], name: str) -> Float[Array, "batch time *outputs"]:
        return self.up[name](self.down[name](x))


class Projections(nn.Module):
    """The projections that every mechanism of a layer shares. Parameters: query, key, value, out."""

    num_heads: int
    head_dim: int
    features: int  # Width of the output.
    num_kv_heads: int | None = None  # A divisor of H; None for G = H.
    use_bias: bool = False  # On query, key and value.
    out_bias: bool | None = None  # On out; None: the same.
    # Epsilon of RMS norms of every query and key head, with scales query_norm and key_norm [dim]; None: there are none.
    norm_epsilon: float | None = None
    # r of low-rank adapters beside all four (Hu et al., arXiv 2106.09685): W x + B A x, with B = 0 at the start.
    adapter_rank: int = 0
    dtype: Any = jnp.float32  # Of the computation.
    param_dtype: Any = jnp.float32
    # Of query, key and value; of out (None: the same).
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    out_kernel_init: nn.initializers.Initializer | None = None

    def setup(self):
        kv_heads = self.num_kv_heads or self.num_heads
        common = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        into = dict(kernel_init=self.kernel_init, use_bias=self.use_bias, **common)
        self.query = nn.DenseGeneral((self.num_heads, self.head_dim), **into)
        self.key = nn.DenseGeneral((kv_heads, self.head_dim), **into)
        self.value = nn.DenseGeneral((kv_heads, self.head_dim), **into)
        self.out = nn.DenseGeneral(
            self.features,
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            use_bias=self.use_bias if self.out_bias is None else self.out_bias,
            **common,
        )
        if self.norm_epsilon is not None:
            self.query_norm, self.key_norm = (Norm(epsilon=self.norm_epsilon, **common) for _ in range(2))
        if self.adapter_rank:
            heads = {"query": self.num_heads, "key": kv_heads, "value": kv_heads}
            outputs = {name: (count, self.head_dim) for name, count in heads.items()} | {"out": self.features}
            self.adapter = Adapters(outputs, self.adapter_rank, self.dtype)

    def project(self, x: Residual) -> tuple[Queries, Keys, Values]:
        """q, k, v of every token: [B, T, D] -> [B, T, H, d] and twice [B, T, G, d]."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.adapter_rank:
            q, k, v = (y + self.adapter(x, name) for y, name in ((q, "query"), (k, "key"), (v, "value")))
        if self.norm_epsilon is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def merge(self, heads: Queries) -> Residual:
        """The output projection: [B, T, H, d] -> [B, T, features]."""
        merged = self.out(heads)
        return merged + self.adapter(heads, "out") if self.adapter_rank else merged

    def __call__(self, x: Residual) -> Residual:
        """merge(q): touches every parameter; the two halves are what a layer calls."""
        q, _, _ = self.project(x)
        return self.merge(q)
