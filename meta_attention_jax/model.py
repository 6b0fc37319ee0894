"""Decoder-only language model: norm, Meta-Attention, norm, gated MLP; what published families vary is `ModelConfig`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Optional

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float, Int, Key

from meta_attention_jax.architecture import ModelConfig
from meta_attention_jax.fields import expect
from meta_attention_jax.layer import MetaAttention
from meta_attention_jax.mechanisms import blocks
from meta_attention_jax.mechanisms.cache import Cache, init_cache
from meta_attention_jax.mechanisms.projections import Norm
from meta_attention_jax.mechanisms.registry import check_decodes
from meta_attention_jax.sharding import by_rows, gather
from meta_attention_jax.types import (
    Positions,
    Router,
    Routing,
    RoutingHypers,
    SegmentIds,
    expect_record,
    positions_in_segment,
)

_WIDE = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


@flax.struct.dataclass
class Output:
    """Logits (float32) of every token, or of the newest of a row, and the `Routing` of all layers, stacked."""

    logits: Float[Array, "batch time vocab"] | Float[Array, "batch vocab"]
    routing: Routing


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Scannable over layers."""

    config: ModelConfig
    router: Router
    mode: str
    dispatch: str
    by_layer: bool = False
    window: Optional[int] = None  # Of a layer that is a window by nature.

    @nn.compact
    def __call__(self, carry, route, segment_ids, positions, hypers, keys):
        """carry = (x, cache or None, index of the layer) -> (carry, routing)."""
        config = self.config
        x, cache, index = carry
        most = config.context
        expect(most is None or x.shape[1] <= most, "tokens", f"at most the model's context of {most}", x.shape[1])
        if keys is not None:
            fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
            keys = by_rows(fold, (0, None))(keys, index)
        kinds = dict(dtype=config.dtype, param_dtype=config.param_dtype)
        norm = functools.partial(Norm, epsilon=config.norm_epsilon, **kinds)
        spec, rope = config.attention, config.rope
        if self.window is not None:
            spec, rope = dataclasses.replace(spec, window=self.window, sinks=0), config.window_rope or rope
        # Residual branches start small, so that the stream's variance does not grow with depth.
        small = 0.5 / config.num_layers
        init = lambda scale: nn.initializers.variance_scaling(scale, "fan_in", "normal")  # noqa: E731
        attention = MetaAttention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            qkv_features=config.qkv_features,
            spec=spec,
            router=self.router,
            rotary=True,
            rope=rope,
            scale=config.attention_scale,
            norm_epsilon=config.norm_epsilon if config.qk_norm else None,
            use_bias="qkv" in config.biases,
            out_bias="out" in config.biases,
            adapter_rank=config.adapter_rank,
            mode=self.mode,
            dispatch=self.dispatch,
            out_kernel_init=init(small),
            name="attention",
            **kinds,
        )
        if self.by_layer:
            x = jax.lax.stop_gradient(x)
        shared = dict(segment_ids=segment_ids, positions=positions, residual=x, hypers=hypers)
        h = norm(name="attention_norm")(x)
        attended, routing, cache = attention.routed(h, route=route, keys=keys, cache=cache, layer=index, **shared)
        added = norm(name="attention_post_norm") if config.post_norms else (lambda attended: attended)
        attended = added(attended)
        if self.by_layer and self.window is None:
            every = jnp.full(x.shape[:2], self.router.mechanisms.index("full"), jnp.int32)
            full = jax.lax.stop_gradient(added(attention.routed(h, route=every, **shared)[0]))
            harm, attended = _harm(full, attended, x), jnp.where(hypers.threshold > 0, attended, full)
            routing = routing.replace(harm=harm)
        x = x + attended
        dense = lambda width, name, scale: nn.Dense(  # noqa: E731
            width, use_bias="mlp" in config.biases, kernel_init=init(scale), name=name, **kinds
        )
        h = norm(name="mlp_norm")(x)
        width, act = config.mlp_width, {"silu": nn.silu, "gelu": nn.gelu}[config.activation]
        h = dense(x.shape[-1], "down", small)(act(dense(width, "gate", 1.0)(h)) * dense(width, "up", 1.0)(h))
        return (x + (norm(name="mlp_post_norm")(h) if config.post_norms else h), cache, index + 1), routing


def _harm(full: Array, attended: Array, x: Array) -> Float[Array, "batch time"]:
    """||full - attended||^2 / ||x||^2 of every token."""
    square = lambda a: jnp.sum(jnp.square(a.astype(jnp.float32)), axis=-1)  # noqa: E731
    return square(full - attended) / jnp.maximum(square(x), jnp.finfo(jnp.float32).tiny)


class TiedEmbedding(nn.Embed):
    """The embedding, for the input and for the logits."""

    def whole(self) -> Float[Array, "vocab model"]:
        """All of it."""
        return self.embedding


class LanguageModel(nn.Module):
    """Predicts token t + 1 from tokens <= t."""

    config: ModelConfig
    mode: str = "soft"  # Of `MetaAttention`: how it is run. `model.clone(mode="hard")` has the same parameters.
    dispatch: str = "auto"
    # Each layer by itself: the stream into it has no gradient, and its routing says its `harm`. As long as theta is 0
    # the stream is that of full attention, then that of the routes.
    by_layer: bool = False
    # The mesh axis over which parameters are split by `sharding.RULES`, where the model runs inside `shard_map`: every
    # layer gathers its own and lets go of them. None: they are whole.
    shard_axis: Optional[str] = None

    def setup(self):
        config = self.config
        expect_record("config", config, ModelConfig)
        routers = [config.router.of_layer(i) for i in range(config.num_layers)]
        for i in set(range(config.num_layers)) - set(config.routed):
            routers[i] = Router(mechanisms=("local",), controller="fixed", fixed=("local",))
        if config.scan_layers and config.windows:
            raise ValueError("scan_layers: expected False with windows, since scanned layers are alike, got True.")
        if config.scan_layers and config.router.is_fixed and len(set(routers)) > 1:
            raise ValueError(
                "scan_layers: expected False with a fixed pattern, since scanned layers are alike, "
                f"got True with fixed = {config.router.fixed}."
            )
        table, block = TiedEmbedding, Block
        if self.shard_axis is not None:
            whole = functools.partial(gather, axis_name=self.shard_axis, dtype=config.dtype)
            table = nn.map_variables(table, "params", trans_in_fn=whole, methods=["whole"])
            # Inside remat: the backward pass gathers anew, so that no layer stays whole meanwhile.
            block = nn.map_variables(block, "params", trans_in_fn=whole)
        kinds = dict(dtype=config.dtype, param_dtype=config.param_dtype)
        self.embedding = table(
            config.vocab_size, config.model_dim, embedding_init=nn.initializers.normal(config.model_dim**-0.5), **kinds
        )
        if config.remat:
            block = nn.remat(block, prevent_cse=not config.scan_layers)
        if config.scan_layers:
            block = nn.scan(
                block,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                # Of the arguments after the carry, the route alone differs by layer.
                in_axes=(0, *[nn.broadcast] * 4),
                length=config.num_layers,
            )
        make = functools.partial(
            block, config=config, mode=self.mode, dispatch=self.dispatch, by_layer=self.by_layer
        )
        if config.scan_layers:
            self.layers = make(router=routers[0], name="layers")
        else:
            windows = config.windows or [None] * config.num_layers
            self.blocks = [
                make(router=router, window=window, name=f"layer_{i}")
                for i, (router, window) in enumerate(zip(routers, windows))
            ]
        self.final_norm = Norm(epsilon=config.norm_epsilon, **kinds)
        if not config.tied:
            self.head = nn.Dense(config.vocab_size, use_bias=False, dot_general=_WIDE, **kinds)

    def routed_by(self, **changes: Any) -> LanguageModel:
        """The same model, with other fields of its router: `model.routed_by(uncertainty="vacuity")`."""
        router = dataclasses.replace(self.config.router, **changes)
        return self.clone(config=dataclasses.replace(self.config, router=router))

    def embed(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time model"]:
        """The embedding, by default times sqrt(D): unit variance at the input, logits of order 1 at the head."""
        take = by_rows(lambda tokens, table: jnp.take(table, tokens, axis=0), (0, None))
        x = take(tokens, self._table())
        scale = self.config.embedding_scale
        return x * jnp.asarray(self.config.model_dim**0.5 if scale is None else scale, x.dtype)

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
        """Logits and routing from embeddings. segment_ids: 0 is padding, None one segment; positions None derives them.
        A route, [batch time] for all layers or [layer batch time], forces k* and hard routing; one PRNG key per example
        trains (sampled pi), None is deterministic."""
        batch, time, _ = x.shape
        if positions is None and segment_ids is not None:
            positions = by_rows(positions_in_segment, (0,))(segment_ids)
        route = self._layer_routes(route, (batch, time))
        x, routing, _ = self._blocks(x, None, route, segment_ids, positions, hypers, keys)
        return Output(logits=self._logits(x), routing=routing)

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens (`mechanisms.cache.init_cache`); raises ValueError
        for a size below 1 and for a mechanism that cannot decode."""
        config = self.config
        check_decodes(config.router.mechanisms)
        return init_cache(
            layers=config.num_layers,
            batch=batch,
            capacity=capacity,
            kv_heads=config.kv_heads,
            dim=config.head_dim,
            dtype=config.dtype or config.param_dtype,
        )

    def prefill(
        self,
        cache: Cache,
        tokens: Int[Array, "batch time"],
        lengths: Int[Array, "batch"],
        *,
        hypers: RoutingHypers,
        route: Optional[Int[Array, "..."]] = None,
    ) -> tuple[Cache, Output]:
        """One pass over right-padded prompts of `lengths` in [1, time], from an empty cache; `route` as in
        `from_embeddings`.

        Returns the filled cache, logits behind the last token of each prompt and the routing of all tokens. Raises
        ValueError for prompts longer than the capacity and for shapes that do not fit.
        """
        expect(lengths.shape == tokens.shape[:1], "lengths", f"shape {tokens.shape[:1]}", lengths.shape)
        segment_ids = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
        route = self._layer_routes(route, tokens.shape)
        if tokens.shape[1] == 1:  # One token goes on where a row ends, which is here nowhere.
            cache = jax.tree.map(jnp.zeros_like, cache)
        x, routing, cache = self._blocks(self.embed(tokens), cache, route, segment_ids, None, hypers, None)
        # The head sees one token per row: logits of long prompts would outweigh the cache.
        last = by_rows(
            lambda x, lengths: jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1), (0, 0)
        )(x, lengths)
        return cache, Output(logits=self._logits(last)[:, 0], routing=routing)

    def decode(
        self,
        cache: Cache,
        token: Int[Array, "batch"],
        *,
        hypers: RoutingHypers,
        route: Optional[Int[Array, "..."]] = None,
    ) -> tuple[Cache, Output]:
        """One more token per row, none of which is at its capacity: the cache with the token in it, the logits behind
        it and its routing, [layer batch ...]. A route is [batch] or [layer batch]."""
        route = self._layer_routes(None if route is None else route[..., None], (*token.shape, 1))
        x, routing, cache = self._blocks(self.embed(token[:, None]), cache, route, None, None, hypers, None)
        routing = jax.tree.map(lambda leaf: leaf[:, :, 0], routing)
        return cache, Output(logits=self._logits(x)[:, 0], routing=routing)

    def _blocks(
        self, x: Any, cache: Optional[Cache], route: Any, *shared: Any
    ) -> tuple[Float[Array, "batch time model"], Routing, Optional[Cache]]:
        """All blocks in turn; the routing of those that have a router is stacked [layer ...]."""
        carry = (x, cache, jnp.int32(0))
        if self.config.scan_layers:
            (x, cache, _), routing = self.layers(carry, route, *shared)
            return x, routing, cache
        routings = []
        for i, block in enumerate(self.blocks):
            mine = None if route is None or i not in self.config.routed else route[len(routings)]
            carry, routing = block(carry, mine, *shared)
            if i in self.config.routed:
                routings.append(routing)
        return carry[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *routings), carry[1]

    def _layer_routes(
        self, route: Optional[Int[Array, "..."]], shape: tuple[int, int]
    ) -> Optional[Int[Array, "layer batch time"]]:
        """A forced route for every layer that has a router."""
        layers = len(self.config.routed)
        if route is not None and route.ndim == 2:
            route = jnp.broadcast_to(route[None], (layers, *route.shape))
        if route is not None and route.shape != (layers, *shape):
            raise ValueError(f"route: expected shape {shape} or {(layers, *shape)}, got {route.shape}.")
        return route

    def _table(self) -> Float[Array, "vocab model"]:
        """The embedding, in the dtype of the computation."""
        return promote_dtype(self.embedding.whole(), dtype=self.config.dtype, inexact=False)[0]

    def _logits(self, x: Float[Array, "batch time model"]) -> Float[Array, "batch time vocab"]:
        # Accumulated and kept in float32: a cross-entropy of bfloat16 logits loses digits.
        if self.config.tied:
            x, table = promote_dtype(self.final_norm(x), self._table(), dtype=self.config.dtype)
            logits = jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)
        else:
            logits = self.head(self.final_norm(x))
        return blocks.capped(logits, self.config.logit_softcap)


def unstacked(model: LanguageModel, params: Any) -> tuple[LanguageModel, Any]:
    """The same model with the parameters of every layer apart, as `scan_layers=False` has them.

    Decoding reads all weights for every token. Where they are stacked, a compiler that cannot slice inside a product,
    as XLA's for CPUs, copies each layer's first. The price is a program as long as the model is deep.
    """
    config = model.config
    if not config.scan_layers:
        return model, params
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    layers = {
        f"layer_{i}": jax.tree.map(lambda leaf: leaf[i], params["layers"]) for i in range(config.num_layers)
    }
    return model.clone(config=dataclasses.replace(config, scan_layers=False)), {**rest, **layers}
