"""Decoder-only language model: pre-norm, Meta-Attention, gated MLP, tied embeddings."""

from __future__ import annotations

import functools
from typing import Any, Callable, Optional, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from meta_attention_jax.layer import MetaAttention
from meta_attention_jax.types import (
    MECHANISMS,
    Positions,
    Routing,
    RoutingHypers,
    SegmentIds,
    positions_in_segment,
)


@flax.struct.dataclass
class Output:
    """Logits [batch time vocab] (float32) and the `Routing` of all layers, stacked [layer ...]."""

    logits: Float[Array, "batch time vocab"]
    routing: Routing


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Scannable over layers."""

    make_attention: Callable[..., MetaAttention]
    mlp_dim: int
    num_layers: int
    dtype: Optional[Any]
    param_dtype: Any

    @nn.compact
    def __call__(self, carry, route, segment_ids, positions, hypers, keys):
        x, index = carry
        if keys is not None:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        norm = lambda name: nn.RMSNorm(  # noqa: E731
            dtype=self.dtype, param_dtype=self.param_dtype, name=name
        )
        attended, routing = self.make_attention(name="attention").routed(
            norm("attention_norm")(x),
            segment_ids=segment_ids,
            positions=positions,
            residual=x,
            route=route,
            hypers=hypers,
            keys=keys,
        )
        x = x + attended
        dense = lambda width, name, scale: nn.Dense(  # noqa: E731
            width,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.variance_scaling(scale, "fan_in", "normal"),
            name=name,
        )
        h = norm("mlp_norm")(x)
        h = nn.silu(dense(self.mlp_dim, "gate", 1.0)(h)) * dense(self.mlp_dim, "up", 1.0)(h)
        # Residual branches start small, so that the stream's variance does not grow with depth.
        x = x + dense(x.shape[-1], "down", 0.5 / self.num_layers)(h)
        return (x, index + 1), routing


class LanguageModel(nn.Module):
    """Predicts token t + 1 from tokens <= t.

    Attributes:
      vocab_size: V.
      model_dim: D.
      num_layers: L.
      mlp_dim: F of the gated MLP; None means 8 D / 3 rounded up to a multiple of 32.
      fixed: with `controller="fixed"`: mechanisms of the layers, repeated to L layers, e.g.
        ("local", "local", "full").
      scan_layers: compile one layer and loop over L of them.
      remat: recompute each layer in the backward pass.

    The other attributes are those of `MetaAttention`.
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: Optional[int] = None
    mlp_dim: Optional[int] = None
    mechanisms: Sequence[str] = MECHANISMS
    window: int = 128
    implementation: str = "auto"
    mode: str = "soft"
    dispatch: str = "auto"
    controller: str = "bayesian"
    controller_hidden: int = 64
    prior: str = "cost_aware"
    posterior: str = "mean_strength"
    uncertainty: str = "entropy"
    fixed: Sequence[str] = ("full",)
    scan_layers: bool = False
    remat: bool = False
    dtype: Optional[Any] = None
    param_dtype: Any = jnp.float32

    def setup(self):
        if self.num_layers <= 0:
            raise ValueError(f"num_layers: expected a positive number, got {self.num_layers}.")
        pattern = [self.fixed[i % len(self.fixed)] for i in range(self.num_layers)]
        if self.scan_layers and self.controller == "fixed" and len(set(pattern)) > 1:
            raise ValueError(
                "scan_layers: expected False with a fixed pattern, since scanned layers are alike, "
                f"got True with fixed = {tuple(self.fixed)}."
            )
        self.embedding = nn.Embed(
            self.vocab_size,
            self.model_dim,
            embedding_init=nn.initializers.normal(self.model_dim**-0.5),
            param_dtype=self.param_dtype,
            dtype=self.dtype,
        )
        block = Block
        if self.remat:
            block = nn.remat(Block, prevent_cse=not self.scan_layers)
        if self.scan_layers:
            block = nn.scan(
                block,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
                length=self.num_layers,
            )
            self.layers = self._block(block, pattern[0], "layers")
        else:
            self.blocks = [
                self._block(block, name, f"layer_{i}") for i, name in enumerate(pattern)
            ]
        self.final_norm = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype)

    def _block(self, block: type[nn.Module], fixed: str, name: str) -> nn.Module:
        make_attention = functools.partial(
            MetaAttention,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            mechanisms=tuple(self.mechanisms),
            window=self.window,
            rotary=True,
            implementation=self.implementation,
            mode=self.mode,
            dispatch=self.dispatch,
            controller=self.controller,
            controller_hidden=self.controller_hidden,
            prior=self.prior,
            posterior=self.posterior,
            uncertainty=self.uncertainty,
            fixed=fixed,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            out_kernel_init=nn.initializers.variance_scaling(
                0.5 / self.num_layers, "fan_in", "normal"
            ),
        )
        return block(
            make_attention=make_attention,
            mlp_dim=self.mlp_width,
            num_layers=self.num_layers,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    @property
    def mlp_width(self) -> int:
        """F, resolved."""
        return self.mlp_dim or -(-self.model_dim * 8 // 3 // 32) * 32

    def embed(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time model"]:
        """sqrt(D) times the embedding: unit variance at the input, logits of order 1 at the head."""
        x = self.embedding(tokens)
        return x * jnp.asarray(self.model_dim**0.5, x.dtype)

    def __call__(self, tokens: Int[Array, "batch time"], **kwargs: Any) -> Output:
        """Logits and routing of `tokens`; keyword arguments are those of `from_embeddings`."""
        return self.from_embeddings(self.embed(tokens), **kwargs)

    def from_embeddings(
        self,
        x: Float[Array, "batch time model"],
        *,
        segment_ids: Optional[SegmentIds] = None,
        positions: Optional[Positions] = None,
        route: Optional[Int[Array, "..."]] = None,
        hypers: RoutingHypers,
        keys: Optional[Key[Array, "batch"]] = None,
    ) -> Output:
        """Logits and routing from embeddings.

        Args:
          x: embedded tokens.
          segment_ids: 0 is padding; None means one segment.
          positions: index within the segment; None derives it.
          route: [batch time] for all layers or [layer batch time]; forces k* and hard routing.
          hypers: kappa, eta, c, theta as arrays.
          keys: one PRNG key per example trains (sampled pi); None is deterministic.
        """
        batch, time, _ = x.shape
        if segment_ids is None:
            segment_ids = jnp.ones((batch, time), jnp.int32)
        if positions is None:
            positions = positions_in_segment(segment_ids)
        if route is not None and route.ndim == 2:
            route = jnp.broadcast_to(route[None], (self.num_layers, batch, time))
        if route is not None and route.shape != (self.num_layers, batch, time):
            raise ValueError(
                f"route: expected shape {(batch, time)} or {(self.num_layers, batch, time)}, "
                f"got {route.shape}."
            )
        carry = (x, jnp.int32(0))
        if self.scan_layers:
            (x, _), routing = self.layers(carry, route, segment_ids, positions, hypers, keys)
        else:
            routings = []
            for i, block in enumerate(self.blocks):
                chosen = None if route is None else route[i]
                carry, routing = block(carry, chosen, segment_ids, positions, hypers, keys)
                routings.append(routing)
            x, _ = carry
            routing = jax.tree.map(lambda *leaves: jnp.stack(leaves), *routings)
        logits = self.embedding.attend(self.final_norm(x))
        return Output(logits=logits.astype(jnp.float32), routing=routing)
