"""Decoder-only language model: pre-norm, Meta-Attention, gated MLP, tied embeddings."""

from __future__ import annotations

import functools
from typing import Any, Callable, Optional, Sequence

import flax.linen as nn
import flax.struct
from flax.linen.dtypes import promote_dtype
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from meta_attention_jax.layer import MetaAttention
from meta_attention_jax.mechanisms.decode import Cache, init_cache
from meta_attention_jax.mechanisms.registry import check_decodes
from meta_attention_jax.sharding import by_rows, gather
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


@flax.struct.dataclass
class StepOutput:
    """Logits of the next token [batch vocab] (float32) and the `Routing` of all layers."""

    logits: Float[Array, "batch vocab"]
    routing: Routing


class Norm(nn.RMSNorm):
    """`nn.RMSNorm`, which mixes its float32 statistics with what it normalises, in strict promotion
    too."""

    def __call__(self, x: Float[Array, "*batch model"]) -> Float[Array, "*batch model"]:
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Scannable over layers."""

    make_attention: Callable[..., MetaAttention]
    mlp_dim: int
    num_layers: int
    dtype: Optional[Any]
    param_dtype: Any

    def __call__(self, carry, route, segment_ids, positions, hypers, keys):
        x, index = carry
        if keys is not None:
            fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
            keys = by_rows(fold, (0, None))(keys, index)

        def attend(attention, normed):
            return None, *attention.routed(
                normed,
                segment_ids=segment_ids,
                positions=positions,
                residual=x,
                route=route,
                hypers=hypers,
                keys=keys,
            )

        _, x, routing = self._around(x, attend)
        return (x, index + 1), routing

    def prefill(self, carry, route, segment_ids, hypers):
        """`__call__` over right-padded prompts with the cache in the carry: (cache, x, layer)."""
        cache, x, index = carry

        def attend(attention, normed):
            return attention.prefill(
                cache,
                index,
                normed,
                segment_ids=segment_ids,
                residual=x,
                route=route,
                hypers=hypers,
            )

        cache, x, routing = self._around(x, attend)
        return (cache, x, index + 1), routing

    def decode(self, carry, route, hypers):
        """One more token per row, x `[batch, 1, model]`, with the cache in the carry."""
        cache, x, index = carry

        def attend(attention, normed):
            return attention.decode(cache, index, normed, residual=x, route=route, hypers=hypers)

        cache, x, routing = self._around(x, attend)
        return (cache, x, index + 1), routing

    @nn.compact
    def _around(self, x, attend):
        """Norms, residuals, MLP around attend(attention, normed) -> (cache, attended, routing)."""
        norm = lambda name: Norm(  # noqa: E731
            dtype=self.dtype, param_dtype=self.param_dtype, name=name
        )
        cache, attended, routing = attend(
            self.make_attention(name="attention"), norm("attention_norm")(x)
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
        return cache, x + dense(x.shape[-1], "down", 0.5 / self.num_layers)(h), routing


class Table(nn.Embed):
    """The embedding, for the input and for the logits."""

    def whole(self) -> Float[Array, "vocab model"]:
        """All of it."""
        return self.embedding


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
      shard_axis: the mesh axis over which parameters are split by `sharding.RULES`, where the model
        runs inside `shard_map`: every layer gathers its own and lets go of them. None: they are whole.

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
    shard_axis: Optional[str] = None
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
        table, block = Table, Block
        if self.shard_axis is not None:
            whole = functools.partial(gather, axis_name=self.shard_axis, dtype=self.dtype)
            table = nn.map_variables(table, "params", trans_in_fn=whole, methods=["whole"])
            # Inside remat: the backward pass gathers anew, so that no layer stays whole meanwhile.
            methods = ["__call__", "prefill", "decode"]
            block = nn.map_variables(block, "params", trans_in_fn=whole, methods=methods)
        self.embedding = table(
            self.vocab_size,
            self.model_dim,
            embedding_init=nn.initializers.normal(self.model_dim**-0.5),
            param_dtype=self.param_dtype,
            dtype=self.dtype,
        )
        if self.remat:
            block = nn.remat(block, prevent_cse=not self.scan_layers)
        if self.scan_layers:
            block = nn.scan(
                block,
                methods={
                    # Of the arguments after the carry, the route alone differs by layer.
                    method: dict(
                        variable_axes={"params": 0, "intermediates": 0},
                        split_rngs={"params": True},
                        in_axes=(0, *[nn.broadcast] * shared),
                        length=self.num_layers,
                    )
                    for method, shared in (("__call__", 4), ("prefill", 2), ("decode", 1))
                },
            )
            self.layers = self._block(block, pattern[0], "layers")
        else:
            self.blocks = [
                self._block(block, name, f"layer_{i}") for i, name in enumerate(pattern)
            ]
        self.final_norm = Norm(dtype=self.dtype, param_dtype=self.param_dtype)

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
        take = by_rows(lambda tokens, table: jnp.take(table, tokens, axis=0), (0, None))
        x = take(tokens, self._table())
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
            positions = by_rows(positions_in_segment, (0,))(segment_ids)
        route = self._layer_routes(route, (batch, time))
        (x, _), routing = self._blocks(
            "__call__", (x, jnp.int32(0)), route, segment_ids, positions, hypers, keys
        )
        return Output(logits=self._logits(x), routing=routing)

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens (`decode.init_cache`).

        Raises:
          ValueError: a size below 1; a mechanism that cannot decode.
        """
        check_decodes(self.mechanisms)
        return init_cache(
            layers=self.num_layers,
            batch=batch,
            capacity=capacity,
            kv_heads=self.num_kv_heads or self.num_heads,
            dim=self.model_dim // self.num_heads,
            dtype=self.dtype or self.param_dtype,
        )

    def prefill(
        self,
        cache: Cache,
        tokens: Int[Array, "batch time"],
        lengths: Int[Array, "batch"],
        *,
        hypers: RoutingHypers,
        route: Optional[Int[Array, "..."]] = None,
    ) -> tuple[Cache, StepOutput]:
        """One pass over right-padded prompts, from an empty cache.

        Args:
          cache: of `init_cache`.
          tokens: prompts; what stands behind a prompt's length is ignored.
          lengths: tokens of each prompt, in [1, time].
          hypers: kappa, eta, c, theta as arrays.
          route: [batch time] or [layer batch time]; forces k* and hard routing.

        Returns:
          The filled cache; logits behind the last token of each prompt and the routing of all
          tokens, [layer batch time ...].

        Raises:
          ValueError: prompts longer than the capacity, shapes that do not fit.
        """
        if lengths.shape != tokens.shape[:1]:
            raise ValueError(f"lengths: expected shape {tokens.shape[:1]}, got {lengths.shape}.")
        segment_ids = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
        route = self._layer_routes(route, tokens.shape)
        carry = (cache, self.embed(tokens), jnp.int32(0))
        (cache, x, _), routing = self._blocks("prefill", carry, route, segment_ids, hypers)
        # The head sees one token per row: logits of long prompts would outweigh the cache.
        last = by_rows(
            lambda x, lengths: jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1), (0, 0)
        )(x, lengths)
        return cache, StepOutput(logits=self._logits(last)[:, 0], routing=routing)

    def decode(
        self,
        cache: Cache,
        token: Int[Array, "batch"],
        *,
        hypers: RoutingHypers,
        route: Optional[Int[Array, "..."]] = None,
    ) -> tuple[Cache, StepOutput]:
        """One more token per row: (cache, token) -> (cache, output).

        Args:
          cache: after `prefill` or `decode`; no row at its capacity.
          token: of each row.
          hypers: kappa, eta, c, theta as arrays.
          route: [batch] or [layer batch]; forces k* and hard routing.

        Returns:
          The cache with the token in it; logits behind the token and its routing,
          [layer batch ...].
        """
        route = None if route is None else route[..., None]
        route = self._layer_routes(route, (*token.shape, 1))
        carry = (cache, self.embed(token[:, None]), jnp.int32(0))
        (cache, x, _), routing = self._blocks("decode", carry, route, hypers)
        routing = jax.tree.map(lambda leaf: leaf[:, :, 0], routing)
        return cache, StepOutput(logits=self._logits(x)[:, 0], routing=routing)

    def _blocks(self, method: str, carry: Any, route: Any, *shared: Any) -> tuple[Any, Routing]:
        """Runs a method of all blocks in turn; the routing is stacked [layer ...]."""
        if self.scan_layers:
            return getattr(self.layers, method)(carry, route, *shared)
        routings = []
        for i, block in enumerate(self.blocks):
            chosen = None if route is None else route[i]
            carry, routing = getattr(block, method)(carry, chosen, *shared)
            routings.append(routing)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *routings)

    def _layer_routes(
        self, route: Optional[Int[Array, "..."]], shape: tuple[int, int]
    ) -> Optional[Int[Array, "layer batch time"]]:
        """A forced route for every layer."""
        if route is not None and route.ndim == 2:
            route = jnp.broadcast_to(route[None], (self.num_layers, *route.shape))
        if route is not None and route.shape != (self.num_layers, *shape):
            raise ValueError(
                f"route: expected shape {shape} or {(self.num_layers, *shape)}, got {route.shape}."
            )
        return route

    def _table(self) -> Float[Array, "vocab model"]:
        """The embedding, in the dtype of the computation."""
        return promote_dtype(self.embedding.whole(), dtype=self.dtype, inexact=False)[0]

    def _logits(self, x: Float[Array, "batch time model"]) -> Float[Array, "batch time vocab"]:
        x, table = promote_dtype(self.final_norm(x), self._table(), dtype=self.dtype)
        # Accumulated and kept in float32: a cross-entropy of bfloat16 logits loses digits.
        return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)
