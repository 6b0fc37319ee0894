"""The packed kernel of GPUs, interpreted: the equation in float64, values and gradients, whatever the routes."""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from experiments.benchmarks import kernel_shapes
from experiments.benchmarks import kernels as benchmark
from meta_attention_jax.kernels import gpu, portable, select, worklist
from meta_attention_jax.kernels.gpu import Shape, Tuning
from meta_attention_jax.kernels.worklist import Sizes
from meta_attention_jax.mechanisms import linear, linear_gpu, linear_tpu
from meta_attention_jax.mechanisms.mechanism import Reach
from meta_attention_jax.routing import dispatch
from meta_attention_jax.targets import Target, compiling_for
from meta_attention_jax.training import build
from meta_attention_jax.types import AttentionSpec
from tests import making, oracles
from tests.close import assert_close

H100 = Target("gpu", 9.0)


class Setting(NamedTuple):
    """What one compiled program serves: full attention and a window, by routes and segments that are its inputs."""

    batch: int
    time: int
    heads: int
    kv_heads: int
    dim: int
    window: int
    sinks: int = 0
    causal: bool = True
    softcap: float | None = None
    dtype: str = "float32"
    tuning: Tuning = Tuning(Sizes(16, 16), *[Shape(16, 16, 4, 2)] * 3)


UNEVEN = Tuning(Sizes(32, 64), Shape(16, 32, 4, 2), Shape(32, 16, 4, 2), Shape(16, 32, 4, 2))
SETTINGS = {
    "grouped heads, sinks": Setting(2, 75, 4, 2, 16, 9, sinks=3),
    "softcap, narrow heads": Setting(1, 130, 2, 1, 20, 40, softcap=3.0, tuning=UNEVEN),
    "both directions": Setting(2, 70, 2, 2, 16, 12, sinks=5, causal=False, tuning=UNEVEN),
    "three to a key, short": Setting(2, 64, 3, 1, 16, 64, sinks=1),
    "bfloat16": Setting(1, 90, 2, 2, 32, 20, sinks=2, dtype="bfloat16"),
    "float16": Setting(2, 66, 2, 1, 16, 17, dtype="float16"),
}
SEEDS = range(60)  # Of each setting: 360 cases.
TOLERANCES = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 2e-2}
# The others are compiled by `make slow`.
OFTEN, SELDOM = list(SETTINGS)[:1], list(SETTINGS)[1:]


def work_of(setting: Setting, route, ids):
    reaches = [Reach(), Reach(setting.window, setting.sinks)]
    sizes = [setting.tuning.sizes] * 2
    return worklist.build(route, ids, causal=setting.causal, reaches=reaches, sizes=sizes)


@functools.lru_cache(maxsize=None)
def compiled(setting: Setting, kernel: str):
    """(q, k, v, cotangent of the outputs, of their log-sum-exp, route, ids) -> ((out, dq, dk, dv), log-sum-exp)."""

    @jax.jit
    def run(q, k, v, cotangent, slope, route, ids):
        work = work_of(setting, route, ids)

        def attend(q, k, v):
            if kernel == "pallas":
                return gpu.attend(q, k, v, work, setting.softcap, setting.tuning, True)
            return portable.attend(q, k, v, work, setting.softcap)

        (out, lse), pull = jax.vjp(attend, q, k, v)
        return (out, *pull((cotangent, slope))), lse

    with jax.default_matmul_precision("highest"):
        dtype = setting.dtype
        q = jax.ShapeDtypeStruct((setting.batch, setting.time, setting.heads, setting.dim), dtype)
        k = jax.ShapeDtypeStruct((setting.batch, setting.time, setting.kv_heads, setting.dim), dtype)
        slope = jax.ShapeDtypeStruct((setting.batch, setting.heads, setting.time), jnp.float32)
        route = jax.ShapeDtypeStruct((setting.batch, setting.time), jnp.int32)
        return run.lower(q, k, k, q, slope, route, route).compile()


def drawn(setting: Setting, seed: int):
    """Arguments of `compiled`, the cotangent of the log-sum-exp aside; every sequence with routes and segments of its
    own, corners among them."""
    rng = np.random.default_rng([seed, setting.time])
    batch, time = setting.batch, setting.time
    shape = (batch, time, setting.heads, setting.dim)
    q, cotangent = (jnp.asarray(rng.normal(size=shape) * 1.5, setting.dtype) for _ in range(2))
    shape = (batch, time, setting.kv_heads, setting.dim)
    k, v = (jnp.asarray(rng.normal(size=shape), setting.dtype) for _ in range(2))
    route, ids = np.zeros((2, batch, time), np.int32)
    for row in range(batch):
        weights = rng.dirichlet(np.full(3, 0.5))
        if (corner := rng.integers(6)) < 3:  # One mechanism for the whole sequence, or none.
            weights = np.eye(3)[corner]
        route[row] = rng.choice(3, size=time, p=weights)
        cuts = np.sort(rng.integers(0, time + 1, size=rng.integers(0, 4)))
        ids[row] = 1 + np.searchsorted(cuts, np.arange(time), side="right")
        left, right = rng.integers(0, time // 3, size=2) * rng.integers(0, 2, size=2)
        ids[row, :left] = ids[row, time - right :] = 0
    return q, k, v, cotangent, jnp.asarray(route), jnp.asarray(ids)


def oracle(setting: Setting, case):
    """Float64: the sum over the two mechanisms of their gradients at their own rows."""
    *arrays, route, ids = (np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x) for x in case)
    q, k, v, cotangent = arrays
    expected = [0.0] * 4
    for index, bounds in enumerate(({}, dict(window=setting.window, sinks=setting.sinks))):
        mine = ((route == index) & (ids != 0))[..., None, None]
        softcap = np.inf if setting.softcap is None else setting.softcap
        out, *gradients = oracles.softmax_attention(
            q, k, v, cotangent * mine, ids, causal=setting.causal, softcap=softcap, **bounds
        )
        expected = [total + part for total, part in zip(expected, (out * mine, *gradients), strict=True)]
    return expected


def flat(setting: Setting):
    return jnp.zeros((setting.batch, setting.heads, setting.time), jnp.float32)


interpreted = pytest.mark.skipif(
    jax.config.jax_enable_x64, reason="not run: with x64 the interpreter of Pallas mixes types of indices"
)


@interpreted
@pytest.mark.parametrize("name", [*OFTEN, *making.slow(*SELDOM)])
def test_equals_the_equation(name):
    setting = SETTINGS[name]
    run = compiled(setting, "pallas")
    for seed in SEEDS:
        *arrays, route, ids = case = drawn(setting, seed)
        got, _ = run(*arrays, flat(setting), route, ids)
        assert_close([x.astype(jnp.float32) for x in got], oracle(setting, case), TOLERANCES[setting.dtype],
                     f"seed {seed}: ")


@interpreted
def test_equals_the_portable_kernel_with_a_gradient_of_the_log_sum_exp():
    setting = SETTINGS[OFTEN[0]]
    for seed in range(5):
        *arrays, route, ids = drawn(setting, seed)
        slope = jnp.asarray(np.random.default_rng(seed).normal(size=flat(setting).shape), jnp.float32)
        # At padding and elsewhere there is no log-sum-exp.
        slope = jnp.where(((route < 2) & (ids != 0))[:, None], slope, 0)
        sides = [compiled(setting, kernel)(*arrays, slope, route, ids) for kernel in ("pallas", "portable")]
        assert_close(*sides, 2e-5, f"seed {seed}: ")


@interpreted
def test_the_log_sum_exp_is_that_of_the_logits():
    setting = SETTINGS[OFTEN[0]]
    q, k, v, cotangent, route, ids = drawn(setting, 11)
    for kernel in ("pallas", "portable"):
        _, lse = compiled(setting, kernel)(q, k, v, cotangent, flat(setting), route, ids)
        expected = np.zeros(lse.shape)
        for index, bounds in enumerate(({}, dict(window=setting.window, sinks=setting.sinks))):
            allowed = oracles.allowed_pairs(np.asarray(ids), causal=True, **{"window": None} | bounds)
            mine = np.asarray((route == index) & (ids != 0))
            for b, h in np.ndindex(*expected.shape[:2]):
                z = np.asarray(q[b, :, h], np.float64) @ np.asarray(k[b, :, h // 2], np.float64).T / setting.dim**0.5
                found = np.log(np.where(allowed[b], np.exp(z), 0).sum(1), where=mine[b], out=np.zeros(setting.time))
                expected[b, h] += np.where(mine[b], found, 0)
        assert_close(lse, expected, 2e-5)


@interpreted
def test_nothing_flows_from_later_tokens():
    setting = SETTINGS[OFTEN[0]]
    run = compiled(setting, "pallas")
    q, k, v, cotangent, route, _ = drawn(setting, 7)
    ids, index = jnp.ones_like(route), jnp.arange(setting.time)[None, :, None, None]
    seen = 0.0
    for t in (0, 15, 16, 40, setting.time - 2):
        (_, *gradients), _ = run(q, k, v, jnp.where(index == t, cotangent, 0), flat(setting), route, ids)
        assert all(not np.asarray(x[:, t + 1 :]).any() for x in gradients)
        seen += float(jnp.abs(gradients[2]).max())
    assert seen  # The probe sees what it should.


def hard_routing_by(kernel, attend, monkeypatch):
    """Linear tokens between, a tile larger than the sequence, sizes as on the device: hard routing all the same."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 70, n, 16)), jnp.float32) for n in (2, 1, 1))
    route = jnp.asarray(rng.integers(0, 3, size=(1, 70)), jnp.int32)
    expected, asked = making.hard(q, k, v, route, window=9, sinks=2), []

    def interpreted(*arguments):
        asked.append(arguments)
        return attend(*arguments)

    monkeypatch.setattr(dispatch.select, "packed", lambda *_, **__: kernel._replace(attend=interpreted))
    jax.clear_caches()
    with jax.default_matmul_precision("highest"):
        got = making.hard(q, k, v, route, window=9, sinks=2)
    jax.clear_caches()
    assert asked
    assert_close(got, expected, 2e-5)


@interpreted
def test_hard_routing_by_this_kernel_is_hard_routing(monkeypatch):
    chosen = select.packed("pallas", (1, 70, 2, 16), jnp.float32, H100)
    hard_routing_by(chosen, lambda *arguments: gpu.attend(*arguments, None, True), monkeypatch)


CUT = linear_gpu.Shape(16, 16, 16, 4, 2)
LINEAR = {
    "grouped heads": (Setting(2, 75, 4, 2, 16, 1), 32),
    "one segment": (Setting(1, 100, 2, 2, 16, 1), 32),
    "narrow heads, one chunk": (Setting(2, 60, 3, 1, 20, 1), 64),
    "bfloat16": (Setting(1, 140, 2, 2, 32, 1, dtype="bfloat16"), 64),
}


@functools.lru_cache(maxsize=None)
def compiled_linear(module, setting: Setting, chunk: int, ids_given: bool):
    """(q, k, v, cotangent, ids) -> (out, dq, dk, dv)."""

    @jax.jit
    def run(q, k, v, cotangent, ids):
        cut = linear_gpu.Shapes(chunk, *[CUT] * 6) if module is linear_gpu else chunk
        out, pull = jax.vjp(lambda *x: module.attend(*x, ids if ids_given else None, cut, True), q, k, v)
        return out, *pull(cotangent)

    return run


@interpreted
@pytest.mark.parametrize("module", [linear_gpu, linear_tpu], ids=["gpu", "tpu"])
@pytest.mark.parametrize("name", [*list(LINEAR)[:1], *making.slow(*list(LINEAR)[1:])])
def test_linear_attention_equals_the_equation(name, module):
    setting, chunk = LINEAR[name]
    for seed in SEEDS:
        q, k, v, cotangent, _, ids = drawn(setting, seed)
        v = v + 1  # With a mean: what it adds to the gradients nearly cancels.
        ids = jnp.ones_like(ids) if name == "one segment" else ids
        real = (ids != 0)[..., None, None]
        with jax.default_matmul_precision("highest"):
            got = compiled_linear(module, setting, chunk, name != "one segment")(q, k, v, cotangent, ids)
        q, k, v, cotangent = (np.asarray(x.astype(jnp.float32)) for x in (q, k, v, cotangent * real))
        out, *gradients = oracles.linear_attention(q, k, v, cotangent, np.asarray(ids))
        expected = [out * np.asarray(real), *gradients]
        assert_close([x.astype(jnp.float32) for x in got], expected, TOLERANCES[setting.dtype], f"seed {seed}: ")
        assert not np.asarray(jnp.where(real, 0, got[0])).any()


def test_linear_attention_of_a_gpu_is_asked_for_and_never_silently_another(monkeypatch):
    q, k, v, *_ = drawn(LINEAR["grouped heads"][0], 0)
    with pytest.raises(ValueError, match="kernel: expected for 'pallas' a TPU, or an NVIDIA GPU .* got cpu"):
        linear.attend(q, k, v, spec=AttentionSpec(kernel="pallas"))
    monkeypatch.setattr(linear_gpu, "attend", lambda *_: "by the kernel")
    with compiling_for(*H100):
        assert linear.attend(q, k, v, spec=AttentionSpec(kernel="pallas")) == "by the kernel"
        assert linear.attend(q, k, v, spec=AttentionSpec()).shape == q.shape


@pytest.mark.smoke
def test_the_kernel_is_chosen_by_what_is_asked_for():
    shape = (1, 512, 4, 64)
    for target in (None, H100):
        assert select.packed("auto", shape, jnp.bfloat16, target).name == "portable"
    assert select.packed("pallas", shape, jnp.bfloat16, H100).name == "pallas"
    assert select.packed("pallas", (1, 15, 4, 64), jnp.bfloat16, H100).name == "portable"
    for changed, dtype, target in (
        ((1, 512, 4, 512), jnp.bfloat16, H100), (shape, jnp.float64, H100), (shape, jnp.bfloat16, Target("gpu", 8.0)),
        (shape, jnp.bfloat16, None),
    ):
        with pytest.raises(ValueError, match="kernel: expected for 'pallas' a TPU, or an NVIDIA GPU .* got "):
            select.packed("pallas", changed, dtype, target)
    with pytest.raises(ValueError, match="kernel: expected one of auto, portable, pallas, got 'triton'"):
        select.packed("triton", shape, jnp.bfloat16)


def test_a_list_for_other_sizes_is_refused():
    setting = SETTINGS[OFTEN[0]]
    q, k, v, _, route, ids = drawn(setting, 0)
    with pytest.raises(ValueError, match=r"work: expected a list of sizes \(64, 64\) alone, got .*block=16"):
        gpu.attend(q, k, v, work_of(setting, route, ids), None, None, True)


def lowered(function, *arguments):
    """The program for a GPU, as far as it is made without its compiler."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend")
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def everything(q, k, v, route, ids, *, spec):
    """Hard routing and its gradients, recomputed, in a loop over layers."""

    def layer(x, _):
        return x + dispatch.hard_attention(x, k, v, route, spec=spec, segment_ids=ids), None

    def total(q):
        return jax.lax.scan(jax.checkpoint(layer), q, None, length=2)[0].astype(jnp.float32).sum()

    return jax.value_and_grad(total)(q)


SELDOM_LOWERED = (64, "float16"), (80, "bfloat16"), (256, "bfloat16"), (64, "float32")


@pytest.mark.parametrize("dim, dtype", [(128, "bfloat16"), *making.slow(*SELDOM_LOWERED)])
def test_lowers_to_triton_under_remat_and_scan(dim, dtype):
    q = jax.ShapeDtypeStruct((1, 300, 6, dim), dtype)
    k = jax.ShapeDtypeStruct((1, 300, 2, dim), dtype)
    route = jax.ShapeDtypeStruct((1, 300), jnp.int32)
    with compiling_for(*H100):
        spec = AttentionSpec(window=40, sinks=3, kernel="pallas", softcap=30.0 if dim == 256 else None)
        text = lowered(functools.partial(everything, spec=spec), q, k, k, route, route)
    # Packed: forward, twice for remat, dQ, dK with dV. Linear: three, twice, and five for the gradients.
    assert text.count("@__gpu$xla.gpu.triton(") == (2 + 2) + (6 + 5)


def test_runs_inside_shard_map_with_its_checks():
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    spec = jax.sharding.PartitionSpec("data")
    setting = SETTINGS[OFTEN[0]]
    q, k, v, _, route, ids = drawn(setting, 3)

    def whole(q, k, v, route, ids):
        out, _ = gpu.attend(q, k, v, work_of(setting, route, ids), None, setting.tuning, False)
        return out + linear_gpu.attend(q, k, v, ids)

    parts = jax.shard_map(whole, mesh=mesh, in_specs=spec, out_specs=spec)
    assert "triton" in lowered(parts, q, k, v, route, ids)


@pytest.mark.smoke
def test_a_run_of_a_gpu_opens_elsewhere_and_trains_there_alone():
    config = smoke.get_config()
    config.model.kernel = "pallas"
    assert build.build_attention(config).kernel == "auto"
    with pytest.raises(ValueError, match="^model.kernel: expected for 'pallas' a TPU, or an NVIDIA GPU .* got cpu"):
        build.check(config)
    with compiling_for(*H100):
        assert build.build_attention(config).kernel == "pallas"
    config.model.kernel = "portable"
    assert build.build_attention(config).kernel == "portable"


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_shapes_divide_the_sizes_of_the_list(dim, dtype):
    for time in (16, 100, 4096):
        tuning = gpu.tuning_for(dim, dtype, time)
        for shape in (tuning.forward, tuning.dq, tuning.dkv):
            assert tuning.sizes.block % shape.queries == 0 == tuning.sizes.tile % shape.keys
            assert shape.keys <= time


def test_a_timed_case_is_a_row_and_one_without_time_says_so():
    case = benchmark.Case("10 % full", 64, benchmark.mixed(0.1), "forward", goal=2.0, dim=16)
    ((row,),) = benchmark.rows([case], 1, until=np.inf)
    assert row["speedup"] > 0 and row["kernel"] == "portable" and row["peer"] == "full by blocks"
    assert "goal 2" in benchmark.line([row])
    ((row,),) = benchmark.rows([case], 1, until=0.0)
    assert row["note"] == "not run: out of time" and row["note"] in benchmark.line([row])


def test_pairs_that_are_counted_are_those_that_are_allowed():
    for time, shares in ((300, (0.3, 0.3)), (1300, (0.1, 0.6))):
        route = np.random.default_rng(time).choice(3, size=(1, time), p=(*shares, 1 - sum(shares)))
        pair = functools.partial(oracles.allowed_pairs, np.ones((1, time), int), causal=True)
        local = pair(window=benchmark.WINDOW, sinks=benchmark.SINKS)
        expected = pair(window=None)[route == 0].sum() + local[route == 1].sum()
        assert kernel_shapes.pairs(kernel_shapes.work_of(time, shares)) == expected
        # There the order of the axis is full, linear, local.
        case = benchmark.Case("", time, (shares[0], 1 - sum(shares), shares[1]), "forward")
        drawn = np.asarray(benchmark.routes(case))
        assert benchmark.pairs(case) == pair(window=None)[drawn == 0].sum() + local[drawn == 2].sum()
