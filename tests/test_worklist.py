"""The work list: every pair that a query needs is in a tile, every tile is counted once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_attention_jax.kernels import worklist
from meta_attention_jax.mechanisms.mechanism import Reach
from tests import oracles


@pytest.mark.parametrize("causal", [True, False])
def test_every_tile_that_is_counted_is_met_once_and_all_that_are_needed_are(causal):
    """The list of four mechanisms against an enumeration, query by query and key by key."""
    batch, time, size = 2, 150, worklist.Sizes(8, 16)
    reaches = [Reach(), Reach(40), Reach(40, 3), Reach(2, 20)]
    group = np.random.default_rng(0).integers(-1, 4, size=(batch, time))
    ids = np.repeat([[0] * 3 + [1] * 87 + [2] * 60], batch, 0)

    @jax.jit
    def listed(group, ids):
        work = worklist.build(group, ids, causal=causal, reaches=reaches, sizes=[size] * 4)
        return work, worklist.count_tiles(work)

    work, counted = listed(jnp.asarray(group, jnp.int32), jnp.asarray(ids, jnp.int32))
    order = np.asarray(work.order)
    for m, (reach, blocks) in enumerate(zip(reaches, jax.device_get(work.blocks), strict=True)):
        allowed = oracles.allowed_pairs(ids, causal=causal, window=reach.window, sinks=reach.sinks)
        n, met = 0, 0
        for row in range(batch):
            queries = [t for t in range(time) if group[row, t] == m and ids[row, t]]
            for start in range(0, len(queries), size.block):
                mine = queries[start : start + size.block]
                slot = int(blocks.slot[n])
                assert int(blocks.row[n]) == row
                assert order[row, slot : slot + len(mine)].tolist() == mine
                assert (order[row, slot + len(mine) : slot + size.block] >= time).all()
                tiles = [*range(int(blocks.low[n]), int(blocks.high[n])),
                         *range(int(blocks.sink_low[n]), int(blocks.sink_high[n]))]
                assert len(set(tiles)) == len(tiles)
                needed = {s // size.tile for t in mine for s in range(time) if allowed[row, t, s]}
                assert needed <= set(tiles)
                for j in range(int(blocks.whole[n]), int(blocks.whole_end[n])):
                    keys = range(j * size.tile, (j + 1) * size.tile)
                    assert all(allowed[row, t, s] for t in mine for s in keys)
                n, met = n + 1, met + len(tiles)
        assert n == int(blocks.count)
        assert float(counted[m]) == met


@functools.partial(jax.jit, static_argnames=("causal", "window", "block", "tile"))
def pairs_of(chosen, causal=True, window=None, block=64, tile=128):
    """Query-key pairs that are met, the filling of blocks included."""
    work = worklist.build(
        jnp.where(chosen, 0, -1), None, causal=causal, reaches=[Reach(window)],
        sizes=[worklist.Sizes(block, tile)],
    )
    return worklist.count_tiles(work)[0] * block * tile


def test_work_follows_the_routes():
    """Pairs computed: none for no choice, the sum over sequences for uneven ones, causal extent."""
    time, block, tile = 1024, 64, 128
    none = jnp.zeros((2, time), bool)
    everything = jnp.ones((2, time), bool)
    one = none.at[0].set(True)
    assert pairs_of(none) == 0.0
    assert pairs_of(everything) == 2 * pairs_of(one)
    causal = time * (time + block) / 2
    assert causal <= pairs_of(one) <= causal + time * tile
    head = none.at[0, :block].set(True)
    assert pairs_of(head) == block * tile
    last = none.at[0, -1].set(True)
    assert pairs_of(last) == block * time
    assert pairs_of(last, window=100) == block * tile
    assert pairs_of(everything, causal=False) == 2 * time * time
