"""Gate: limits, schedules per measure, and the settled gate, which knows past steps only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_attention_jax.controller.uncertainty import MEASURES
from meta_attention_jax.routing import gate
from meta_attention_jax.routing.gate import GateSchedule
from tests.close import assert_close


def run(schedule, entropies, final=0.8):
    """theta and `opened` at every step, theta before that step's entropy is known; last state."""

    def body(state, inputs):
        step, entropy = inputs
        theta = gate.threshold(schedule, state, step, jnp.float32(final))
        return gate.update(schedule, state, step, entropy), (theta, state.opened)

    steps = jnp.arange(len(entropies), dtype=jnp.int32)
    inputs = (steps, jnp.asarray(entropies, jnp.float32))
    scan = jax.jit(lambda state: jax.lax.scan(body, state, inputs))
    state, (thetas, opened) = scan(schedule.init_state())
    return np.asarray(thetas), np.asarray(opened), state


@pytest.mark.smoke
def test_limits_of_the_gate():
    u = jnp.asarray([[0.0, 0.3, 0.3000001, 1.0]])
    assert not gate.hard_tokens(u, jnp.float32(0.0)).any(), "theta = 0 is closed even at u = 0"
    assert gate.hard_tokens(u, jnp.float32(1.0)).all()
    np.testing.assert_array_equal(
        gate.hard_tokens(u, jnp.float32(0.3)), [[True, True, False, False]]
    )


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("measure", MEASURES)
def test_schedules_rise_from_closed_to_final(kind, measure):
    schedule = GateSchedule(kind=kind, start=10, end=50, measure=measure)
    thetas, _, _ = run(schedule, np.zeros(60))
    assert (thetas[:11] == 0.0).all() and (thetas[11:] > 0.0).all()
    assert (np.diff(thetas[10:51]) > 0.0).all()
    np.testing.assert_array_equal(thetas[50:], np.float32(0.8))
    half = 0.8 * MEASURES[measure].typical / 2.0
    np.testing.assert_allclose(thetas[30], half, rtol=1e-5)


def test_linear_and_cosine_progress():
    steps = np.arange(60)
    p = np.clip((steps - 10) / 40.0, 0.0, 1.0)
    for kind, expected in (("linear", p), ("cosine", 0.5 - 0.5 * np.cos(np.pi * p))):
        thetas, _, _ = run(GateSchedule(kind=kind, start=10, end=50), np.zeros(60), final=1.0)
        assert_close(thetas, expected)


def test_none_stays_closed():
    thetas, _, _ = run(GateSchedule(kind="none"), np.zeros(20))
    assert (thetas == 0.0).all()


SETTLED = GateSchedule(kind="settled", start=20, end=60, window=10, tolerance=0.01)
FALLING = 1.0 - 0.5 * np.minimum(np.arange(300) / 150.0, 1.0)


@pytest.mark.smoke
def test_settled_opens_only_after_entropy_has_settled():
    thetas, opened, state = run(SETTLED, FALLING)
    opening = int(state.opened)
    assert 150 < opening < 250, "the entropy falls until step 150"
    assert (thetas[: opening + 1] == 0.0).all() and thetas[opening + 1] > 0.0
    np.testing.assert_array_equal(thetas[opening + 40 :], np.float32(0.8))
    assert set(opened) == {-1, opening}, "a gate opens once"


@pytest.mark.parametrize("start, window, earliest", [(20, 10, 20), (0, 30, 30), (0, 10, 10)])
def test_settled_waits_for_its_start_and_for_a_window(start, window, earliest):
    schedule = GateSchedule(kind="settled", start=start, end=start + 40, window=window)
    _, _, state = run(schedule, np.full(100, 0.4))
    assert int(state.opened) == earliest


def test_settled_never_closes_again():
    noisy = np.concatenate([FALLING, np.tile([0.1, 0.9], 50)])
    thetas, _, _ = run(SETTLED, noisy)
    assert (np.diff(thetas) >= 0.0).all()


@pytest.mark.parametrize("step", [100, 180, 200])
def test_settled_depends_on_past_steps_only(step):
    changed = FALLING.copy()
    changed[step:] = np.random.default_rng(0).uniform(size=len(changed) - step)
    before, after = (run(SETTLED, entropies)[0] for entropies in (FALLING, changed))
    np.testing.assert_array_equal(before[: step + 1], after[: step + 1])


def test_resuming_from_the_state_changes_nothing():
    thetas, _, last = run(SETTLED, FALLING)
    state = SETTLED.init_state()
    for step in range(3):
        state = gate.update(SETTLED, state, jnp.int32(step), jnp.float32(FALLING[step]))
    stored = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state)
    update = jax.jit(lambda s, i, h: gate.update(SETTLED, s, i, h))
    for step in range(3, 300):
        stored = update(stored, jnp.int32(step), jnp.float32(FALLING[step]))
    assert_close(stored.average, last.average)
    assert int(stored.opened) == int(last.opened)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "sudden"}, "gate.kind: expected one of .*'settled'.*, got 'sudden'"),
        ({"measure": "variance"}, "gate.measure: expected one of .*, got 'variance'"),
        ({"start": -1}, "gate.start: expected a step >= 0, got -1"),
        ({"start": 5, "end": 5}, "gate.end: expected a step > start = 5, got 5"),
        ({"window": 0}, "gate.window: expected at least 1 step, got 0"),
        ({"tolerance": 0.0}, "gate.tolerance: .* got 0.0"),
    ],
)
def test_bad_schedules_are_one_sentence(change, message):
    good = {"kind": "settled", "start": 0, "end": 10}
    GateSchedule(**good).validate()
    with pytest.raises(ValueError, match=message):
        GateSchedule(**(good | change)).validate()
