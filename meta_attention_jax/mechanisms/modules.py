"""Thin Linen modules over the pure mechanisms."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from meta_attention_jax.mechanisms import registry, rotary
from meta_attention_jax.sharding import by_rows
from meta_attention_jax.types import (
    Keys,
    Positions,
    Queries,
    SegmentIds,
    Values,
    positions_in_segment,
)

Residual = Float[Array, "batch time model"]


class Projections(nn.Module):
    """The projections that every mechanism of a layer shares.

    `project` maps x `[B, T, D]` to q `[B, T, H, d]` and k, v `[B, T, G, d]`; `merge` maps the
    heads' outputs `[B, T, H, d]` back to `[B, T, features]`. Parameters: query, key, value, out.

    Attributes:
      num_heads: H.
      head_dim: d.
      num_kv_heads: G, a divisor of H; None for G = H.
      features: width of the output; None for the width of x.
      use_bias: biases on all four.
      dtype: of the computation; parameters are of `param_dtype`.
      kernel_init, out_kernel_init: of query, key and value; of out (None: the same).
    """

    num_heads: int
    head_dim: int
    features: int
    num_kv_heads: int | None = None
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    out_kernel_init: nn.initializers.Initializer | None = None

    def setup(self):
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads={self.num_heads}, got {kv_heads}."
            )
        common = dict(
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        into = dict(kernel_init=self.kernel_init, **common)
        self.query = nn.DenseGeneral((self.num_heads, self.head_dim), **into)
        self.key = nn.DenseGeneral((kv_heads, self.head_dim), **into)
        self.value = nn.DenseGeneral((kv_heads, self.head_dim), **into)
        self.out = nn.DenseGeneral(
            self.features,
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            **common,
        )

    def project(self, x: Residual) -> tuple[Queries, Keys, Values]:
        """q, k, v of every token."""
        return self.query(x), self.key(x), self.value(x)

    def merge(self, heads: Queries) -> Residual:
        """The output projection."""
        return self.out(heads)

    def __call__(self, x: Residual) -> Residual:
        """merge(q): touches every parameter; the two halves are what a layer calls."""
        q, _, _ = self.project(x)
        return self.merge(q)


class Attention(nn.Module):
    """Self-attention by one mechanism: out = W_o attend(W_q x, W_k x, W_v x).

    Attributes:
      mechanism: a registered name.
      num_heads: H; it must divide the width of x unless `head_dim` is given.
      num_kv_heads: G; None for G = H.
      head_dim: d; None for D / H.
      window: of a mechanism that has one.
      causal: False attends both ways.
      use_rotary: rotates q and k, where the mechanism allows it.
      implementation: of a mechanism that has several.
    """

    mechanism: str = "full"
    num_heads: int = 1
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    causal: bool = True
    use_rotary: bool = False
    implementation: str = "auto"
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Residual,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Residual:
        """x `[B, T, D]` to `[B, T, D]`; positions default to the index within the segment.

        Raises:
          ValueError: unknown mechanism, D not divisible by H, H by G, missing window.
        """
        mechanism = registry.get_mechanism(self.mechanism)
        model = x.shape[-1]
        if self.head_dim is None and model % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of the width {model}, got {self.num_heads}."
            )
        projections = Projections(
            num_heads=self.num_heads,
            head_dim=self.head_dim or model // self.num_heads,
            features=model,
            num_kv_heads=self.num_kv_heads,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="projections",
        )
        q, k, v = projections.project(x)
        if self.use_rotary and mechanism.rotary:
            if positions is None:
                ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
                positions = by_rows(positions_in_segment, (0,))(ids)
            turn = by_rows(rotary.rotate, (0, 0))
            q, k = turn(q, positions), turn(k, positions)
        out = registry.attend_with(
            mechanism,
            q,
            k,
            v,
            segment_ids=segment_ids,
            causal=self.causal,
            window=self.window,
            implementation=self.implementation,
        )
        return projections.merge(out)
