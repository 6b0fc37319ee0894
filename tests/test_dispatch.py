"""Packed hard dispatch: equal to computing all and selecting, whatever the routes; as sparse as they are."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_attention_jax.kernels import portable, worklist
from meta_attention_jax.mechanisms import registry
from meta_attention_jax.mechanisms.mechanism import Mechanism, Reach
from meta_attention_jax.mechanisms.registry import get_mechanism, register_mechanism
from meta_attention_jax.routing import dispatch
from meta_attention_jax.types import MECHANISMS
from tests import making, oracles
from tests.close import assert_close, distance

TOLERANCE = 2e-5
FULL, LINEAR, LOCAL = range(3)
DIM = 8

# batch, time, heads, kv_heads, window, causal: T below and off the multiples of every block.
SHAPES = {
    "grouped heads": (2, 140, 4, 2, 24, True),
    "one key head": (2, 131, 3, 1, 70, True),
    "short": (4, 37, 2, 2, 5, True),
    "both directions": (2, 140, 2, 1, 33, False),
}
SEEDS = range(52)  # of each shape: 208 cases


@pytest.fixture(autouse=True)
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


def select_after(q, k, v, route, *, ids, causal, window):
    """The definition: all mechanisms on all tokens, then the chosen one."""
    outs = [
        making.attended(name, q, k, v, segment_ids=ids, causal=causal, window=window,
                    implementation="xla")
        for name in MECHANISMS
    ]
    chosen = jnp.take_along_axis(jnp.stack(outs), route[None, ..., None, None], axis=0)
    return chosen[0]


@functools.lru_cache(maxsize=None)
def compiled(shape, which):
    """(q, k, v, cotangent, route, segment_ids) -> (out, dq, dk, dv)."""
    *_, window, causal = SHAPES[shape]

    @jax.jit
    def run(q, k, v, cotangent, route, ids):
        def function(q, k, v):
            if which == "select":
                return select_after(q, k, v, route, ids=ids, causal=causal, window=window)
            return making.hard(
                q, k, v, route, segment_ids=ids, causal=causal, window=window
            )

        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(cotangent)

    return run


def random_case(shape, seed):
    """q, k, v, cotangent, route, segment ids; every sequence with fractions and segments of its own."""
    batch, time, heads, kv_heads, *_ = SHAPES[shape]
    rng = np.random.default_rng([seed, time])
    q, cotangent = rng.normal(size=(2, batch, time, heads, DIM)) * 1.5
    k, v = rng.normal(size=(2, batch, time, kv_heads, DIM))
    route = np.zeros((batch, time), np.int32)
    ids = np.zeros((batch, time), np.int32)
    for row in range(batch):
        weights = rng.dirichlet(np.full(3, 0.5))
        corner = rng.integers(6)
        if corner < 3:  # One mechanism for the whole sequence, or none of one.
            weights = np.eye(3)[corner]
        elif corner == 3:
            weights[rng.integers(3)] = 0.0
            weights /= weights.sum()
        route[row] = rng.choice(3, size=time, p=weights)
        cuts = np.sort(rng.integers(0, time + 1, size=rng.integers(0, 4)))
        ids[row] = 1 + np.searchsorted(cuts, np.arange(time), side="right")
        left, right = rng.integers(0, time // 3, size=2) * rng.integers(0, 2, size=2)
        ids[row, :left] = 0
        ids[row, time - right :] = 0
    floats = [jnp.asarray(x, jnp.float32) for x in (q, k, v, cotangent)]
    return *floats, jnp.asarray(route), jnp.asarray(ids)


def oracle(case, *, causal, window):
    """Float64, from the equations: the sum over mechanisms of their gradients at their own rows."""
    q, k, v, cotangent, route, ids = map(np.asarray, case)
    expected = [0.0, 0.0, 0.0, 0.0]
    for index in range(3):
        mine = (route == index)[..., None, None]
        arguments = q, k, v, cotangent * mine, ids
        if index == LINEAR:
            out, *gradients = oracles.linear_attention(*arguments, causal=causal)
        else:
            out, *gradients = oracles.softmax_attention(
                *arguments, causal=causal, window=window if index == LOCAL else None
            )
        parts = out * mine, *gradients
        expected = [total + part for total, part in zip(expected, parts, strict=True)]
    return expected


@pytest.mark.parametrize("shape", ["grouped heads", "both directions", *making.slow("one key head", "short")])
def test_equals_compute_all_and_select(shape):
    """Values and gradients of q, k, v."""
    packed_form, dense_form = compiled(shape, "packed"), compiled(shape, "select")
    for seed in SEEDS:
        case = random_case(shape, seed)
        assert_close(packed_form(*case), dense_form(*case), TOLERANCE, f"seed {seed}: ")


@pytest.mark.parametrize(
    "time, window, long_time",
    [(1, 1, 8192), (128, 2**31 - 1, 8192), (129, 130, 8192), *making.slow((64, 1, 8192), (256, 256, 1)), (300, 9, 1)],
)
def test_edges_of_blocks_and_windows_without_segments(monkeypatch, time, window, long_time):
    monkeypatch.setattr(portable, "LONG_TIME", long_time)
    keys = jax.random.split(jax.random.key(time), 4)
    q, k, v, cotangent = (jax.random.normal(key, (1, time, 2, DIM)) for key in keys)
    route = jax.random.randint(jax.random.key(1), (1, time), 0, 3)

    @jax.jit
    def pulled(q, k, v):
        out, pull = jax.vjp(lambda *x: making.hard(*x, route, window=window), q, k, v)
        return out, *pull(cotangent)

    got = pulled(q, k, v)
    expected = oracle((q, k, v, cotangent, route, np.ones((1, time), int)), causal=True, window=window)
    if time == 1:  # As one vector: linear's dq and dk are 0 but for rounding, on both sides.
        got, expected = (np.concatenate([np.ravel(x) for x in tree]) for tree in (got, expected))
    assert_close(got, expected, TOLERANCE)


def test_nothing_of_what_a_token_may_not_see_is_multiplied():
    """Huge values of the first segment would make infinities of the second's tokens, were they to meet
    them with any weight but 0."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 100, 2, DIM)) for key in keys)
    ids = jnp.where(jnp.arange(100) < 50, 1, 2)[None]
    v = jnp.where(ids[..., None, None] == 1, 1e38, v)
    for index in (0, LOCAL):
        out = making.hard(
            q, k, v, jnp.full((1, 100), index), segment_ids=ids, window=9
        )
        assert np.all(np.isfinite(out[:, 50:]))


def test_padding_makes_no_mechanism_run(monkeypatch):
    """Whatever the controller says of padding. Here the other mechanism would answer NaN."""
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    loud = dataclasses.replace(
        get_mechanism("linear"), attend=lambda q, k, v, **_: jnp.full_like(q, jnp.nan)
    )
    register_mechanism("loud", loud)
    q = jax.random.normal(jax.random.key(0), (2, 20, 2, DIM))
    ids = jnp.asarray(np.arange(20) < 15, jnp.int32)[None].repeat(2, 0)
    run = functools.partial(
        making.hard, q, q, q, mechanisms=("full", "loud"), segment_ids=ids
    )
    assert np.all(np.isfinite(run(1 - ids)))
    assert not np.all(np.isfinite(run(ids)))


def test_runs_inside_shard_map_with_its_checks():
    """The loops' carries must vary over the mesh as the data do."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    spec = jax.sharding.PartitionSpec("data")
    case = random_case("short", 3)

    def whole(q, k, v, route, ids):
        return making.hard(q, k, v, route, segment_ids=ids, window=SHAPES["short"][4])

    parts = jax.shard_map(whole, mesh=mesh, in_specs=spec, out_specs=spec)

    @jax.jit
    def run(q, k, v, cotangent, route, ids):
        out, pull = jax.vjp(lambda *x: parts(*x, route, ids), q, k, v)
        return out, *pull(cotangent)

    assert_close(run(*case), compiled("short", "packed")(*case))


def test_compiles_once_where_the_caller_does_not_compile(monkeypatch):
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    traced = []

    def attend(q, k, v, **named):
        traced.append(q.shape)
        return linear.attend(q, k, v, **named)

    linear = get_mechanism("linear")
    register_mechanism("counted", dataclasses.replace(linear, attend=attend))
    q = jax.random.normal(jax.random.key(0), (1, 33, 2, DIM))
    for index in range(3):
        making.hard(q, q, q, jnp.full((1, 33), index % 2), mechanisms=("full", "counted"), window=3)
        assert traced == [q.shape]


@pytest.mark.parametrize("shape", ["both directions", *making.slow("grouped heads")])
def test_sinks_are_seen_besides_the_window(shape):
    """The first tokens of every segment: packed, dense and the oracle, values and gradients."""
    *_, window, causal = SHAPES[shape]
    q, k, v, cotangent, route, ids = random_case(shape, 2)
    spec = dict(causal=causal, window=window, sinks=3, segment_ids=ids)
    cotangent = np.asarray(cotangent)

    def pulled(function):
        @jax.jit
        def run(route, q, k, v):
            out, pull = jax.vjp(lambda *x: function(*x, route), q, k, v)
            return out, *pull(jnp.asarray(cotangent))

        return lambda route: run(jnp.asarray(route, jnp.int32), q, k, v)

    def softmax(rows=np.float32(1), **reach):
        return oracles.softmax_attention(q, k, v, cotangent * rows, np.asarray(ids), causal=causal, **reach)

    packed = pulled(functools.partial(making.hard, mechanisms=("full", "local"), **spec))
    every, some = np.ones(route.shape), np.random.default_rng(0).integers(2, size=route.shape)
    expected = softmax(window=window, sinks=3)
    assert_close(packed(every), expected, TOLERANCE)
    assert_close(pulled(lambda q, k, v, route: making.attended("local", q, k, v, **spec))(every), expected, TOLERANCE)
    assert distance(softmax(window=window)[0], expected[0]) > 0.01
    # Beside queries of full attention, in the same list.
    local = np.float32(some)[..., None, None]
    (full, *theirs), (alone, *ours) = softmax(1 - local), softmax(local, window=window, sinks=3)
    mixed = full * (1 - local) + alone * local, *(a + b for a, b in zip(theirs, ours))
    assert_close(packed(some), mixed, TOLERANCE)


@pytest.mark.parametrize("name", ["full", "local"])
def test_logits_are_capped(name):
    """c tanh(z / c): every form and the oracle, values and gradients."""
    q, k, v, cotangent, route, ids = random_case("short", 2)
    spec = dict(window=5, sinks=2, softcap=0.7, segment_ids=ids)
    names = "full", "local"
    forms = [lambda *x: making.hard(*x, jnp.full_like(route, names.index(name)), mechanisms=names, **spec)]
    for implementation in ("xla", "blockwise"):
        forms.append(functools.partial(making.attended, name, implementation=implementation, **spec))

    @jax.jit
    def pulled(q, k, v):
        pairs = [jax.vjp(form, q, k, v) for form in forms]
        return [(out, *pull(cotangent)) for out, pull in pairs]

    reach = dict(window=5, sinks=2) if name == "local" else {}
    softmax = functools.partial(oracles.softmax_attention, q, k, v, cotangent, np.asarray(ids), **reach)
    expected = softmax(softcap=0.7)
    assert distance(softmax()[0], expected[0]) > 0.05
    for got in pulled(q, k, v):
        assert_close(got, expected, TOLERANCE)


def test_sinks_ahead_of_a_window_are_seen_too():
    """In both directions: a query at the start of a segment has sinks ahead of its window."""
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 128, 2, DIM)).astype(np.float32)
    ids = np.where(np.arange(128) < 60, 1, 2)[None]
    names = "full", "local"
    route = jnp.asarray(np.arange(128) == 60, jnp.int32)[None]
    spec = dict(causal=False, window=2, sinks=8)
    got = making.hard(
        *map(jnp.asarray, (q, k, v)), route, mechanisms=names, segment_ids=jnp.asarray(ids), **spec
    )
    expected, *_ = oracles.softmax_attention(q, k, v, q, ids, **spec)
    assert_close(got[:, 60], expected[:, 60], TOLERANCE)


def test_the_log_sum_exp_merges_two_softmaxes_into_one():
    """Keys cut in two, attended to apart: values and gradients are those of all keys."""
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=(1, 60, 2, DIM)), jnp.float32) for _ in range(4))
    ones = jnp.zeros((1, 60), jnp.int32)

    def part(q, k, v, low, high):
        """Of all queries over the keys in [low, high), as a segment of their own."""
        size = [worklist.Sizes(8, 16)]
        work = worklist.build(ones, None, causal=False, reaches=[Reach()], sizes=size)
        keep = high - low
        moved = [jnp.concatenate([x[:, low:high], x[:, low:high]], 1)[:, :60] for x in (k, v)]
        work = work.replace(
            first=jnp.zeros_like(work.first), last=jnp.full_like(work.last, keep - 1),
            blocks=(work.blocks[0]._replace(
                high=work.blocks[0].low + -(-keep // 16), whole=work.blocks[0].low,
                whole_end=work.blocks[0].low),),
        )
        out, lse = portable.packed(q, *moved, work)
        return out[:, :60], lse[:, :60]

    def merged(q, k, v):
        (a, la), (b, lb) = part(q, k, v, 0, 35), part(q, k, v, 35, 60)
        total = jnp.logaddexp(la, lb)
        return a * jnp.exp(la - total)[..., None] + b * jnp.exp(lb - total)[..., None]

    @jax.jit
    def pulled(q, k, v):
        out, pull = jax.vjp(merged, q, k, v)
        return out, *pull(cotangent)

    expected = oracles.softmax_attention(q, k, v, cotangent, np.ones((1, 60), int), causal=False)
    assert_close(pulled(q, k, v), expected, TOLERANCE)


@pytest.mark.parametrize("shape", ["grouped heads", "both directions"])
def test_equals_the_oracle(shape):
    *_, window, causal = SHAPES[shape]
    for seed in range(4):
        case = random_case(shape, seed)
        expected = oracle(case, causal=causal, window=window)
        assert_close(compiled(shape, "packed")(*case), expected, TOLERANCE)


@pytest.mark.smoke
@pytest.mark.parametrize("index", range(3))
def test_one_route_for_all_is_that_mechanism(index):
    q, k, v, cotangent, route, ids = random_case("short", 0)
    route = jnp.full_like(route, index)
    got = compiled("short", "packed")(q, k, v, cotangent, route, ids)
    window = SHAPES["short"][4]
    expected, pull = jax.vjp(
        lambda q, k, v: making.attended(MECHANISMS[index], q, k, v, segment_ids=ids, window=window),
        q, k, v,
    )
    assert_close(got, (expected, *pull(cotangent)), TOLERANCE)


def test_nothing_flows_from_later_tokens():
    """Gradients are exactly 0 and values unchanged, also where the routes of later tokens change."""
    q, k, v, cotangent, route, _ = random_case("grouped heads", 3)
    route = jnp.asarray(np.random.default_rng(0).integers(0, 3, size=route.shape), jnp.int32)
    ids = jnp.ones_like(route)
    t = 101
    run = compiled("grouped heads", "packed")
    early = cotangent.at[:, t:].set(0.0)
    out, *gradients = run(q, k, v, early, route, ids)
    for gradient in gradients:
        assert float(jnp.abs(gradient[:, t:]).max()) == 0.0
        assert float(jnp.abs(gradient[:, :t]).max()) > 0.0
    changed = [x.at[:, t:].add(1.0) for x in (q, k, v)]
    other, *_ = run(*changed, early, route.at[:, t:].set((route[:, t:] + 1) % 3), ids)
    # Of one program, but other tokens share a block with these.
    assert_close(other[:, :t], out[:, :t], 1e-6)


def test_rotated_queries_and_keys_go_to_full_and_local_alone():
    q, k, v, cotangent, route, ids = random_case("short", 5)
    turned = -q, k * 2.0
    out = making.hard(q, k, v, route, rotated=turned, segment_ids=ids, window=5)
    rest = v, cotangent, route, ids
    plain, rotated = (
        oracle((*queries_and_keys, *rest), causal=True, window=5)[0]
        for queries_and_keys in ((q, k), turned)
    )
    expected = jnp.where((route == LINEAR)[..., None, None], plain, rotated)
    assert_close(out, expected, TOLERANCE)


def test_a_custom_mechanism_without_a_packed_form_runs_dense_and_is_selected():
    def attend(q, k, v, *, spec, segment_ids):
        valid = 1.0 if segment_ids is None else (segment_ids != 0).astype(q.dtype)[..., None, None]
        return q * 3.0 * valid

    try:
        register_mechanism("tripled", Mechanism(attend, lambda *a, **k: 1.0))
    except ValueError:
        pass  # Registered by an earlier test of this process.
    q, k, v, _, route, ids = random_case("short", 7)
    names = ("local", "tripled", "linear")
    out = making.hard(q, k, v, route, mechanisms=names, segment_ids=ids, window=5)
    all_three = jnp.stack(
        [making.attended(name, q, k, v, segment_ids=ids, window=5) for name in names]
    )
    expected = jnp.take_along_axis(all_three, route[None, ..., None, None], axis=0)[0]
    assert_close(out, expected, TOLERANCE)


def test_bfloat16_stays_bfloat16():
    q, k, v, cotangent, route, ids = random_case("grouped heads", 9)
    case = [x.astype(jnp.bfloat16) for x in (q, k, v, cotangent)]
    got = compiled("grouped heads", "packed")(*case, route, ids)
    expected = compiled("grouped heads", "select")(q, k, v, cotangent, route, ids)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    assert_close(got, expected, 3e-2)  # A unit in the last place is 2^-8 = 4e-3.


@pytest.mark.slow
def test_memory_is_linear_in_time():
    def peak(time):
        x = jax.ShapeDtypeStruct((1, time, 1, 8), jnp.float32)
        route = jax.ShapeDtypeStruct((1, time), jnp.int32)

        def loss(q, k, v, route):
            return jnp.sum(jnp.square(making.hard(q, k, v, route, window=64)))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, route).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(16384) <= 4.4 * peak(4096)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
    x = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.float32)
    route = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def gradient(q, k, v, route):
        def loss(q, k, v):
            return jnp.sum(making.hard(q, k, v, route, window=64))

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    exported = jax.export.export(jax.jit(gradient), platforms=[platform])(x, x, x, route)
    assert exported.platforms == (platform,)


def test_bad_input_is_one_sentence():
    q, k, v, _, route, ids = random_case("short", 1)
    message = r"route: expected integers of shape \(4, 37\), got int32 of shape \(4, 36\)\."
    with pytest.raises(ValueError, match=message):
        making.hard(q, k, v, route[:, :-1], window=5)
    with pytest.raises(ValueError, match="window: expected a positive integer"):
        making.hard(q, k, v, route)
    for fields, sentence in (
        (dict(route=route.astype(jnp.float32)), "route: expected integers"),
        (dict(route=route + 1), r"route: expected indices in \[0, 3\), got"),
        (dict(implementation="fast"), "implementation: expected one of"),
        (dict(sinks=0.5), "sinks: expected an integer, got 0.5"),
        (dict(mechanisms=()), "mechanisms: expected distinct names"),
        (dict(mechanisms=("full", "full")), "mechanisms: expected distinct names"),
    ):
        with pytest.raises(ValueError, match=sentence) as error:
            making.hard(q, k, v, **{"route": route, "window": 5, **fields})
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="dispatch: expected one of .* got 'sparse'"):
        dispatch.resolve_dispatch("sparse", time=8)


@pytest.fixture(scope="module")
def layer_case():
    """Inputs and parameters away from the initial controller's, which routes all tokens alike."""
    x = jax.random.normal(jax.random.key(0), (3, 50, 32), jnp.float32)
    params = making.initial(making.layer(**LAYER), x)["params"]
    output = params["controller"]["mlp"]["output"]
    output["kernel"] += jax.random.normal(jax.random.key(2), output["kernel"].shape, jnp.float32)
    return params, x


LAYER = dict(num_heads=4, num_kv_heads=2, window=9, rotary=True, mode="hard")


def layer_outputs(layer_case, dispatch_name, **call):
    layer = making.layer(**LAYER, dispatch=dispatch_name)
    ids = jnp.asarray(np.repeat([[0] * 5 + [1] * 20 + [2] * 25], 3, axis=0), jnp.int32)

    def loss(params, x):
        out, routing, _ = layer.apply(
            {"params": params}, x, segment_ids=ids, method="routed", **call
        )
        return jnp.sum(out**2), (out, routing.route)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, aux), gradients = run(*layer_case)
    return aux, gradients


@pytest.mark.parametrize("forced", [True, *making.slow(False)])
def test_the_layer_is_the_same_with_either_dispatch(layer_case, forced):
    call = {}
    if forced:
        call["route"] = jnp.asarray(np.random.default_rng(1).integers(0, 3, (3, 50)), jnp.int32)
    (out, route), gradients = layer_outputs(layer_case, "packed", **call)
    (dense_out, dense_route), dense_gradients = layer_outputs(layer_case, "dense", **call)
    assert len(np.unique(np.asarray(route))) == 3
    np.testing.assert_array_equal(route, dense_route)
    assert_close((out, gradients), (dense_out, dense_gradients), TOLERANCE)
