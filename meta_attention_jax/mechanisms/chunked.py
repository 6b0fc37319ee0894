"""Blocks of tokens that meet the other tokens of their chunk: what the kernels of `linear_gpu` share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from meta_attention_jax.mechanisms import triton
from meta_attention_jax.mechanisms.blocks import feature_map
from meta_attention_jax.mechanisms.triton import divide


class Shape(NamedTuple):
    """How one kernel is cut: tokens of a block, or rows of a state; tokens met at a time; columns; warps; stages."""

    rows: int
    tokens: int
    columns: int
    warps: int
    stages: int


class Tokens(NamedTuple):
    """Neighbours; the last of a sequence are moved inwards, where those that are not new were met before."""

    here: pl.Slice
    index: Int[Array, "tokens"]
    new: Bool[Array, "tokens"]
    ids: Int[Array, "tokens"]


class At(NamedTuple):
    """The block of one program. walk(meet, carry) calls meet(tokens, allowed, member of a group, carry) for the tokens
    of its chunk that its rows see, or that see them."""

    b: Int[Array, ""]
    c: Int[Array, ""]
    h: Int[Array, ""]
    columns: pl.Slice
    rows: Tokens
    owner: Int[Array, ""]  # The segment of the state.
    walk: Callable

    def of_state(self, x):
        """Rows of the state's segment; 0 for others."""
        mine = self.rows.ids == self.owner
        return jnp.where(mine if x.ndim == 1 else mine[:, None], x, 0.0)

    def slope(self, ref):
        """phi' = exp(x) = phi where x <= 0, else 1: the smaller of phi and 1."""
        return jnp.minimum(feature_map(ref[self.b, self.rows.here, self.h, self.columns]), 1.0)

    def put(self, ref, value) -> None:
        place = ref.at[self.b, self.rows.here, self.h, self.columns]
        triton.store(place, value.astype(ref.dtype), mask=self.rows.new[:, None])


def by_block(body, arrays, places, segments, chunk: int, shape: Shape, interpret: bool, members: int = 0):
    """body(at, *arrays, *places) for every block of rows, head and piece of columns of the first place. Rows are
    queries that look back; or, given the members of a group of heads, keys that look at later queries."""
    batch, time, heads, width = places[0].shape
    rows, tokens, columns = shape[:3]
    blocks, group = -(-time // rows), max(members, 1)

    def kernel(segments, *refs):
        n, piece = divide(pl.program_id(0), width // columns)
        n, h = divide(n, heads)
        b, block = divide(n, blocks)
        first = block * rows
        c = divide(first, chunk)[0]
        mine = tokens_at(segments, b, first, rows, time)
        if members:
            low, high = divide(first, tokens)[0] * tokens, jnp.minimum((c + 1) * chunk, time)
        else:
            low, high = c * chunk, jnp.minimum(first + rows, time)

        def walk(meet, carry):
            def step(i, carry):
                i, member = divide(i, group)
                met = tokens_at(segments, b, low + i * tokens, tokens, time)
                row, column = mine.index[:, None], met.index[None, :]
                allowed = column >= row if members else column <= row
                allowed &= met.new[None, :] & (mine.ids[:, None] == met.ids[None, :])
                return meet(met, allowed, member, carry)

            return jax.lax.fori_loop(0, steps_of(high - low, tokens) * group, step, carry)

        owner = (last_of if members else owner_of)(segments, b, c, chunk, time)
        body(At(b, c, h, pl.ds(piece * columns, columns), mine, owner, walk), *refs)

    programs = batch * blocks * heads * (width // columns)
    return launch(kernel, segments, arrays, places, programs, shape, interpret)


def launch(kernel, segments, arrays, places, programs: int, shape: Shape, interpret: bool, written_over: bool = False):
    """kernel(segments or None, *arrays, *places)."""
    given = () if segments is None else (segments,)
    return triton.call(
        kernel if given else functools.partial(kernel, None), (*given, *arrays), places, programs,
        warps=shape.warps, stages=shape.stages, interpret=interpret,
        written_over=len(given) + len(arrays) - 1 if written_over else None,
    )


# Without segment ids all are 1, which the compiler folds away.


def tokens_at(segments, b, first, count: int, time: int) -> Tokens:
    start = first if time % count == 0 else jnp.minimum(first, time - count)
    here, index = pl.ds(start, count), start + jnp.arange(count, dtype=jnp.int32)
    new = jnp.ones((count,), bool) if time % count == 0 else index >= first
    return Tokens(here, index, new, jnp.ones((count,), jnp.int32) if segments is None else segments[b, here])


def owner_of(segments, b, c, chunk: int, time: int):
    """Segment of the state before a chunk: that of the token before. The first state is 0, whose ever."""
    return jnp.int32(1) if segments is None else segments[b, jnp.maximum(c * chunk - 1, 0)]


def last_of(segments, b, c, chunk: int, time: int):
    """Segment of the state after a chunk: that of its last token."""
    return jnp.int32(1) if segments is None else segments[b, jnp.minimum((c + 1) * chunk, time) - 1]


def factor(ref):
    return jnp.bfloat16 if ref.dtype == jnp.bfloat16 else jnp.float32


def phi(ref, b, tokens: Tokens, h, columns=slice(None)):
    return feature_map(ref[b, tokens.here, h, columns]).astype(factor(ref))


def steps_of(length, tokens: int):
    return divide(length + (tokens - 1), tokens)[0]
