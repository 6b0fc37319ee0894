"""Full, linear and local attention: values, gradients, causality, padding, memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_attention_jax.mechanisms import full, linear, local
from meta_attention_jax.mechanisms.blocks import rotate
from meta_attention_jax.targets import Target
from meta_attention_jax.types import AttentionSpec, Rope
from tests import making, oracles
from tests.close import assert_close

TOLERANCE = 2e-5
LONG = 331  # prime: no multiple of any block
BATCH, HEADS, KV_HEADS, DIM = 3, 4, 2, 8
SQUARE, BLOCKWISE, LINEAR, LOCAL, SUNK = "square", "blockwise", "linear", "local", "local with sinks"
FORMS = (SQUARE, BLOCKWISE, LINEAR, LOCAL)
SINKS = 3


@pytest.fixture(autouse=True)
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


def function(form, *, causal=True, window=None):
    """attend(q, k, v, segment_ids) of one form."""
    attend = {LOCAL: local.attend, SUNK: local.attend, LINEAR: linear.attend}.get(form, full.attend)
    implementation, sinks = "xla" if form == SQUARE else "blockwise", SINKS if form == SUNK else 0
    spec = AttentionSpec(causal=causal, window=window, implementation=implementation, sinks=sinks)
    return lambda q, k, v, ids: attend(q, k, v, spec=spec, segment_ids=ids)


@functools.lru_cache(maxsize=None)
def compiled(form, causal, window):
    """(q, k, v, cotangent, segment_ids) -> (out, dq, dk, dv); jitted once for all tests."""

    @jax.jit
    def run(q, k, v, cotangent, ids):
        out, pull = jax.vjp(lambda *x: function(form, causal=causal, window=window)(*x, ids), q, k, v)
        return out, *pull(cotangent)

    return run


def oracle(form, causal, window, *arguments):
    if form == LINEAR:
        return oracles.linear_attention(*arguments, causal=causal)
    return oracles.softmax_attention(
        *arguments, causal=causal, window=window if form in (LOCAL, SUNK) else None, sinks=SINKS if form == SUNK else 0
    )


def inputs(time, seed=0):
    """q, k, v and a cotangent; keys apart from zero mean so that the softmax is not flat."""
    rng = np.random.default_rng(seed)
    shape = (BATCH, time, HEADS, DIM)
    q, cotangent = rng.normal(size=shape) * 2, rng.normal(size=shape)
    k, v = rng.normal(size=(2, BATCH, time, KV_HEADS, DIM))
    return [np.float32(x) for x in (q, k, v, cotangent)]


def ragged_segments(time):
    """Row 0: right padding; row 1: left padding and two segments; row 2: three segments."""
    ids = np.zeros((BATCH, time), np.int32)
    ids[0, : time - time // 5] = 1
    ids[1, time // 3 :] = 4
    ids[1, time // 2 :] = 2
    ids[2] = 1 + (np.arange(time) * 3) // time
    return ids



@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("time", [LONG, pytest.param(7, marks=pytest.mark.smoke)])
def test_values_and_gradients_match_the_oracle(form, time, causal):
    """Several segments, padding on either side, grouped heads."""
    window = 70 if time == LONG else 3
    ids = ragged_segments(time)
    q, k, v, cotangent = inputs(time)
    got = compiled(form, causal, window)(q, k, v, cotangent, jnp.asarray(ids))
    assert_close(got, oracle(form, causal, window, q, k, v, cotangent, ids), TOLERANCE)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", [BLOCKWISE, LINEAR, LOCAL])
def test_without_segment_ids_there_is_one_segment(form, causal):
    q, k, v, cotangent = inputs(LONG, seed=1)
    got = compiled(form, causal, 70)(q, k, v, cotangent, None)
    ids = np.ones((BATCH, LONG), np.int32)
    assert_close(got, oracle(form, causal, 70, q, k, v, cotangent, ids), TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
def test_one_token_returns_its_value(form):
    q, k, v, cotangent = inputs(1)
    ids = np.ones((BATCH, 1), np.int32)
    got = compiled(form, True, 5)(q, k, v, cotangent, jnp.asarray(ids))
    # As one vector: over one key dq and dk are the rounding of terms that cancel, or 1e-6 of one.
    whole = lambda parts: np.concatenate([np.ravel(x) for x in parts])  # noqa: E731
    assert_close(whole(got), whole(oracle(form, True, 5, q, k, v, cotangent, ids)), 3e-6)
    assert_close(got[0], np.repeat(v, HEADS // KV_HEADS, axis=2))


@pytest.mark.parametrize("window", [LONG, 10 * LONG])
def test_a_window_of_the_whole_sequence_is_full_attention(window):
    arguments = *inputs(LONG, seed=2), jnp.asarray(ragged_segments(LONG))
    got = compiled(LOCAL, True, window)(*arguments)
    assert_close(got, compiled(SQUARE, True, 70)(*arguments), TOLERANCE)


def test_a_window_and_sinks_that_reach_every_token_are_full_attention():
    time = 90
    arguments = *inputs(time, seed=2), ragged_segments(time)
    expected = oracle(SQUARE, True, None, *arguments)
    *arrays, cotangent, ids = map(jnp.asarray, arguments)

    @jax.jit
    def run(*arrays):
        spec = dict(window=time - 30, sinks=30, segment_ids=ids)
        out, pull = jax.vjp(lambda *x: making.attended("local", *x, **spec), *arrays)
        return out, *pull(cotangent)

    assert_close(run(*arrays), expected, TOLERANCE)


def test_sinks_where_no_segment_starts_within_a_row():
    """What the caller promises by `segments` saves a copy of the sinks for every token, and changes nothing."""
    time, window = 90, 7
    arguments = *inputs(time, seed=3), np.int32(np.arange(time) < np.array([[time], [50], [1]]))
    *arrays, cotangent, ids = map(jnp.asarray, arguments)

    @jax.jit
    def run(*arrays):
        spec = dict(window=window, sinks=SINKS, segments="padded", segment_ids=ids)
        out, pull = jax.vjp(lambda *x: making.attended("local", *x, **spec), *arrays)
        return out, *pull(cotangent)

    assert_close(run(*arrays), oracle(SUNK, True, window, *arguments), TOLERANCE)


def test_a_window_of_one_returns_the_values():
    q, k, v, _ = inputs(7)
    out = jax.jit(lambda *x: making.attended("local", *x, window=1, causal=False))(q, k, v)
    assert_close(out, np.repeat(v, HEADS // KV_HEADS, axis=2), 1e-6)


def test_large_logits_do_not_overflow():
    q, k, v, cotangent = inputs(LONG, seed=3)
    ids = ragged_segments(LONG)
    got = compiled(BLOCKWISE, True, 70)(100 * q, k, v, cotangent, jnp.asarray(ids))
    expected = oracle(BLOCKWISE, True, None, 100 * q, k, v, cotangent, ids)
    # Logits near 1e3 carry an absolute error near 1e-4 into the exponent.
    assert_close(got, expected, 1e-3)


def recurrent(q, k, v, segments):
    """S <- S + phi(k_t) v_t^T, z <- z + phi(k_t), token by token; both restart with a segment."""
    phi = lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))  # noqa: E731
    group = HEADS // KV_HEADS
    tokens = [jnp.moveaxis(x, 1, 0) for x in (phi(q), phi(k), v, segments)]
    before = jnp.concatenate([tokens[3][:1], tokens[3][:-1]])

    def step(state, token):
        s, z = state
        query, key, value, ids, previous = token
        keep = jnp.float32(ids == previous)[:, None, None]
        s = s * keep[..., None] + key[..., :, None] * value[..., None, :]
        z = z * keep + key
        top = jnp.einsum("bhd,bhde->bhe", query, jnp.repeat(s, group, axis=1))
        bottom = jnp.einsum("bhd,bhd->bh", query, jnp.repeat(z, group, axis=1)) + 1e-6
        return (s, z), jnp.where(ids[:, None, None] != 0, top / bottom[..., None], 0.0)

    start = jnp.zeros((BATCH, KV_HEADS, DIM, DIM), jnp.float32), jnp.zeros_like(tokens[1][0])
    return jnp.moveaxis(jax.lax.scan(step, start, (*tokens, before))[1], 0, 1)


@pytest.mark.smoke
def test_chunked_linear_attention_is_the_recurrence():
    q, k, v, cotangent = inputs(LONG, seed=4)
    ids = jnp.asarray(ragged_segments(LONG))

    @jax.jit
    def recurred(q, k, v):
        out, pull = jax.vjp(lambda *x: recurrent(*x, ids), q, k, v)
        return out, *pull(cotangent)

    assert_close(compiled(LINEAR, True, 70)(q, k, v, cotangent, ids), recurred(q, k, v), TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
def test_padding_gives_zero_and_takes_no_gradient(form):
    """Whatever stands at the padding: zero output, and nothing flows to it or from it."""
    ids = ragged_segments(LONG)
    padding = ids == 0
    q, k, v, cotangent = inputs(LONG, seed=5)
    garbage = np.where(padding, np.float32(1e3), np.float32(0.0))[:, :, None, None]
    for causal in (True, False):
        run = compiled(form, causal, 70)
        clean = run(q, k, v, cotangent, jnp.asarray(ids))
        dirty = run(*(x + garbage for x in (q, k, v, cotangent)), jnp.asarray(ids))
        for x, y in zip(clean, dirty, strict=True):
            assert np.all(np.asarray(y)[padding] == 0.0)
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("form", [*FORMS, SUNK])
def test_nothing_flows_from_later_tokens(form):
    """d out[t] / d (q, k, v)[s] = 0 exactly for s > t; later tokens do not change out[..t]."""
    ids = ragged_segments(LONG)
    q, k, v, cotangent = inputs(LONG, seed=6)
    others = inputs(LONG, seed=7)
    run = compiled(form, True, 70)
    out = np.asarray(run(q, k, v, cotangent, ids)[0])
    for t in (0, 63, 64, 165, 166, 200, LONG - 2):
        later = (np.arange(LONG) > t)[:, None, None]
        one = cotangent * np.float32(np.arange(LONG) == t)[:, None, None]
        replaced = [np.where(later, y, x) for x, y in zip((q, k, v), others)]
        changed, *gradients = jax.device_get(run(*replaced, one, ids))
        np.testing.assert_array_equal(out[:, : t + 1], changed[:, : t + 1])
        for gradient in gradients:
            assert np.all(gradient[:, t + 1 :] == 0.0)
        assert np.abs(gradients[2]).max() > 0.0


@pytest.mark.parametrize("form", FORMS)
def test_bidirectional_attention_fails_the_test_of_causality(form):
    """The control: the same probe sees later tokens where it should."""
    t = 200
    q, k, v, cotangent = inputs(LONG, seed=6)
    one = cotangent * np.float32(np.arange(LONG) == t)[:, None, None]
    _, _, dk, dv = jax.device_get(compiled(form, False, 70)(q, k, v, one, ragged_segments(LONG)))
    assert np.abs(dk[:, t + 1 :]).max() > 0.0
    assert np.abs(dv[:, t + 1 :]).max() > 0.0


def largest_array(function, *arguments):
    """Elements of the largest intermediate value, loop bodies and rules of gradients included."""
    largest = 0
    pending = [jax.make_jaxpr(function)(*arguments).jaxpr]
    while pending:
        jaxpr = pending.pop()
        for equation in jaxpr.eqns:
            largest = max([largest, *(np.prod(x.aval.shape) for x in equation.outvars)])
            for value in jax.tree.leaves(
                equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    pending.append(inner)
    return largest


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_only_the_square_form_holds_a_square(form, causal):
    time = 4096
    ids = jnp.ones((1, time), jnp.int32)
    x = jnp.ones((1, time, 1, DIM))

    def loss(q, k, v):
        return function(form, causal=causal, window=64)(q, k, v, ids).sum()

    largest = largest_array(jax.value_and_grad(loss, argnums=(0, 1, 2)), x, x, x)
    if form == SQUARE:
        assert largest >= time * time
    else:
        assert largest < time * time / 32


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_inputs_keep_their_dtype_and_a_float32_state(form):
    ids = ragged_segments(LONG)
    arguments = [x.astype(jnp.bfloat16) for x in inputs(LONG, seed=8)]
    got = compiled(form, True, 70)(*arguments, jnp.asarray(ids))
    assert all(x.dtype == jnp.bfloat16 for x in got)
    expected = oracle(form, True, 70, *(x.astype(np.float32) for x in arguments), ids)
    assert_close(got, expected, 2e-2)  # A unit in the last place is 2^-8 = 4e-3.


@pytest.mark.smoke
@pytest.mark.parametrize("form", [BLOCKWISE, LINEAR, LOCAL])
def test_transformations_keep_the_gradient(form):
    """Under shard_map (with its check of replication), vmap, checkpoint and scan."""
    arguments = *inputs(LONG, seed=9), jnp.asarray(ragged_segments(LONG))
    expected = compiled(form, True, 70)(*arguments)[1:]
    attend = jax.checkpoint(function(form, window=70))

    def gradients(q, k, v, cotangent, ids):
        def loss(q, k, v):
            return (attend(q, k, v, ids) * cotangent).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    def row(*one):
        return [x[0] for x in gradients(*(x[None] for x in one))]

    def scanned(*everything):
        return jax.lax.scan(lambda _, one: (None, row(*one)), None, everything)[1]

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    # A scan inside the shard_map: its check sees the loops of both.
    for transformed in (jax.shard_map(scanned, mesh=mesh, in_specs=spec, out_specs=spec), jax.vmap(row)):
        assert_close(jax.jit(transformed)(*arguments), expected)


def test_the_oracles_gradients_are_those_of_their_values():
    """Central differences along a random direction, in float64."""
    rng = np.random.default_rng(0)
    ids = ragged_segments(13)
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in inputs(13, seed=10))
    directions = [rng.normal(size=x.shape) for x in (q, k, v)]
    for form, causal in ((LOCAL, True), (LOCAL, False), (LINEAR, True), (LINEAR, False)):
        _, *gradients = oracle(form, causal, 4, q, k, v, cotangent, ids)
        slope = sum((g * d).sum() for g, d in zip(gradients, directions))
        step = 1e-5
        ends = [
            oracle(form, causal, 4, *(x + sign * step * d for x, d in zip((q, k, v), directions)),
                   cotangent, ids)[0]
            for sign in (1, -1)
        ]
        measured = ((ends[0] - ends[1]) * cotangent).sum() / (2 * step)
        np.testing.assert_allclose(slope, measured, rtol=1e-6)


def test_rotary_matches_the_oracle_and_sees_only_differences():
    q, k, _, _ = inputs(7)
    positions = jnp.asarray(np.random.default_rng(1).integers(0, 500, (BATCH, 7)), jnp.int32)

    @jax.jit
    def turned(q, k, positions):
        """Rotated, in the other base, at 0, in bfloat16; and the scores of two offsets."""

        def scores(offset):
            moved = positions + offset
            keys = jnp.repeat(rotate(k, moved), HEADS // KV_HEADS, axis=2)
            return jnp.einsum("bqhd,bkhd->bhqk", rotate(q, moved), keys)

        at_zero, half = rotate(q, jnp.zeros_like(positions)), rotate(q.astype(jnp.bfloat16), positions)
        return (rotate(q, positions), rotate(q, positions, Rope(base=100.0)), at_zero, half), (scores(17), scores(0))

    (plain, based, at_zero, half), scores = turned(q, k, positions)
    # 1e-4: an angle of 500 radians has an absolute error near 3e-5 in float32.
    assert_close(plain, oracles.rotate(q, positions), 1e-4)
    assert_close(based, oracles.rotate(q, positions, 100.0), 1e-4)
    np.testing.assert_array_equal(at_zero, q)
    assert_close(*scores, 1e-4)
    assert half.dtype == jnp.bfloat16
    assert_close(half, oracles.rotate(q.astype(jnp.bfloat16), positions), 1e-2)


def test_rotary_refuses_odd_heads_and_foreign_positions():
    positions = jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"dim: expected an even number .* got 5"):
        rotate(jnp.zeros((2, 4, 1, 5)), positions)
    with pytest.raises(ValueError, match=r"positions: expected shape \(2, 3\), got \(2, 4\)"):
        rotate(jnp.zeros((2, 3, 1, 4)), positions)


X = jnp.zeros((2, 4, 6, 8))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(q=X[0]), r"q: expected rank 4 .* got shape \(4, 6, 8\)"),
        (dict(k=X[:, :, :4], v=X[:, :, :4]), r"heads: expected a multiple of kv_heads=4, got heads=6"),
        (dict(k=X[:, :3], v=X[:, :3]), r"k: expected \[batch=2, time=4, kv_heads, dim=8\]"),
        (dict(v=X[:, :, :3]), r"v: expected the shape of k"),
        (dict(segment_ids=jnp.ones((2, 5), jnp.int32)), r"segment_ids: expected shape \(2, 4\)"),
        (dict(segment_ids=jnp.ones((2, 4))), r"segment_ids: expected integers, got float32"),
    ],
)
@pytest.mark.parametrize("attend", [full.attend, linear.attend, local.attend])
def test_bad_shapes_are_refused_in_one_sentence(attend, arguments, sentence):
    given = dict(q=X, k=X, v=X) | arguments
    with pytest.raises(ValueError, match=sentence):
        attend(given.pop("q"), given.pop("k"), given.pop("v"), spec=AttentionSpec(window=2), **given)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(window=0), "window: expected at least 1, got 0"),
        (dict(window=8.5), "window: expected an integer, got 8.5"),
        (dict(window="8"), "window: expected an integer, got '8'"),
        (dict(window=True), "window: expected an integer, got True"),
        (dict(sinks=None), "sinks: expected an integer, got None"),
        (dict(causal="no"), "causal: expected True or False, got 'no'"),
        (dict(sinks=-1), "sinks: expected at least 0, got -1"),
        (dict(implementation="fast"), "implementation: expected one of auto, .* got 'fast'"),
        (dict(segments="two"), "segments: expected one of .* got 'two'"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        AttentionSpec(**fields)


def test_local_attention_without_a_window_is_refused():
    with pytest.raises(ValueError, match="window: expected a positive integer"):
        local.attend(X, X, X, spec=AttentionSpec())


def test_cudnn_serves_where_its_backward_pass_does():
    def chosen(implementation="auto", **changes):
        setting = dict(time=4096, dtype=jnp.bfloat16, head_dim=64, segments="one",
                       target=Target("gpu", 9.0))
        return full.resolve_implementation(implementation, **{**setting, **changes})

    assert chosen() == chosen(segments="padded") == "cudnn"
    for refused in (dict(time=4095), dict(dtype=jnp.float32), dict(head_dim=256),
                    dict(head_dim=20), dict(segments="any"), dict(target=Target("tpu", 0.0)),
                    dict(target=Target("gpu", 7.5))):
        assert chosen(**refused) == "blockwise", refused
        with pytest.raises(ValueError, match="implementation: expected for 'cudnn' .* an even length"):
            chosen("cudnn", **refused)


@pytest.mark.parametrize("mechanism", [full, local])
def test_a_gradient_has_a_derivative(mechanism):
    """The Hessian times a vector, forwards over backwards, against differences of the gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, way = (jax.random.normal(key, (1, 40, 2, 8)) for key in keys)
    spec = AttentionSpec(window=9, implementation="blockwise")
    slope = jax.grad(lambda q: (mechanism.attend(q, k, v, spec=spec) ** 2).sum())

    @jax.jit
    def both(q):
        step = 1e-2
        return jax.jvp(slope, (q,), (way,))[1], (slope(q + step * way) - slope(q - step * way)) / (2 * step)

    assert_close(*both(q), 2e-3)
