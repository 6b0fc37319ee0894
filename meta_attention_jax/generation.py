"""Generation: prefill, then one compiled decode loop; samplers.

A prompt is read in one pass that fills the caches; then every token costs one step in which a row reads only what its
route needs. Sampling is a function of (row key, position), so a row generates the same text alone and in a batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Optional

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from meta_attention_jax.fields import LARGEST, SMALLEST, expect, real, whole
from meta_attention_jax.mechanisms.cache import Cache
from meta_attention_jax.model import LanguageModel
from meta_attention_jax.sharding import without_mesh
from meta_attention_jax.types import Routing, RoutingHypers

Logits = Float[Array, "batch vocab"]
Tokens = Int[Array, "batch"]
RowKeys = Key[Array, "batch"]
Prompt = Sequence[int | np.integer] | Int[np.ndarray, "tokens"]
Draw = Callable[[Logits, RowKeys], Tokens]

CAPACITY_STEP = 64
"""Capacities are rounded up to a multiple of it, so that texts of similar length share a program."""


def greedy(logits: Logits, keys: Optional[RowKeys] = None) -> Tokens:
    """The most likely token; the first of equals."""
    del keys
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def keep_top_k(logits: Logits, k: int) -> Logits:
    """-inf for all but the k largest logits of every row; of equals the first stay."""
    rank = _rank(jnp.argsort(logits, axis=-1, descending=True))
    return jnp.where(rank < k, logits, -jnp.inf)


def keep_top_p(logits: Logits, p: float) -> Logits:
    """-inf for all but the smallest set of most likely tokens whose mass is at least p.

    Nucleus sampling (Holtzman et al., arXiv 1904.09751). A token stays iff the tokens before it, in order of falling
    probability, have a mass below p; the first always stays. p = 1 keeps all.
    """
    if p >= 1.0:
        return logits
    order = jnp.argsort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    rank = _rank(order)
    keep = (jnp.take_along_axis(before, rank, axis=-1) < p) | (rank == 0)
    return jnp.where(keep, logits, -jnp.inf)


def _rank(order: Int[Array, "batch vocab"]) -> Int[Array, "batch vocab"]:
    """Place of every token in `order`: the inverse permutation."""
    return jnp.argsort(order, axis=-1)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws from softmax(logits / temperature), cut to the top k, then to the mass p.

    A pure function (logits [batch vocab], one key per row) -> tokens [batch]; hashable, so that the same settings
    compile once. Raises ValueError for a field that is no number, or out of range.
    """

    temperature: float = 1.0  # > 0, as a float32.
    top_k: Optional[int] = None  # At least 1 (1 is greedy).
    top_p: Optional[float] = None  # In (0, 1]; of what `temperature` and `top_k` leave.

    def __post_init__(self) -> None:
        for name, number in (("temperature", real), ("top_k", whole), ("top_p", real)):
            if getattr(self, name) is not None or name == "temperature":
                # Of a kind that can be hashed.
                object.__setattr__(self, name, number(name, getattr(self, name)))
        if not SMALLEST <= self.temperature <= LARGEST:
            raise ValueError(
                f"temperature: expected a finite number of at least {SMALLEST:.1e}, got "
                f"{self.temperature}; without a sampler the text is greedy."
            )
        expect(self.top_k is None or 1 <= self.top_k < 2**31, "top_k", "at least 1 and less than 2^31", self.top_k)
        expect(self.top_p is None or 0.0 < self.top_p <= 1.0, "top_p", "a number in (0, 1]", self.top_p)

    def filtered(self, logits: Logits) -> Logits:
        """Logits that are sampled from, the largest 0; those of tokens that are left out -inf."""
        logits = logits.astype(jnp.float32)
        logits = (logits - logits.max(axis=-1, keepdims=True)) / self.temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        return logits

    def __call__(self, logits: Logits, keys: RowKeys) -> Tokens:
        return jax.vmap(jax.random.categorical)(keys, self.filtered(logits)).astype(jnp.int32)


def sampler_of(temperature: Optional[float] = None, top_k: Optional[int] = None, top_p: Optional[float] = None) -> Draw:
    """`Sampler` of the numbers that are given, `greedy` without any."""
    if temperature is None and top_k is None and top_p is None:
        return greedy
    return Sampler(1.0 if temperature is None else temperature, top_k, top_p)


@flax.struct.dataclass
class Trace:
    """What was generated; `prompt_*` are of the prompts, right-padded, and mean nothing behind a prompt's length.
    Where a row has ended, its tokens are an end, its routes and uncertainties 0."""

    tokens: Int[Array, "batch steps"]
    lengths: Int[Array, "batch"]  # Tokens that were drawn, the end included.
    route: Int[Array, "layer batch steps"]  # k*.
    hard: Bool[Array, "layer batch steps"]  # Whether the token used k* alone.
    uncertainty: Float[Array, "layer batch steps"]  # u_t in [0, 1].
    prompt_route: Int[Array, "layer batch time"]
    prompt_hard: Bool[Array, "layer batch time"]
    prompt_uncertainty: Float[Array, "layer batch time"]

    def row(self, index: int, prompt: int) -> Trace:
        """One row, as far as it and its `prompt` tokens of a prompt go."""
        own, drawn = slice(index, index + 1), int(self.lengths[index])
        names = [field.name for field in dataclasses.fields(self) if field.name != "lengths"]
        sizes = {name: prompt if name.startswith("prompt_") else drawn for name in names}
        cut = {name: getattr(self, name)[..., own, :size] for name, size in sizes.items()}
        return Trace(lengths=self.lengths[own], **cut)


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def prefill(
    model: LanguageModel,
    params: Any,
    tokens: Int[Array, "batch time"],
    lengths: Int[Array, "batch"],
    hypers: RoutingHypers,
    *,
    capacity: int,
    route: Optional[Int[Array, "..."]] = None,
) -> tuple[Cache, Logits, dict[str, Array]]:
    """`LanguageModel.prefill` into a new cache of `capacity` tokens per row, compiled: the cache, the logits behind
    each prompt, and route, hard and uncertainty [layer batch time] by name."""
    cache = model.init_cache(tokens.shape[0], capacity)
    cache, out = model.apply({"params": params}, cache, tokens, lengths, hypers=hypers, route=route, method="prefill")
    return cache, out.logits, _seen(out.routing)


@functools.partial(
    jax.jit, static_argnames=("model", "steps", "sampler", "ends", "known"), donate_argnames=("cache", "logits")
)
def decode_loop(
    model: LanguageModel,
    params: Any,
    cache: Cache,
    logits: Logits,
    keys: RowKeys,
    hypers: RoutingHypers,
    *,
    steps: int,
    sampler: Draw = greedy,
    route: Optional[Int[Array, "steps layer batch"]] = None,
    ends: tuple[int, ...] = (),
    known: Optional[int] = None,
) -> tuple[Cache, Logits, dict[str, Array]]:
    """`steps` times, or until every row has drawn one of `ends`: draw a token from the logits, then decode it. One
    compiled loop.

    Consumes the cache, whose buffers are updated in place and whose rows need `steps` free places, and the logits. The
    sampler is any hashable function like a `Sampler`. Returns the cache with all drawn tokens in it, the logits behind
    the last, and tokens [batch steps], route, hard and uncertainty [layer batch steps] by name. A row that has ended
    goes on with the first of `ends` for as long as others draw: what is in its cache and logits then means nothing.
    Tokens from `known` on are never drawn.
    """

    def step(carry, forced, ended=None):
        cache, logits = carry
        fold = jax.vmap(jax.random.fold_in)
        named = logits
        if known is not None:
            named = jnp.where(jnp.arange(logits.shape[-1])[None] < known, logits, -jnp.inf)
        token = sampler(named, fold(keys, cache.length[0]))
        if ended is not None:
            token = jnp.where(ended, ends[0], token)
        cache, out = model.apply({"params": params}, cache, token, hypers=hypers, route=forced, method="decode")
        return (cache, out.logits), dict(token=token, **_seen(out.routing))

    if ends:
        (cache, logits), seen = _until_ended(step, (cache, logits), route, steps, ends)
    else:
        (cache, logits), seen = jax.lax.scan(step, (cache, logits), route, length=steps)
    tokens = seen.pop("token")
    return cache, logits, {"tokens": tokens.T, **{name: jnp.moveaxis(values, 0, -1) for name, values in seen.items()}}


def _until_ended(step: Callable, carry: Any, route: Any, steps: int, ends: tuple[int, ...]) -> tuple[Any, Any]:
    """`jax.lax.scan` of `step` over `steps`, left once every row has drawn an end; rows count as far as their own."""
    at = lambda i: None if route is None else route[i]  # noqa: E731
    shapes = jax.eval_shape(lambda: step(carry, at(0))[1])
    unseen = {name: jnp.zeros((steps, *x.shape), x.dtype) for name, x in shapes.items()}
    unseen["token"] += ends[0]

    def draws(state):
        i, ended, *_ = state
        return (i < steps) & ~jnp.all(ended)

    def draw(state):
        i, ended, carry, seen = state
        carry, new = step(carry, at(i), ended)
        seen = {name: values.at[i].set(jnp.where(ended, values[i], new[name])) for name, values in seen.items()}
        return i + 1, ended | jnp.isin(new["token"], jnp.asarray(ends, jnp.int32)), carry, seen

    none = jnp.zeros(shapes["token"].shape, bool)
    return jax.lax.while_loop(draws, draw, (jnp.int32(0), none, carry, unseen))[2:]


def _seen(routing: Routing) -> dict[str, Array]:
    """What is kept of a routing; the rest (the KL above all) is then never computed."""
    return dict(route=routing.route, hard=routing.hard, uncertainty=routing.uncertainty)


def pad_prompts(
    prompts: Sequence[Prompt], vocab_size: int
) -> tuple[Int[np.ndarray, "batch time"], Int[np.ndarray, "batch"]]:
    """Prompts of any lengths as one right-padded array, and their lengths."""
    rows = [np.asarray(prompt) for prompt in prompts]
    if not rows:
        raise ValueError("prompts: expected at least one, got none.")
    for row in rows:
        if row.ndim != 1:
            raise ValueError(f"prompt: expected a list of tokens, got shape {row.shape}.")
        if row.size == 0:
            raise ValueError("prompt: expected at least one token, got none.")
        if row.dtype.kind not in "iu":
            raise ValueError(f"prompt: expected integer tokens, got {row.dtype}.")
        if row.min() < 0 or row.max() >= vocab_size:
            outside = row[(row < 0) | (row >= vocab_size)][0]
            raise ValueError(f"prompt: expected tokens in [0, {vocab_size}), got {outside}.")
    lengths = np.array([row.size for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : row.size] = row
    return tokens, lengths


def generate(
    model: LanguageModel,
    params: Any,
    prompts: Sequence[Prompt],
    *,
    steps: int,
    hypers: RoutingHypers,
    keys: Optional[RowKeys] = None,
    sampler: Draw = greedy,
    mode: Optional[str] = None,
    capacity: Optional[int] = None,
    ends: Sequence[int] = (),
    known: Optional[int] = None,
) -> Trace:
    """Goes on from each prompt, token ids of any length, by `steps` >= 1 tokens.

    Raises ValueError for an empty prompt, a token outside the vocabulary, steps that cannot be or exceed the capacity,
    missing or too few keys.

    Args:
      keys: one PRNG key per row; only `greedy` can do without.
      sampler: `greedy` or a `Sampler`.
      mode: "soft", "hard" or "gated"; None is the model's own.
      capacity: tokens that a row of the cache can hold; None is what the longest row needs, rounded up to a multiple of
        `CAPACITY_STEP`.
      ends: tokens behind which a row draws no more.
      known: of tokens, from the first on, that a tokenizer has a text for; embeddings are often padded beyond. None: all.
    """
    if _elsewhere(params):
        return without_mesh(generate)(
            model, params, prompts, steps=steps, hypers=hypers, keys=keys, sampler=sampler,
            mode=mode, capacity=capacity, ends=ends, known=known,
        )
    tokens, lengths = pad_prompts(prompts, model.config.vocab_size)
    steps = whole("steps", steps)
    expect(steps >= 1, "steps", "at least 1", steps)
    needed = int(lengths.max()) + steps
    most = model.config.context
    expect(most is None or needed <= most, "steps", f"prompt + steps within the model's context of {most}", needed)
    if capacity is None:
        capacity = -(-needed // CAPACITY_STEP) * CAPACITY_STEP
    capacity = whole("capacity", capacity)
    expect(needed <= capacity, "capacity", f"at least prompt + steps = {lengths.max()} + {steps} tokens", capacity)
    ends = tuple(whole("ends", end) for end in ends)
    for end in ends:
        expect(0 <= end < model.config.vocab_size, "ends", f"tokens in [0, {model.config.vocab_size})", end)
    if known is not None:
        known = whole("known", known)
        expect(0 < known <= model.config.vocab_size, "known", f"1 to {model.config.vocab_size} tokens", known)
    batch = len(lengths)
    if keys is None:
        expect(sampler is greedy, "keys", "one PRNG key per row for this sampler", None)
        keys = jax.random.split(jax.random.key(0), batch)
    if keys.shape != (batch,):
        raise ValueError(f"keys: expected {batch} PRNG keys, one per row, got shape {keys.shape}.")
    model = model.clone(mode=model.mode if mode is None else mode)
    cache, logits, first = prefill(model, params, tokens, lengths, hypers, capacity=capacity)
    _, _, seen = decode_loop(
        model, params, cache, logits, keys, hypers, steps=steps, sampler=sampler, ends=ends, known=known
    )
    drawn = np.full(batch, steps, np.int32)
    if ends:
        found = np.isin(seen["tokens"], ends)
        drawn = np.where(found.any(1), found.argmax(1) + 1, drawn)
    prompt = {f"prompt_{name}": values for name, values in first.items()}
    return Trace(lengths=jnp.asarray(drawn, jnp.int32), **seen, **prompt)


def _elsewhere(params: Any) -> bool:
    """Whether a mesh is set, and parameters are on other devices than its own."""
    mesh = jax.sharding.get_mesh()
    placed = [leaf.devices() for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    return not mesh.empty and any(devices != set(mesh.devices.flat) for devices in placed)
