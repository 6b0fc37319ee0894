"""Shape legend, the mechanism axis, and the small structs every room shares.

Dimension names used in signatures throughout the package:

=============  ==========================================================
``batch``      B, sequences
``time``       T, tokens of a sequence
``model``      D, width of the residual stream
``heads``      H, query heads
``kv_heads``   G, key/value heads; G divides H (grouped-query attention)
``dim``        d, width of one head
``mechanism``  K, the attention mechanisms, in the order of ``mechanisms``
``layer``      L, layers of a model
=============  ==========================================================

``segment_ids``: 0 is padding; equal non-zero ids attend to each other and are contiguous in time.
``positions``: index of a token within its segment, an explicit input, so that padding and packing
change nothing.
"""

from __future__ import annotations

from typing import Optional

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Queries = Float[Array, "batch time heads dim"]
Keys = Float[Array, "batch time kv_heads dim"]
Values = Float[Array, "batch time kv_heads dim"]
SegmentIds = Int[Array, "batch time"]
Positions = Int[Array, "batch time"]
Route = Int[Array, "batch time"]
Weights = Float[Array, "batch time mechanism"]
Costs = Float[Array, "mechanism"]
Scalar = Float[Array, ""]

MECHANISMS = ("full", "linear", "local")
"""Default order of the mechanism axis."""


@flax.struct.dataclass
class Routing:
    """What a controller says about every token, and what the layer did with it.

    Attributes:
      mean: E[pi_t] under the posterior (or the softmax weights), on the simplex.
      weights: the pi_t that mixes the soft output: a reparameterised sample in training, else `mean`.
      uncertainty: u_t in [0, 1], by the configured measure.
      kl: KL(q_t || p) in nats; zero for controllers without a prior.
      penalty: what the objective adds of this token and layer, times beta; None is the KL.
      concentration: alpha_t of the Dirichlet posterior; None for controllers without one.
      route: k*_t, the mechanism a hard token uses; argmax of `mean` unless forced. Set by the layer.
      hard: whether token t used one mechanism only. Set by the layer.
    """

    mean: Weights
    weights: Weights
    uncertainty: Float[Array, "batch time"]
    kl: Float[Array, "batch time"]
    penalty: Optional[Float[Array, "batch time"]] = None
    concentration: Optional[Weights] = None
    route: Optional[Route] = None
    hard: Optional[Bool[Array, "batch time"]] = None


@flax.struct.dataclass
class RoutingHypers:
    """Hyper-parameters of routing. Array inputs, so that a sweep never recompiles.

    Attributes:
      strength: kappa > 0, the prior's pseudo-counts in all.
      preference: eta > 0, the preference floor of the prior mean.
      costs: c in (0, 1]^K, divided by the largest.
      threshold: theta; a token is hard iff theta > 0 and u_t <= theta (gated mode and training).
      entropy_bonus: rho of the `cost_penalty` controller, cost per nat.
      temperature: tau > 0 of the `gumbel` controller.
    """

    strength: Scalar
    preference: Scalar
    costs: Costs
    threshold: Scalar
    entropy_bonus: Scalar = np.float32(0.0)
    temperature: Scalar = np.float32(1.0)


@flax.struct.dataclass
class Batch:
    """One batch of token windows (NumPy on the host, jax.Array on devices).

    Attributes:
      tokens: inputs x_t.
      targets: x_{t+1}, what the model predicts at t.
      segment_ids: 0 is padding.
      positions: index within the segment.
      loss_mask: True where the target counts in every metric.
      kind: what a token is, for corpora that know (`recall`: 1 at query tokens); else 0.
      num_bytes: UTF-8 bytes of the target, for bits per byte; 0 where bytes mean nothing.
      row: global row number within the batch; with the step it names the row's PRNG key.
    """

    tokens: Int[Array, "batch time"]
    targets: Int[Array, "batch time"]
    segment_ids: SegmentIds
    positions: Positions
    loss_mask: Bool[Array, "batch time"]
    kind: Int[Array, "batch time"]
    num_bytes: Int[Array, "batch time"]
    row: Int[Array, "batch"]


def positions_in_segment(segment_ids: SegmentIds) -> Positions:
    """Index of every token within its segment (0 at padding).

    A segment starts where the id changes, so left padding and packing give the positions that the
    segment would have alone.
    """
    time = segment_ids.shape[1]
    if not time:
        return jnp.zeros_like(segment_ids, jnp.int32)
    index = jnp.arange(time, dtype=jnp.int32)[None, :]
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segment_ids != previous, index, 0)
    start = jax.lax.cummax(starts, axis=1)
    return jnp.where(segment_ids == 0, 0, index - start)
