"""What test_gpu.py compares of attention: rows {check, value, tolerance, passed}.

`passed` is None for what was not run; `note` then says why.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.common import Row, random_routes
from experiments.benchmarks.gpu_timings import cudnn_refusal, cudnn_window
from meta_attention_jax.mechanisms.registry import attend
from meta_attention_jax.routing.dispatch import hard_attention
from meta_attention_jax.training.parallel import Parallel
from meta_attention_jax.types import MECHANISMS, AttentionSpec
from tests import oracles

UNIT = 2.0**-8
"""Largest relative error of rounding once to bfloat16."""

VALUES, GRADIENTS = (UNIT, 2 * UNIT), (2 * UNIT, 4 * UNIT)
"""(norm of the error / norm, largest error / largest entry) that bfloat16 may cost.

All sums are float32. An output is rounded itself, its weights before they meet the values and,
where 1/sqrt(d) is no power of 2, at times the scaled query: up to three independent roundings, each
of a root mean square of about 0.4 units, which by the norm stay within one. A gradient goes through
weights and their gradients, both rounded, and through sum_d dO O of a rounded output: twice that.
A single entry may have all of its roundings at their worst: twice the norm's."""

EXACT, TENSOR_FLOAT = 2e-5, 4 * 2.0**-11
"""Norm tolerances in float32: products of full precision, in another order; and products as XLA
makes them on a GPU by default, whose factors are rounded to 11 bits (TensorFloat-32)."""

FORMS = ("full xla", "full blockwise", "full cudnn", "linear", "linear pallas", "local", "cudnn window")
PARTS = ("out", "dq", "dk", "dv")


def check(name: str, value: float, tolerance: float, note: str = "") -> Row:
    """One comparison; a value that is not finite fails."""
    value = float(value)
    finite = math.isfinite(value)
    row = dict(check=name, value=value if finite else None, tolerance=tolerance,
               passed=finite and value <= tolerance)
    return row | ({"note": note} if note else {} if finite else {"note": str(value)})


def not_run(name: str, why: str) -> Row:
    return dict(check=name, value=None, tolerance=None, passed=None, note=f"not run: {why}")


def attend_form(form: str, q, k, v, ids, window: int):
    """Causal attention by one of FORMS; without segment ids where cuDNN is asked."""
    if form == "cudnn window":
        return cudnn_window(q, k, v, window)
    name, _, program = form.partition(" ")
    named = {"kernel": program} if program == "pallas" else {"implementation": program or "auto"}
    spec = AttentionSpec(window=window, **named)
    return attend(name, q, k, v, spec=spec, segment_ids=ids)


def refusal_of(form: str, dtype: Any, dim: int, time: int) -> str | None:
    """Why a form cannot run here; None if it can."""
    if "pallas" in form:
        return None if jax.default_backend() == "gpu" else "the kernel is one for GPUs"
    return cudnn_refusal(dtype, dim, time) if "cudnn" in form else None


def pulled(function: Callable[..., Any], q, k, v, cotangent):
    """(out, dq, dk, dv)."""
    out, pull = jax.vjp(function, q, k, v)
    return out, *pull(cotangent)


def compiled_form(form: str, window: int):
    """(q, k, v, cotangent, ids) -> (out, dq, dk, dv), compiled."""
    return jax.jit(
        lambda q, k, v, cotangent, ids: pulled(
            lambda *x: attend_form(form, *x, ids, window), q, k, v, cotangent
        )
    )


def draw(batch: int, time: int, heads: int, dim: int, seed: int, dtype: Any = jnp.bfloat16):
    """q, k, v, cotangent, two query heads to a key head, and ragged segment ids.

    Row 0 ends in padding; the others have padding first and two segments.
    """
    rng = np.random.default_rng(seed)
    q, cotangent = rng.normal(size=(2, batch, time, heads, dim))
    q = 2 * q  # Or the softmax would be nearly flat.
    k, v = rng.normal(size=(2, batch, time, heads // 2, dim))
    ids = np.ones((batch, time), np.int32)
    ids[0, time - time // 5 :] = 0
    ids[1:, : time // 7], ids[1:, time // 2 :] = 0, 2
    return [jnp.asarray(x, dtype) for x in (q, k, v, cotangent)], ids


def errors(got, expected) -> dict[str, tuple[float, float]]:
    """part -> (norm of the error / norm, largest error / largest entry)."""
    found = {}
    for part, x, reference in zip(PARTS, got, expected, strict=True):
        x, reference = (np.asarray(jnp.float32(y)) if isinstance(y, jax.Array) else y
                        for y in (x, reference))
        difference = np.abs(np.asarray(x, np.float64) - reference)
        found[part] = (
            float(np.linalg.norm(difference) / np.linalg.norm(reference)),
            float(difference.max() / np.abs(reference).max()),
        )
    return found


def error_rows(name: str, got, expected, values, gradients) -> list[Row]:
    """Four rows: values and gradients (the worst of three), by norm and by the worst entry."""
    found = errors(got, expected)
    rows = []
    for kind, parts, tolerances in (
        ("values", PARTS[:1], values), ("gradients", PARTS[1:], gradients)
    ):
        for i, measure in enumerate(("norm", "worst entry")):
            rows.append(check(f"{name}, {kind}, {measure}", _worst(found[p][i] for p in parts),
                              tolerances[i]))
    return rows


def _worst(values) -> float:
    """The largest; NaN if one is NaN, which `max` may pass over."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)


def mechanism_rows(time: int, dim: int, window: int, *, segments: bool) -> list[Row]:
    """Every form against the float64 oracle of its equation, on the same bfloat16 inputs."""
    (q, k, v, cotangent), ids = draw(2, time, 4, dim, seed=time)
    if not segments:
        ids = np.ones_like(ids)
    setting = f"T {time}, d {dim}" + (", segments" if segments else "")
    arguments = [np.asarray(x.astype(jnp.float32)) for x in (q, k, v, cotangent)]

    @functools.cache
    def expected(kind: str):
        if kind == "linear":
            return oracles.linear_attention(*arguments, ids)
        window_ = window if kind == "local" else None
        return oracles.softmax_attention(*arguments, ids, window=window_)

    def rows_of(form: str) -> list[Row]:
        got = compiled_form(form, window)(
            q, k, v, cotangent, jnp.asarray(ids) if segments else None
        )
        if any(x.dtype != jnp.bfloat16 for x in got):
            raise TypeError(f"expected bfloat16, got {[x.dtype.name for x in got]}")
        kind = "local" if form == "cudnn window" else form.split()[0]
        return error_rows(f"{form}, {setting}", got, expected(kind), VALUES, GRADIENTS)

    rows = []
    for form in FORMS:
        refusal = refusal_of(form, q.dtype, dim, time)
        if "cudnn" in form and segments:
            continue  # It has no ids; `full.attend` refuses them.
        rows += [not_run(f"{form}, {setting}", refusal)] if refusal else rows_of(form)
    return rows


def causality_rows(time: int, dim: int, window: int) -> list[Row]:
    """d out_t / d (q, k, v)_s is exactly 0 for s > t, and below the window; later inputs change no
    output. All in bfloat16, for one segment."""
    (q, k, v, cotangent), ids = draw(2, time, 4, dim, seed=0)
    others, _ = draw(2, time, 4, dim, seed=1)
    index = jnp.arange(time)[None, :, None, None]
    route = jnp.asarray(random_routes([0.3, 0.6], time))

    def rows_of(form: str) -> list[Row]:
        if form.startswith("packed dispatch"):
            spec = AttentionSpec(window=window, kernel="pallas" if "pallas" in form else "auto")
            run = jax.jit(lambda q, k, v, g, _: pulled(lambda *x: hard_attention(*x, route, spec=spec), q, k, v, g))
        else:
            run = compiled_form(form, window)
        out = run(q, k, v, cotangent, None)[0]
        ahead, changed, behind, least = 0.0, 0.0, 0.0, math.inf
        for t in sorted({0, 63, 64, time // 2, time - 2}):
            if t >= time:
                continue
            one = jnp.where(index == t, cotangent, 0)
            replaced = [jnp.where(index > t, y, x) for x, y in zip((q, k, v), others)]
            other, *gradients = run(*replaced, one, None)
            ahead = max(ahead, *(float(jnp.abs(x[:, t + 1 :]).max()) for x in gradients))
            moved = jnp.abs(other[:, : t + 1].astype(jnp.float32) - out[:, : t + 1])
            changed = max(changed, float(moved.max()))
            least = min(least, float(jnp.abs(gradients[2]).max()))
            if t >= window:
                below = [jnp.abs(x[:, : t - window + 1]).max() for x in gradients[1:]]
                behind = max(behind, *map(float, below))
        rows = [
            check(f"{form}, gradients of later tokens, largest", ahead, 0.0),
            check(f"{form}, change of outputs by later tokens, largest", changed, 0.0),
            # The control: the same probe must see what it should.
            check(f"{form}, probes without any gradient", float(least == 0.0), 0.0),
        ]
        if form in ("local", "cudnn window"):
            rows.append(check(f"{form}, gradients below the window, largest", behind, 0.0))
        return rows

    rows = []
    for form in (*FORMS, "packed dispatch", "packed dispatch pallas"):
        refusal = refusal_of(form, q.dtype, dim, time)
        rows += [not_run(f"{form}, causality", refusal)] if refusal else rows_of(form)
    return rows


def select(q, k, v, route, ids, window: int):
    """The definition: all mechanisms on all tokens, then the chosen one."""
    spec = AttentionSpec(window=window, implementation="xla")
    outs = [attend(name, q, k, v, spec=spec, segment_ids=ids) for name in MECHANISMS]
    return jnp.take_along_axis(jnp.stack(outs), route[None, ..., None, None], axis=0)[0]


def packed(q, k, v, route, ids, window: int, kernel: str = "auto"):
    return hard_attention(q, k, v, route, spec=AttentionSpec(window=window, kernel=kernel), segment_ids=ids)


def routed(function, window: int):
    """(q, k, v, cotangent, route, ids) -> (out, dq, dk, dv)."""

    def run(q, k, v, cotangent, route, ids):
        return pulled(lambda *x: function(*x, route, ids, window), q, k, v, cotangent)

    return run


def highest():
    """Products in full float32, where a GPU would round their factors."""
    return jax.default_matmul_precision("highest")


ARITHMETIC = {
    "float32": (jnp.float32, highest, (EXACT, 10 * EXACT)),
    "float32, products by default": (
        jnp.float32, contextlib.nullcontext, (TENSOR_FLOAT, 10 * TENSOR_FLOAT)
    ),
    "bfloat16": (jnp.bfloat16, contextlib.nullcontext, None),
}
"""label -> (dtype, precision of the packed side, tolerances or those of bfloat16). A worst entry
may be ten times worse than the norm: it can be a sum of products that cancel."""


def packed_rows(time: int, dim: int, window: int, label: str, kernel: str) -> list[Row]:
    """Packed dispatch by one kernel against `select` in full float32 on the same inputs, whatever the routes."""
    if kernel == "pallas" and jax.default_backend() != "gpu":
        return [not_run(f"packed = select, {label}, {kernel}", "the kernel is one for GPUs")]
    dtype, precision, tolerances = ARITHMETIC[label]
    values, gradients = (tolerances, tolerances) if tolerances else (VALUES, GRADIENTS)
    batch = 4
    arguments, ids = draw(batch, time, 4, dim, seed=2, dtype=dtype)
    exact, ids = [x.astype(jnp.float32) for x in arguments], jnp.asarray(ids)
    run = jax.jit(routed(functools.partial(packed, kernel=kernel), window))
    reference = jax.jit(routed(select, window))
    routes = {f"{share:.0%} full": random_routes([share] * batch, time)
              for share in (0.0, 0.1, 0.5, 1.0)}
    routes["uneven shares"] = random_routes([0.0, 1.0, 0.1, 0.5], time)
    routes["linear alone"], routes["local alone"] = (
        np.full((batch, time), index, np.int32) for index in (1, 2)
    )

    def rows_of(name: str, route: np.ndarray) -> list[Row]:
        with precision():
            got = run(*arguments, jnp.asarray(route), ids)
        with highest():
            expected = reference(*exact, jnp.asarray(route), ids)
        return error_rows(f"packed = select, {label}, {kernel}, {name}", got,
                          [np.asarray(x, np.float64) for x in expected], values, gradients)

    rows = []
    for name, route in routes.items():
        rows += rows_of(name, route)
    return rows


KERNEL_CASES = {
    "d 128, grouped heads, sinks": ("bfloat16", 1001, 128, 8, 2, dict(window=300, sinks=4)),
    "d 64, sinks, odd length": ("float16", 777, 64, 6, 2, dict(window=64, sinks=3)),
    "d 256": ("bfloat16", 512, 256, 4, 2, dict(window=100)),
    "d 80, softcap": ("bfloat16", 640, 80, 4, 4, dict(window=90, softcap=20.0)),
    "d 128, float32": ("float32", 333, 128, 4, 2, dict(window=77, sinks=2)),
    "both directions": ("bfloat16", 500, 64, 4, 2, dict(window=33, sinks=5, causal=False)),
}
"""name -> (dtype, T, d, heads, key heads, changes to the spec)."""


def kernel_rows(case: str) -> list[Row]:
    """The kernel of GPUs against the portable one in full float32."""
    dtype, time, dim, heads, kv_heads, changes = KERNEL_CASES[case]
    rng = np.random.default_rng(time)
    shapes = (heads, kv_heads, kv_heads, heads)
    arguments = [jnp.asarray(rng.normal(size=(2, time, n, dim)), dtype) for n in shapes]
    ids = jnp.asarray(1 + (np.arange(time) >= time // 3) + np.zeros((2, 1)), jnp.int32)
    route = jnp.asarray(random_routes([0.1, 0.5], time))

    def run(kernel, arguments):
        spec = AttentionSpec(kernel=kernel, **changes)
        form = functools.partial(hard_attention, route=route, spec=spec, segment_ids=ids)
        return jax.jit(functools.partial(pulled, form))(*arguments)

    with highest():
        expected = run("portable", [x.astype(jnp.float32) for x in arguments])
        got = run("pallas", arguments)
    exact = (EXACT, 10 * EXACT)
    bounds = (exact, exact) if dtype == "float32" else (VALUES, GRADIENTS)
    return error_rows(f"pallas = portable, {case}", got, [np.asarray(x, np.float64) for x in expected], *bounds)


def mesh_rows(time: int, dim: int, window: int) -> list[Row]:
    """The same by `Parallel("jit")` over all devices: each loops over its own rows alone."""
    parallel = Parallel("jit")
    devices = len(parallel.devices)
    batch = 2 * devices
    arguments, ids = draw(batch, time, 4, dim, seed=3, dtype=jnp.float32)
    route = random_routes(np.linspace(0.0, 0.6, batch), time)
    sides = routed(packed, window), routed(select, window)

    def squares(case, *, axis_name):
        got, expected = (side(*case) for side in sides)
        pairs = [(jnp.sum((x - y) ** 2), jnp.sum(y**2)) for x, y in zip(got, expected)]
        return jax.lax.psum(pairs, axis_name)

    with highest():
        sums = parallel.compile(squares, batch_argument=0)(
            parallel.shard([np.asarray(x) for x in (*arguments, route, ids)])
        )
    return [
        check(f"packed = select, float32, mesh of {devices}, {part}, norm",
              math.sqrt(float(wrong) / float(scale)), EXACT)
        for part, (wrong, scale) in zip(PARTS, sums, strict=True)
    ]
