"""What `experiments.benchmarks.gpu` times: rows {what, ratio, spread, rounds, ...} of interleaved sides.

A side that cannot run here has a row without a ratio; `note` says why. Nothing stands in for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time as clock
from collections.abc import Callable, Mapping
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import common, decoding
from experiments.benchmarks.common import Row
from meta_attention_jax.mechanisms import full
from meta_attention_jax.mechanisms.registry import attend
from meta_attention_jax.objective import forward
from meta_attention_jax.routing.dispatch import hard_attention
from meta_attention_jax.training import build
from meta_attention_jax.training.step import init_state, train_step
from meta_attention_jax.types import AttentionSpec

Call = Callable[[], Any]

LEAST = 0.02
"""Seconds that a timed call takes at the least: a kernel of 50 microseconds is called in a row
until then, so that the time to start one from Python is not what is measured."""

MOST_CALLS = 200


def per_call(calls: Mapping[str, Call], rounds: int) -> dict[str, np.ndarray]:
    """name -> seconds per call, shape [rounds], interleaved; see LEAST."""
    repeated, repeats = {}, {}
    for name, call in calls.items():
        jax.block_until_ready(call())  # compiles
        start = clock.perf_counter()
        jax.block_until_ready(call())
        took = clock.perf_counter() - start
        repeats[name] = min(max(math.ceil(LEAST / took), 1), MOST_CALLS)
        repeated[name] = functools.partial(_in_a_row, call, repeats[name])
    seconds = common.interleave(repeated, rounds, warmup=0)
    return {name: s / repeats[name] for name, s in seconds.items()}


def _in_a_row(call: Call, times: int) -> Any:
    for _ in range(times):
        result = call()
    return result


def ratio(what: str, seconds: Mapping[str, np.ndarray], side: str, baseline: str, **sizes) -> Row:
    """The row of one ratio; below 1 the side is faster than the baseline."""
    row = common.ratio_row(what, seconds, side, baseline)
    return dict(what=what, ratio=row["ratio"], spread=row["spread"], rounds=row["rounds"], **sizes,
                milliseconds=1e3 * row["seconds"], baseline_milliseconds=1e3 * row["baseline_seconds"])


def without(what: str, note: str, **sizes: Any) -> Row:
    """The row of what was not timed."""
    return dict(what=what, ratio=None, spread=None, rounds=0, **sizes, note=note)


def ratio_or_why(what: str, side: str, baseline: str, seconds: Mapping[str, np.ndarray], why: Optional[str],
                 **sizes: Any) -> Row:
    """`ratio` of "side / baseline", or where the baseline was not timed, `why`."""
    what = f"{what}{side} / {baseline}"
    if baseline in seconds:
        return ratio(what, seconds, side, baseline, **sizes)
    return without(what, f"not run: {why}", **sizes)


def cudnn_refusal(dtype: Any, dim: int, time: int) -> Optional[str]:
    """Why cuDNN cannot serve full attention here, gradients included; None if it can."""
    try:
        full.resolve_implementation("cudnn", time=time, dtype=dtype, head_dim=dim, segments="one")
    except ValueError as error:
        return str(error)
    return None


def cudnn_window(q, k, v, window: int):
    """The local mechanism by cuDNN: (L, 0) keeps L + 1 keys, and a window needs `is_causal`."""
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=(window - 1, 0), implementation="cudnn"
    )


def mechanism_rows(time: int, dim: int, window: int, direction: str, rounds: int, heads: int = 8) -> list[Row]:
    """All forms against full attention by cuDNN and by blocks; batch 1, bfloat16, one segment."""
    dtype = jnp.bfloat16
    qkv = common.random_qkv(1, time, heads, dim, dtype)
    route = jnp.asarray(common.random_routes([0.1], time))
    spec = AttentionSpec(window=window, implementation="blockwise")
    ours = ("linear", "local", "portable hard, 10 % full")
    names = {"blockwise full": "full", "linear": "linear", "local": "local"}
    forms = {form: functools.partial(attend, name, spec=spec) for form, name in names.items()}
    forms[ours[-1]] = lambda q, k, v: hard_attention(q, k, v, route, spec=spec)
    if jax.default_backend() == "gpu":
        pallas = dataclasses.replace(spec, kernel="pallas")
        forms["pallas linear"] = functools.partial(attend, "linear", spec=pallas)
        forms["pallas hard, 10 % full"] = lambda q, k, v: hard_attention(q, k, v, route, spec=pallas)
        ours += ("pallas linear", "pallas hard, 10 % full")
    refusal = cudnn_refusal(dtype, dim, time)
    if not refusal:
        forms["cuDNN full"] = functools.partial(attend, "full", spec=AttentionSpec(implementation="cudnn"))
        forms["cuDNN window"] = functools.partial(cudnn_window, window=window)

    sizes = dict(direction=direction, T=time, d=dim, H=heads, w=window)
    seconds = per_call({name: common.timed(form, direction, qkv) for name, form in forms.items()}, rounds)
    pairs = [(side, "cuDNN full") for side in ("blockwise full", *ours)]
    pairs += [("local", "cuDNN window")] + [(side, "blockwise full") for side in ours]
    return [ratio_or_why("", *pair, seconds, refusal, **sizes) for pair in pairs]


def routed_params(spec, params, batch, hypers, share: float):
    """(parameters whose controllers route about `share` of all tokens to full, the mechanisms' shares).

    An untrained controller routes all tokens alike: noise makes them differ, and the bias of full
    attention is then found by bisection, for all layers at once.
    """
    model = spec.model.clone(mode="hard", dispatch="dense")

    def at(bias):
        def moved(path, leaf):
            names = [getattr(entry, "key", None) for entry in path]
            if "controller" not in names or "output" not in names:
                return leaf
            if names[-1] == "bias":
                return leaf.at[..., 0].add(bias)
            return leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)

        return jax.tree_util.tree_map_with_path(moved, params)

    @jax.jit
    def shares(bias):
        route = forward(model, at(bias), batch, hypers.routing).routing.route
        return jnp.stack([jnp.mean((route == k).astype(jnp.float32)) for k in range(3)])

    low, high = -20.0, 20.0
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if float(shares(middle)[0]) < share else (low, middle)
    return jax.jit(at)(high), np.asarray(shares(high))


def train_step_rows(sizes: Mapping[str, int], rounds: int) -> list[Row]:
    """A whole step (loss, gradients, optimizer) on one device, against full attention only.

    bfloat16. The sides: Bayesian soft; Bayesian hard by packed dispatch, its controllers set so
    that about 10 % of the tokens are full; full attention only, by blocks and by cuDNN.
    """
    config = common.sized_config(**sizes)
    config.model.dtype = "bfloat16"
    config.model.implementation = "blockwise"  # Of all sides but the one that is named.
    head = config.model.model_dim // config.model.num_heads
    refusal = cudnn_refusal(jnp.bfloat16, head, config.data.sequence_length)
    dataset = build.build_dataset(config)
    batch = jax.tree.map(jnp.asarray, dataset.train_batch(0))

    def step_of(spec, hypers, state) -> Call:
        return functools.partial(jax.jit(functools.partial(train_step, spec)), state, batch, hypers)

    spec, hypers = build.build_spec(config, dataset), build.build_hypers(config)
    state = init_state(spec, jax.random.key(0), batch, hypers)
    params, shares = routed_params(spec, state.params, batch, hypers, 0.1)
    # Past the gate, where training is packed.
    hardened = state.replace(params=params, step=jnp.int32(spec.schedule.gate.end))
    calls = {
        "Bayesian soft": step_of(spec, hypers, state),
        "Bayesian packed hard": step_of(dataclasses.replace(spec, packed=True), hypers, hardened),
    }
    config.controller.name = "fixed"
    alone, hypers = build.build_spec(config, dataset), build.build_hypers(config)
    state = init_state(alone, jax.random.key(0), batch, hypers)
    calls["full-only"] = step_of(alone, hypers, state)
    if not refusal:
        config.model.implementation = "cudnn"
        fused = build.build_spec(config, dataset)
        calls["full-only by cuDNN"] = step_of(fused, hypers, state)
    seconds = per_call(calls, rounds)
    routes = " / ".join(f"{share:.0%}" for share in shares)

    routed = ("Bayesian soft", "Bayesian packed hard")
    pairs = [(side, "full-only by cuDNN") for side in (*routed, "full-only")]
    pairs += [(side, "full-only") for side in routed] + [routed[::-1]]
    return [
        ratio_or_why("train step, ", side, other, seconds, refusal, **sizes,
                     **({"full / linear / local": routes} if "packed" in side else {}))
        for side, other in pairs
    ]


def decode_rows(sizes: decoding.Sizes, rounds: int) -> list[Row]:
    """Time per token, 10 % of the tokens full, against full attention only; float32."""
    calls, _ = decoding.sides(sizes)
    seconds = {name: s / sizes.steps for name, s in per_call(calls, rounds).items()}
    return [
        ratio(f"decode, hard, {sizes.fraction_full:.0%} full / {side}", seconds, "hard", side,
              context=sizes.context, batch=sizes.batch, D=sizes.model_dim, L=sizes.layers)
        for side in decoding.BASELINES
    ]
