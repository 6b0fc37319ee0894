"""The model of the kernels' time counts what the kernels do, and reads schedules for what they are."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.benchmarks import kernel_model
from experiments.benchmarks.kernels import Case
from experiments.checks import bundles
from meta_attention_jax.kernels import worklist
from meta_attention_jax.kernels.worklist import Sizes

CASE = Case("10 % full", 1024, (0.1, 0.4, 0.5), "forward", window=200, sinks=0)


def test_steps_are_the_tiles_of_the_list():
    sizes = Sizes(32, 32)
    work = kernel_model.work_for(CASE, [sizes] * 2)
    steps = kernel_model.programs_of(work, "forward", (32, 32))
    assert steps.sum() == sum(float(x) for x in worklist.count_tiles(work))
    assert len(steps) == sum(int(blocks.count) for blocks in work.blocks)
    # dK and dV meet the same pairs of a block and a tile.
    assert kernel_model.programs_of(work, "dkv", (32, 32)).sum() == steps.sum()
    assert kernel_model.programs_of(work, "forward", (16, 32)).sum() > steps.sum()


def test_the_busiest_unit_is_waited_for():
    cost = kernel_model.Cost(before=5.0, fixed=1.0, tile=2.0)
    assert kernel_model.busiest(np.asarray([3.0]), cost, units=4, heads=1) == 5 + 7
    assert kernel_model.busiest(np.asarray([3.0, 1.0, 1.0]), cost, units=2, heads=1) == 5 + 7
    assert kernel_model.busiest(np.asarray([1.0, 1.0]), cost, units=2, heads=3) == 5 + 3 * 3


def test_a_step_takes_what_it_computes_or_what_it_waits_for():
    behind, added = (kernel_model.Waits(1e-6, added) for added in (False, True))
    seconds = kernel_model.step_seconds(3000, 6000, moved=0, waits=behind)
    assert seconds == pytest.approx(4e-6, rel=0.01)
    assert kernel_model.step_seconds(3000, 6000, moved=819e3, waits=added) == pytest.approx(6e-6, rel=0.01)
    assert kernel_model.step_seconds(1, 1, moved=819e3, waits=behind) == pytest.approx(2e-6)


def test_what_is_recorded_was_reproduced_before_it_predicted():
    rows = json.loads((kernel_model.RESULTS / "kernel_model.json").read_text())["rows"]
    worst = {128: 0.075, 64: 0.22}  # What FINDINGS says of them.
    checks = [row for row in rows if row["part"] == "check"]
    assert len(checks) == 16 and all(abs(row["model / timed"] - 1) < worst[row["d"]] for row in checks)
    assert all("timed ms" not in row for row in rows if row["part"] == "prediction")


SCHEDULE = """
= control target key start
LB: loop body
= control target key end
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sadd 1 } /* Start region 7 */
   0x2   : > { %9 = sbr.rel (%p1) target = $region4 } /* Start region 3 */
   0x3   : > { %v1 = vld }
   0x4   : > { %v2 = vld } /* End region 3 */
   0x5 PF: > { %s3 = smov } /* Start/End empty region 4 */
   0x6   : > { %v4 = vadd
second_minor_factor: 1 */ }
   0x7   : > { %s5 = smov ;;  %11 = sbr.rel (!%p2) target = $region7 } /* End region 7 */
   0x8   :  { %s6 = smov }
"""


def test_cycles_of_a_step_are_the_bundles_of_the_loop_and_parts_are_what_is_jumped_over():
    assert bundles.step_of(SCHEDULE) == bundles.Step(always=3, parts=(3,))
