"""Which form should packed full attention take: dynamic loops, buckets, or all tokens and a select?

python -m experiments.benchmarks.dispatch_forms [--json=FILE] [--times=2048,8192] [--rounds=5]
    [--fractions=10] [--batches=1,4]

float32, H 4, d 64, full attention of the chosen queries alone, at random positions. The sides:

* `loops`: what the project uses (`kernels/portable.py`): trip counts follow the data; blocks of a
  batch are counted in sum, keys stop at the last query of a block; backward by hand.
* `buckets`: `lax.switch` over static capacities (T / 32, T / 16, ... T; the least that holds the
  fullest sequence), each branch a scan over query blocks with rematerialisation, backward by
  autodiff. With static shapes every block meets all T keys, and a batch pays for its maximum.
* `dense`: blockwise full attention of all tokens, then a select.

`ratio` is a side's time over that of `loops`, same process, interleaved. Batch 4: sequences of 0, 5, 10 and 25 % full.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common as commands
from experiments.benchmarks import common
from meta_attention_jax.mechanisms import full
from meta_attention_jax.routing.dispatch import hard_attention
from meta_attention_jax.types import AttentionSpec

JSON = commands.define_path("json", None, "Write the rows here.")
TIMES = flags.DEFINE_list("times", ["2048", "8192"], "T, multiples of 2048.")
FRACTIONS = flags.DEFINE_list("fractions", ["10"], "Percent full, batch 1.")
BATCHES = flags.DEFINE_list("batches", ["1", "4"], "Among 1 and 4.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved rounds.", 1)

HEADS, DIM = 4, 64
BUCKETS, BLOCK = 6, 64


def bucketed(q, k, v, chosen):
    """Full attention of the chosen rows, zeros elsewhere: one static program per capacity."""
    batch, time, heads, dim = q.shape
    index = jnp.arange(time)
    order = jnp.argsort(jnp.where(chosen, index, index + time), axis=1)

    @jax.checkpoint
    def block(q, k, v, position):
        query = jnp.take_along_axis(q, position[..., None, None], axis=1)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, k) * dim**-0.5
        allowed = position[:, None, :, None] >= index
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(allowed, logits, -1e30)), v)

    def branch(capacity, q, k, v):
        places = order[:, :capacity].reshape(batch, -1, BLOCK).swapaxes(0, 1)
        _, rows = jax.lax.scan(lambda _, place: (None, block(q, k, v, place)), None, places)
        rows = rows.swapaxes(0, 1).reshape(batch, capacity, heads, dim)
        out = jnp.zeros_like(q).at[jnp.arange(batch)[:, None], order[:, :capacity]].set(rows)
        return jnp.where(chosen[..., None, None], out, 0.0)

    capacities = [time >> shift for shift in reversed(range(BUCKETS))]
    needed = jnp.searchsorted(jnp.asarray(capacities), chosen.sum(1).max())
    return jax.lax.switch(needed, [functools.partial(branch, capacity) for capacity in capacities], q, k, v)


def looped(q, k, v, chosen):
    route = jnp.where(chosen, 0, -1)  # No mechanism: zeros.
    return hard_attention(q, k, v, route, mechanisms=("full",), spec=AttentionSpec())


def dense(q, k, v, chosen):
    out = full.attend(q, k, v, spec=AttentionSpec(implementation="blockwise"))
    return jnp.where(chosen[..., None, None], out, 0.0)


SIDES = {"loops": looped, "buckets": bucketed, "dense": dense}


def rows_of(time: int, fractions: list[float], direction: str) -> list[common.Row]:
    """Checks that the sides agree, times them and makes their rows."""
    qkv = common.random_qkv(len(fractions), time, HEADS, DIM)
    chosen = jnp.asarray(common.random_routes(fractions, time) == 0)
    calls = {name: common.timed(function, direction, qkv, chosen) for name, function in SIDES.items()}
    results = {name: jax.tree.leaves(call()) for name, call in calls.items()}
    for name, leaves in results.items():
        for x, y in zip(leaves, results["loops"], strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4 * float(jnp.abs(y).max()), err_msg=name)
    seconds = common.interleave(calls, ROUNDS.value)
    sizes = dict(T=time, batch=len(fractions), fraction_full=float(np.mean(fractions)), direction=direction)
    return [common.ratio_row(name, seconds, name, "loops", **sizes) for name in SIDES if name != "loops"]


def main() -> None:
    with commands.user_mistakes():
        times = common.numbers("times", TIMES.value, "multiples of 2048", lambda x: x and x % 2048 == 0)
        batches = common.numbers("batches", BATCHES.value, "1 or 4", lambda x: x in (1, len(common.UNEVEN)))
        percents = common.numbers("fractions", FRACTIONS.value, "from 0 to 100", lambda x: x <= 100)
    single = [[percent / 100] for percent in percents]
    cases = [fractions for batch in batches for fractions in ([list(common.UNEVEN)] if batch > 1 else single)]
    common.tell(itertools.starmap(rows_of, itertools.product(times, cases, common.DIRECTIONS)), JSON.value)


if __name__ == "__main__":
    commands.run(main, prints=True)
