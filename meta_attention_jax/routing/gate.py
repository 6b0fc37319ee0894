"""The gate: which tokens are certain enough to use one mechanism only, and when in training.

Token t is hard iff theta > 0 and u_t <= theta. Theta follows a schedule from 0 (all soft) to its final value (1: all
hard, since u_t <= 1). It is never a quantile of the batch: a token's hardness would then depend on later tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Optional

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from meta_attention_jax.controller.uncertainty import MEASURES
from meta_attention_jax.fields import expect
from meta_attention_jax.types import Scalar

KINDS = ("none", "linear", "cosine", "settled")


def hard_tokens(
    uncertainty: Float[Array, "batch time"],
    threshold: Scalar,
    log_uncertainty: Optional[Float[Array, "batch time"]] = None,
) -> Bool[Array, "batch time"]:
    """Whether theta > 0 and u_t <= theta; at theta = 0 the gate is closed even for u_t = 0.

    Where log u_t is given, it is compared with log theta: u_t itself may have underflowed.
    """
    if log_uncertainty is None:
        return (threshold > 0.0) & (uncertainty <= threshold)
    bound = jnp.log(jnp.where(threshold > 0.0, threshold, 1.0))
    return (threshold > 0.0) & (log_uncertainty <= bound)


def threshold_of_nats(nats: float, num_mechanisms: int) -> float:
    """theta = exp(eta + log Gamma(K)), at most 1: the gate H[Dir(alpha_t)] <= eta of `dirichlet_entropy`.

    From eta = -log Gamma(K) on, -0.693 for K = 3, every token is hard.
    """
    least = math.log(np.finfo(np.float32).tiny) - math.lgamma(num_mechanisms)  # Below it, theta is 0 in float32.
    expect(math.isfinite(nats) and nats >= least, "threshold", f"a finite number of nats >= {least:.1f}", nats)
    return math.exp(min(nats + math.lgamma(num_mechanisms), 0.0))


@flax.struct.dataclass
class GateState:
    """What the gate remembers of past steps; it lives in the train state."""

    count: Int[Array, ""]  # Steps seen.
    average: Scalar  # Exponential average of the routing entropy, in the unit of `GateSchedule.tolerance`.
    slow: Scalar  # Exponential average of `average`.
    opened: Int[Array, ""]  # Step after which a `settled` schedule opened, or -1.


@dataclasses.dataclass(frozen=True)
class GateSchedule:
    """How theta moves from 0 to its final value.

    Progress p goes from 0 to 1:

        none      p = 0: the gate stays closed in training
        linear    p = clip((step - start) / (end - start), 0, 1)
        cosine    (1 - cos(pi p)) / 2 of the linear p
        settled   linear over end - start steps from the step when routing entropy settled

    and theta = final p^gamma with gamma = log2(2 / R), R the practical range of the measure: theta is R / 2 of its
    final value at p = 1/2, so hardening spreads over the schedule for measures that rarely come near 1 too.

    Routing entropy (for `dirichlet_entropy`, the mean of H[Dir(alpha)]) has settled when, at or after `start` and after
    at least `window` steps, its exponential average over about `window` steps is within `tolerance` of that average's
    own average.
    """

    kind: str = "none"  # "none", "linear", "cosine" or "settled".
    start: int = 0  # Last step with p = 0 (for settled: no opening before it).
    end: int = 1  # First step with p = 1; for settled only end - start counts.
    measure: str = "entropy"  # The uncertainty measure that theta is compared with.
    window: int = 100  # Time constant of the averages, steps.
    tolerance: float = 0.01  # Of settling, a fraction of log K; nats for `dirichlet_entropy`.

    def validate(self) -> None:
        """Checks the fields."""
        expect(self.kind in KINDS, "gate.kind", f"one of {KINDS}", self.kind)
        expect(self.measure in MEASURES, "gate.measure", f"one of {tuple(MEASURES)}", self.measure)
        if self.kind == "none":
            return
        expect(self.start >= 0, "gate.start", "a step >= 0", self.start)
        expect(self.end > self.start, "gate.end", f"a step > start = {self.start}", self.end)
        expect(self.window >= 1, "gate.window", "at least 1 step", self.window)
        expect(0.0 < self.tolerance <= 1.0, "gate.tolerance", "a number in (0, 1]", self.tolerance)

    @property
    def times(self) -> GateTimes:
        """Start and end as arrays."""
        return GateTimes(start=jnp.int32(self.start), end=jnp.int32(self.end))

    def init_state(self) -> GateState:
        """The state before the first step."""
        return GateState(
            count=jnp.zeros((), jnp.int32),
            average=jnp.zeros((), jnp.float32),
            slow=jnp.zeros((), jnp.float32),
            opened=jnp.full((), -1, jnp.int32),
        )


@flax.struct.dataclass
class GateTimes:
    """When the gate moves, as arrays that a sweep may vary; see `GateSchedule`."""

    start: Int[Array, ""]  # Last step with p = 0.
    end: Int[Array, ""]  # First step with p = 1; later than start.


def threshold(
    schedule: GateSchedule, state: GateState, step: Int[Array, ""], final: Scalar, times: Optional[GateTimes] = None
) -> Scalar:
    """theta at `step` of training, from 0, between 0 and `final` in [0, 1]. The state has seen all steps before;
    `times` stand in the place of the schedule's own start and end."""
    times = times or schedule.times
    final = jnp.asarray(final, jnp.float32)
    if schedule.kind == "none":
        return jnp.zeros_like(final)
    origin = state.opened if schedule.kind == "settled" else times.start
    elapsed = (jnp.asarray(step, jnp.int32) - origin).astype(jnp.float32)
    p = jnp.clip(elapsed / (times.end - times.start).astype(jnp.float32), 0.0, 1.0)
    if schedule.kind == "cosine":
        p = 0.5 - 0.5 * jnp.cos(math.pi * p)
    elif schedule.kind == "settled":
        p = jnp.where(state.opened >= 0, p, 0.0)
    gamma = math.log2(2.0 / MEASURES[schedule.measure].typical)
    return final * p**gamma


def update(
    schedule: GateSchedule, state: GateState, step: Int[Array, ""], entropy: Scalar, times: Optional[GateTimes] = None
) -> GateState:
    """The state after `step`, whose routing entropy was `entropy`.

    `average` += (entropy - average) / window, `slow` += (average - slow) / window, both starting at the first entropy
    seen. A `settled` gate opens once and never closes again. `times` as in `threshold`.
    """
    times = times or schedule.times
    rate = 1.0 / schedule.window
    first = state.count == 0
    average = jnp.where(first, entropy, state.average + rate * (entropy - state.average))
    slow = jnp.where(first, entropy, state.slow + rate * (average - state.slow))
    count = state.count + 1
    settled = (jnp.abs(average - slow) <= schedule.tolerance) & (count > schedule.window) & (step >= times.start)
    opens = settled & (schedule.kind == "settled") & (state.opened < 0)
    opened = jnp.where(opens, jnp.asarray(step, jnp.int32), state.opened)
    return GateState(count=count, average=average, slow=slow, opened=opened)
