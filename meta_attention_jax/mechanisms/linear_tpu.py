"""Causal linear attention (Katharopoulos et al., arXiv 2006.16236) on TPUs, chunked, by Pallas.

The chunks of a head follow each other on the grid, with the sums before each, (S, z), kept in the memory of the core:
every array goes through it once. The backward pass goes through twice: in order for dQ, which makes the sums and the
outputs again and so saves neither, and in reverse for dK and dV. Equations as `linear`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Optional

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from meta_attention_jax import targets
from meta_attention_jax.mechanisms import mosaic
from meta_attention_jax.mechanisms.blocks import EPSILON, centred, feature_map
from meta_attention_jax.mechanisms.mosaic import DTYPES, MOST_DIM, dot
from meta_attention_jax.targets import Target
from meta_attention_jax.types import Keys, Queries, SegmentIds, Values

CHUNK, STEP, MOST = 512, 1 << 19, 1 << 20
"""Tokens of a chunk, and bytes of its queries, at most: as many as make up for the time that a fetch takes to begin,
and as few as fit the memory of a core, twice; and bytes that those of LANES tokens may have. Not timed."""

IDS, READS, WRITES, KEEP = range(4)
"""Rows of `_places`."""


def serves(kernel: str, shape: Sequence[Any], kv_heads: int, dtype: Any, target: Optional[Target] = None) -> bool:
    """Whether "pallas" is asked for on a TPU and has a form for queries of this shape, [B, T, H, d]; others, and more
    heads to a key than the memory of a core holds, are left to the portable one."""
    if kernel != "pallas" or (target or targets.current()).platform != "tpu":
        return False
    if not all(isinstance(size, int) for size in shape) or jnp.dtype(dtype).name not in DTYPES:
        return False
    _, _, heads, dim = shape
    least = heads // kv_heads * max(dim, mosaic.LANES) * mosaic.LANES * jnp.dtype(dtype).itemsize
    return dim <= MOST_DIM and least <= MOST


def chunk_for(group: int, dim: int, dtype: Any) -> int:
    """Tokens of a chunk, by the queries that share a key."""
    most = max(mosaic.LANES, STEP // (group * max(dim, mosaic.LANES) * jnp.dtype(dtype).itemsize))
    return min(CHUNK, 1 << (most.bit_length() - 1))


def attend(
    q: Queries, k: Keys, v: Values, segment_ids: Optional[SegmentIds] = None, chunk: Optional[int] = None,
    interpret: bool = False,
) -> Queries:
    """phi(q_t)^T S_t / (phi(q_t)^T z_t + 1e-6) over s <= t of the segment of t; 0 in padding. Sums in float32; factors
    of products are bfloat16 if q is."""
    batch, time, heads, dim = q.shape
    chunk = min(chunk or chunk_for(heads // k.shape[2], dim, q.dtype), -(-time // mosaic.LANES) * mosaic.LANES)
    ids = jnp.ones((batch, time), jnp.int32) if segment_ids is None else segment_ids
    fill = -time % chunk
    q, k, v = (jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, fill), (0, 0))) for x in (q, k, v))
    q = q.reshape(batch, k.shape[1], -1, *q.shape[2:])
    places = _places(jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, fill))), chunk)
    out = _attend(q, k, v, places, chunk, interpret)
    return out.reshape(batch, heads, -1, dim)[:, :, :time].transpose(0, 2, 1, 3)


def _places(ids: Int[Array, "batch time"], chunk: int) -> Int[Array, "batch 8 time"]:
    """Of every token: its segment; whether it reads the sums before its chunk, which are of the token before; whether
    it is of the sums behind, which are of the chunk's last token; whether the sums before stay."""
    last = ids[:, chunk - 1 :: chunk]
    owner = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
    last, owner = (jnp.repeat(x, chunk, axis=1) for x in (last, owner))
    rows = [ids, ids == owner, ids == last, owner == last]
    return jnp.stack([x.astype(jnp.int32) for x in rows] + [jnp.zeros_like(ids)] * 4, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, places, chunk, interpret):
    """q [batch kv_head group time dim], k and v [batch kv_head time dim]."""
    (out,) = _in_order((q, k, v), places, chunk, interpret)
    return out


def _attend_forward(q, k, v, places, chunk, interpret):
    return _attend(q, k, v, places, chunk, interpret), (q, k, v, places)


def _attend_backward(chunk, interpret, saved, d_out):
    q, k, v, places = saved
    d_out = jnp.where((places[:, IDS] != 0)[:, None, None, :, None], d_out, 0).astype(q.dtype)
    dq, inverse, d_bottom = _in_order((q, k, v, d_out), places, chunk, interpret)
    dk, dv = _in_reverse((q, k, v, d_out, inverse, d_bottom), places, chunk, interpret)
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def _in_order(arrays, places, chunk, interpret):
    """The outputs; given their cotangents instead dQ, i = 1 / (D + eps), and dD = -i dO . out."""
    q, (_, _, group, time, _), dtype, backward = arrays[0], arrays[0].shape, arrays[0].dtype, len(arrays) > 3

    def kernel(places, q, k, v, *refs):
        *refs, s, z = refs  # Cotangents, dQ, i and dD; or the outputs.
        _zeroed(s, z)
        read, write = (_column(places, row) for row in (READS, WRITES))
        key, value, allowed = feature_map(k[0, 0]), v[0, 0], _allowed(places, chunk)
        sums, centre = centred(s[...], z[0])
        sums, centre = sums.astype(dtype), centre[None]
        for member in range(group):
            query = feature_map(q[0, 0, member])
            scores = jnp.where(allowed, dot(query.astype(dtype), key.astype(dtype), 1, 1), 0.0).astype(dtype)
            reading = query * read
            before = (reading * z[...]).sum(1, keepdims=True)
            top = dot(scores, value, 1, 0) + dot(reading.astype(dtype), sums, 1, 0) + before * centre
            bottom = scores.astype(jnp.float32).sum(1, keepdims=True) + before
            inverse = 1.0 / (bottom + EPSILON)
            if not backward:
                real = _column(places, IDS) != 0
                refs[0][0, 0, member] = jnp.where(real, top * inverse, 0.0).astype(dtype)
                continue
            g = refs[0][0, 0, member]
            d_bottom = -(g.astype(jnp.float32) * top * inverse).sum(1, keepdims=True) * inverse
            # i is multiplied with behind: rounded, dO i would not cancel with what dD brings.
            d_scores = jnp.where(allowed, dot(g, value, 1, 1) * inverse + d_bottom, 0.0)
            shift = d_bottom + (g.astype(jnp.float32) * centre).sum(1, keepdims=True) * inverse
            d_query = (dot(g, sums, 1, 1) * inverse + shift * z[...]) * read
            d_query += dot(d_scores.astype(dtype), key.astype(dtype), 1, 0)
            refs[1][0, 0, member] = (d_query * jnp.minimum(query, 1.0)).astype(dtype)
            for ref, x in zip(refs[2:], (inverse, d_bottom)):
                ref[0, 0, member] = jnp.broadcast_to(x, (chunk, mosaic.LANES))[:, :8].T
        writing = (key * write).astype(dtype)
        keep = places[0, KEEP : KEEP + 1, :1].astype(jnp.float32)
        s[...] = s[...] * keep + dot(writing, value, 0, 0)
        # Of the same rounded numbers: S and z err together.
        z[...] = z[...] * keep + writing.astype(jnp.float32).sum(0, keepdims=True)

    made = [((*q.shape[:3], 8, time), jnp.float32)] * 2 if backward else []
    return _call(kernel, arrays, places, [(q.shape, dtype), *made], chunk, interpret)


def _in_reverse(arrays, places, chunk, interpret):
    """dK and dV, with the gradients (dS, dz) in the place of the sums."""
    q, k, v, *_ = arrays
    group, dtype = q.shape[2], q.dtype

    def kernel(places, q, k, v, d_out, inverse, d_bottom, dk, dv, ds, dz):
        _zeroed(ds, dz)
        read, write = (_column(places, row) for row in (READS, WRITES))
        key, value, allowed = feature_map(k[0, 0]), v[0, 0], _allowed(places, chunk, transposed=True)
        sums = ds[...].astype(dtype)
        d_key = (dot(value, sums, 1, 1) + dz[...]) * write
        d_value = dot((key * write).astype(dtype), sums, 1, 0)
        keep = places[0, KEEP : KEEP + 1, :1].astype(jnp.float32)
        ds[...], dz[...] = ds[...] * keep, dz[...] * keep
        for member in range(group):
            query, g = feature_map(q[0, 0, member]), d_out[0, 0, member]
            i, slope = (ref[0, 0, member, :1] for ref in (inverse, d_bottom))
            scores = jnp.where(allowed, dot(key.astype(dtype), query.astype(dtype), 1, 1), 0.0)
            d_value += dot((scores * i).astype(dtype), g, 1, 0)
            d_scores = jnp.where(allowed, dot(value, g, 1, 1) * i + slope, 0.0)
            d_key += dot(d_scores.astype(dtype), query.astype(dtype), 1, 0)
            i, slope = (ref[0, 0, member, 0][:, None] for ref in (inverse, d_bottom))
            reading = (query * read).astype(dtype)
            ds[...] += dot(reading, (g.astype(jnp.float32) * i).astype(dtype), 0, 0)
            dz[...] += (reading.astype(jnp.float32) * slope).sum(0, keepdims=True)
        dk[0, 0] = (d_key * jnp.minimum(key, 1.0)).astype(dk.dtype)
        dv[0, 0] = d_value.astype(dv.dtype)

    return _call(kernel, arrays, places, [(k.shape, k.dtype), (v.shape, v.dtype)], chunk, interpret, reverse=True)


def _zeroed(*sums) -> None:
    """Before the first chunk of a head there is nothing."""
    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)


def _column(places, row: int) -> Array:
    """A number of every token of the chunk, below each other."""
    return places[0, row, :][:, None].astype(jnp.float32)


def _allowed(places, chunk: int, transposed: bool = False):
    """Who attends to whom within a chunk: [queries keys], or transposed."""
    ids = places[0, IDS, :]
    first, second = (jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), axis) for axis in (0, 1))
    return (ids[:, None] == ids[None, :]) & (first <= second if transposed else first >= second)


def _call(
    kernel: Callable[..., None], arrays: Sequence[Array], places: Array,
    outputs: Sequence[tuple[tuple[int, ...], Any]], chunk: int, interpret: bool, reverse: bool = False,
) -> list[Array]:
    batch, kv_heads, _, time, dim = arrays[0].shape
    chunks = time // chunk

    def spec(shape: tuple[int, ...]) -> pl.BlockSpec:
        axis = shape.index(time, 2)  # Behind the heads.
        block = (1, 1, *shape[2:axis], chunk, *shape[axis + 1 :])

        def place(b, g, c):
            c = chunks - 1 - c if reverse else c
            return (b, g, *[0] * (axis - 2), c, *[0] * (len(shape) - axis - 1))

        return pl.BlockSpec(block, place)

    of_places = pl.BlockSpec((1, 8, chunk), lambda b, g, c: (b, 0, chunks - 1 - c if reverse else c))
    call = pl.pallas_call(
        kernel, grid=(batch, kv_heads, chunks),
        in_specs=[of_places, *[spec(x.shape) for x in arrays]], out_specs=[spec(shape) for shape, _ in outputs],
        out_shape=[mosaic.result(shape, dtype, arrays[0]) for shape, dtype in outputs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in ((dim, dim), (1, dim))],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )
    return call(places, *arrays)
