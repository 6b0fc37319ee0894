"""The packed kernel of TPUs, interpreted: the equation in float64, values and gradients, whatever the routes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice

from configs import smoke
from meta_attention_jax.kernels import portable, select, tpu, tpu_steps, worklist
from meta_attention_jax.kernels.worklist import Sizes
from meta_attention_jax.mechanisms import linear_tpu
from meta_attention_jax.mechanisms.mechanism import Reach
from meta_attention_jax.mechanisms.mosaic import LANES
from meta_attention_jax.mechanisms.registry import attend
from meta_attention_jax.routing.dispatch import hard_attention
from meta_attention_jax.targets import Target, compiling_for
from meta_attention_jax.training import build
from meta_attention_jax.types import AttentionSpec
from tests import making
from tests.close import assert_close
from tests.test_kernels import (
    SEEDS,
    SETTINGS,
    TOLERANCES,
    drawn,
    everything,
    flat,
    hard_routing_by,
    interpreted,
    oracle,
)

TPU = Target("tpu", 0.0)
# Pallas asks which TPU it is.
V5E = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=AbstractDevice("TPU v5 lite", 1, "tpu"))
# float16 is nothing that a TPU multiplies.
CASES = {name: Sizes(16, 32) for name in SETTINGS if name != "float16"} | {"both directions": Sizes(32, 16)}
OFTEN, SELDOM = list(CASES)[:1], list(CASES)[1:]


@functools.lru_cache(maxsize=None)
def compiled(name):
    """(q, k, v, cotangent of the outputs, of their log-sum-exp, route, ids) -> ((out, dq, dk, dv), log-sum-exp)."""
    setting, size = SETTINGS[name], CASES[name]

    @jax.jit
    def run(q, k, v, cotangent, slope, route, ids):
        reaches = [Reach(), Reach(setting.window, setting.sinks)]
        work = worklist.build(route, ids, causal=setting.causal, reaches=reaches, sizes=[size] * 2)
        (out, lse), pull = jax.vjp(lambda *x: tpu.attend(*x, work, setting.softcap, True), q, k, v)
        return (out, *pull((cotangent, slope))), lse

    return run


@interpreted
@pytest.mark.parametrize("name", [*OFTEN, *making.slow(*SELDOM)])
def test_equals_the_equation(name):
    setting = SETTINGS[name]
    for seed in SEEDS:
        case = drawn(setting, seed)
        q, k, v, cotangent, route, ids = case
        with jax.default_matmul_precision("highest"):
            got, _ = compiled(name)(q, k, v, cotangent, flat(setting), route, ids)
        got = [x.astype(jnp.float32) for x in got]
        expected = oracle(setting, case)
        assert_close(got, [np.float64(x) for x in expected], TOLERANCES[setting.dtype], f"seed {seed}: ")


@interpreted
@pytest.mark.slow
def test_the_log_sum_exp_has_a_gradient_and_is_the_portable_one():
    name = OFTEN[0]
    setting = SETTINGS[name]
    q, k, v, cotangent, route, ids = drawn(setting, 7)
    slope = jnp.asarray(np.random.default_rng(0).normal(size=flat(setting).shape), jnp.float32)
    with jax.default_matmul_precision("highest"):
        got = compiled(name)(q, k, v, cotangent, slope, route, ids)
        reaches = [Reach(), Reach(setting.window, setting.sinks)]
        work = worklist.build(route, ids, causal=True, reaches=reaches, sizes=[Sizes(16, 16)] * 2)
        (out, lse), pull = jax.vjp(lambda *x: portable.attend(*x, work, None), q, k, v)
        expected = (out, *pull((cotangent, slope))), lse
    assert_close(got, expected, 2e-5)


def test_the_kernel_of_a_tpu_is_asked_for():
    shape = (1, 512, 4, 64)
    assert select.packed("auto", shape, jnp.bfloat16, TPU).name == "portable"
    chosen = select.packed("pallas", shape, jnp.bfloat16, TPU)
    assert chosen.name == "pallas" and chosen.attend is tpu.attend
    assert chosen.sizes(512, [Reach(), Reach(8)]) == [Sizes(256, 256)] * 2
    assert chosen.sizes(8192, [Reach(), Reach(1024)]) == [Sizes(512, 1024)] * 2
    assert chosen.sizes(8192, [Reach(), Reach(300)]) == [Sizes(512, 512)] * 2
    for changed, dtype in (((1, 512, 4, 512), jnp.bfloat16), (shape, jnp.float16)):
        expected = "kernel: expected bfloat16 or float32 and a head dim of at most 256 .* got "
        with pytest.raises(ValueError, match=expected):
            select.packed("pallas", changed, dtype, TPU)
    config = smoke.get_config()
    config.model.kernel = "pallas"
    with compiling_for(*TPU):
        assert build.build_attention(config).kernel == "pallas"


@pytest.mark.parametrize("dim", [16, 128, 256])
def test_sizes_are_whole_lanes_and_no_more_than_there_is(dim):
    for time in (3, 128, 300, 5000, 2**17):
        for reaches in ((), (Reach(), Reach(50)), (Reach(4096),)):
            block, tile = tpu.sizes_for(dim, time, reaches)
            assert block % LANES == tile % LANES == 0 and max(block, tile) <= max(LANES, 2 * time)
            assert tile <= tpu.KEYS and block <= 512


def test_lists_that_the_memory_of_scalars_does_not_hold_are_refused():
    def steps(batch, time):
        route = jax.ShapeDtypeStruct((batch, time), jnp.int32)
        reaches = [Reach(), Reach(9)]
        sizes = [tpu.sizes_for(128, time, reaches)] * 2
        jax.eval_shape(lambda route: tpu_steps.by_tile(worklist.build(
            route, None, causal=True, reaches=reaches, sizes=sizes
        )), route)

    steps(8, 2**15)
    steps(1, 2**17)
    expected = "^kernel: expected lists of at most 1,000,000 bytes for 'pallas' on a TPU.* got "
    with pytest.raises(ValueError, match=expected):
        steps(8, 2**17)


def test_more_tiles_than_a_step_can_name_are_refused():
    route = jax.ShapeDtypeStruct((1, 2**17), jnp.int32)
    with pytest.raises(ValueError, match="^time: expected at most 8192 tiles of keys, got 16384"):
        jax.eval_shape(lambda route: tpu_steps.by_block(worklist.build(
            route, None, causal=True, reaches=[Reach()], sizes=[Sizes(1024, 8)]
        )), route)


@pytest.mark.parametrize("dim, dtype", [(64, "bfloat16"), *making.slow((128, "float32"))])
def test_lowers_for_a_tpu_under_remat_and_scan(dim, dtype):
    q = jax.ShapeDtypeStruct((1, 300, 6, dim), dtype)
    k = jax.ShapeDtypeStruct((1, 300, 2, dim), dtype)
    route = jax.ShapeDtypeStruct((1, 300), jnp.int32)
    with compiling_for(*TPU):
        spec = AttentionSpec(window=40, sinks=3, kernel="pallas")
        run = functools.partial(everything, spec=spec)
        with jax.sharding.use_abstract_mesh(V5E):
            text = jax.jit(run).trace(q, k, k, route, route).lower(lowering_platforms=("tpu",)).as_text()
    # Packed: forward, twice for remat, dQ, dK with dV. Linear: the same, once forward, since nothing of it is saved.
    assert text.count("@tpu_custom_call(") == 4 + 3


@pytest.mark.parametrize("rows", [4, 3])
def test_rows_on_a_mesh_are_split_or_whole_on_every_device(rows):
    """A mesh whose axes are auto would have the compiler split kernels, which it cannot."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "model"), auto, abstract_device=V5E.abstract_device)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def abstract(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct((rows, 300, *shape), dtype, sharding=whole)

    q, k, route = abstract(6, 128), abstract(2, 128), abstract(dtype=jnp.int32)

    def loss(q, k, v, route):
        spec = AttentionSpec(window=40, kernel="pallas")
        packed = hard_attention(q, k, v, route, mechanisms=("full", "local"), spec=spec)
        return (packed + attend("linear", q, k, v, spec=spec)).astype(jnp.float32).sum()

    with compiling_for(*TPU), jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(jax.grad(loss)).trace(q, k, k, route).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call(") == 3 + 2
    assert (f"<{rows // 4}x300x6x128xbf16>" in text) == (rows % 4 == 0)


@interpreted
def test_hard_routing_by_this_kernel_is_hard_routing(monkeypatch):
    chosen = select.packed("pallas", (1, 70, 2, 16), jnp.float32, TPU)
    hard_routing_by(chosen, lambda *arguments: tpu.attend(*arguments, True), monkeypatch)


def test_runs_inside_shard_map_with_its_checks():
    spec = jax.sharding.PartitionSpec("data")
    setting = SETTINGS[OFTEN[0]]
    q, k, v, _, route, ids = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in drawn(setting, 3))

    def whole(q, k, v, route, ids):
        reaches, sizes = [Reach(), Reach(setting.window, setting.sinks)], [Sizes(128, 128)] * 2
        work = worklist.build(route, ids, causal=True, reaches=reaches, sizes=sizes)
        def out(qkv):
            return tpu.attend(*qkv, work)[0].sum() + linear_tpu.attend(*qkv, ids).sum()

        return jax.grad(out)((q, k, v))

    parts = jax.shard_map(whole, mesh=V5E, in_specs=spec, out_specs=spec)
    with jax.sharding.use_abstract_mesh(V5E):
        text = jax.jit(parts).trace(q, k, v, route, ids).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call(") == 3 + 2  # Linear attention needs no outputs for its gradients.


@interpreted
@pytest.mark.slow
# All on full attention, at the sizes of a narrow window and at the largest; none is packed.
@pytest.mark.parametrize("route, reaches", [(0, [Reach(40)]), (0, []), (2, [Reach(40)])])
def test_at_sizes_of_a_tpu_and_where_there_is_nothing_to_do(route, reaches):
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=(2, 700, n, 16)), jnp.float32) for n in (2, 1, 1, 2))
    routes = jnp.full((2, 700), route, jnp.int32)
    found = []
    for module, sizes in ((tpu, tpu.sizes_for(16, 700, reaches)), (portable, Sizes(64, 64))):
        work = worklist.build(routes, None, causal=True, reaches=[Reach(), Reach(40)], sizes=[sizes] * 2)
        with jax.default_matmul_precision("highest"):
            extra = (None, True) if module is tpu else (None,)
            out, pull = jax.vjp(lambda *x: module.attend(*x, work, *extra)[0], q, k, v)  # noqa: B023
            found.append((out, *pull(cotangent)))
    assert sizes.block < 700
    if route == 2:
        assert not any(np.asarray(x).any() for x in found[0])
    else:
        assert_close(found[0], found[1], 2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", *making.slow("float32")])
def test_a_precision_that_is_asked_for_is_one_that_the_units_know(dtype):
    q = jax.ShapeDtypeStruct((1, 300, 2, 64), dtype)
    route = jax.ShapeDtypeStruct((1, 300), jnp.int32)

    def run(q, route):
        sizes = [tpu.sizes_for(64, 300)] * 2
        work = worklist.build(route, None, causal=True, reaches=[Reach(), Reach(9)], sizes=sizes)
        return tpu.attend(q, q, q, work)[0]

    for precision in ("highest", "high"):
        with jax.default_matmul_precision(precision), jax.sharding.use_abstract_mesh(V5E):
            text = jax.jit(run).trace(q, route).lower(lowering_platforms=("tpu",)).as_text()
        assert "@tpu_custom_call(" in text


@pytest.mark.parametrize("group, dim, dtype", [(1, 64, "bfloat16"), (4, 256, "bfloat16"), (16, 128, "float32")])
def test_chunks_of_linear_attention_are_whole_lanes_and_fit(group, dim, dtype):
    chunk = linear_tpu.chunk_for(group, dim, dtype)
    assert LANES <= chunk <= linear_tpu.CHUNK and chunk & (chunk - 1) == 0
    assert chunk == LANES or chunk * group * dim * jnp.dtype(dtype).itemsize <= linear_tpu.STEP
    shape = (1, 4096, group, dim)
    assert linear_tpu.serves("pallas", shape, 1, dtype, TPU) and not linear_tpu.serves("auto", shape, 1, dtype, TPU)
    many = (1, 4096, 71, dim)
    assert not linear_tpu.serves("pallas", many, 1, dtype, TPU) and linear_tpu.serves("pallas", many, 71, dtype, TPU)
