"""What only a GPU can show of the properties that the other tests hold on CPU; there too, tiny.

Mechanisms in bfloat16 against float64 oracles, causality by gradients, packed dispatch against
"compute all, select", and 200 steps of `recall`, soft and hard, with a restart. `make gpu-check` runs
these and the timings, and writes a record; a row that a device cannot run says why.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import pytest

from tests import gpu_checks as checks
from tests import gpu_decode, gpu_training

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of everything.

    Attributes:
      mechanisms: (T, d, window, with segment ids) of each comparison with the oracles; cuDNN has
        gradients at even T alone, and no ids.
      causality, packed: (T, d, window).
      training: changes to configs/recall.py. With the prior by cost, no token is full by then.
      steps: of the training runs.
      fall: largest last / first logged nats. On CPU 200 steps gave 0.47.
      bound: largest nats at the end; on CPU 200 steps gave 1.83 soft, 1.82 hard.
    """

    mechanisms: tuple[tuple[int, int, int, bool], ...] = (
        (1024, 64, 256, False), (510, 128, 100, False), (509, 64, 100, True),
    )
    causality: tuple[int, int, int] = (334, 64, 70)
    packed: tuple[int, int, int] = (1001, 64, 100)
    training: tuple[tuple[str, Any], ...] = (("prior.family", "uniform"),)
    steps: int = 200
    fall: float = 0.6
    bound: float = 1.9


TINY = Sizes(
    mechanisms=((64, 16, 20, False), (36, 8, 9, False), (37, 8, 9, True)),
    causality=(70, 8, 20),
    packed=(130, 8, 20),
    training=(
        ("prior.family", "uniform"), ("model.model_dim", 32), ("data.batch_size", 8),
        ("data.sequence_length", 32), ("data.num_pairs", 4), ("model.num_layers", 1),
        ("train.eval_batches", 1),
    ),
    steps=20,
    fall=1.0,
    bound=4.0,
)


@pytest.fixture(scope="module")
def sizes():
    return Sizes() if jax.default_backend() == "gpu" else TINY


def judge(rows):
    """Fails if one row failed; skips if none was run."""
    wrong = [row for row in rows if row["passed"] is False]
    assert not wrong, "\n".join(map(str, wrong))
    skipped = [row["note"] for row in rows if row["passed"] is None]
    if len(skipped) == len(rows):
        pytest.skip(skipped[0])


@pytest.fixture
def hold(record_property):
    """hold(rows): all pass that were run; the record has them all, and what was not run is a skip."""

    def check(rows):
        for row in rows:
            record_property("row", json.dumps(row))
        judge(rows)

    return check


@pytest.mark.parametrize("case", checks.KERNEL_CASES)
def test_the_kernel_is_the_portable_one(hold, case):
    if jax.default_backend() != "gpu":
        pytest.skip("not run: the kernel is one for GPUs")
    hold(checks.kernel_rows(case))


@pytest.mark.parametrize("case", gpu_decode.CASES)
def test_decoding_by_the_kernel_is_the_portable_one(hold, case):
    if jax.default_backend() != "gpu":
        pytest.skip("not run: the kernel is one for GPUs")
    hold(gpu_decode.rows(case))


@pytest.mark.parametrize("kernel", ["pallas", "portable"])
@pytest.mark.parametrize("label", checks.ARITHMETIC)
def test_packed_dispatch_is_compute_all_and_select(sizes, hold, label, kernel):
    # On a CPU, products by default are those in float32.
    if "by default" in label and jax.default_backend() != "gpu":
        pytest.skip("not run: products by default round their factors on accelerators alone")
    hold(checks.packed_rows(*sizes.packed, label, kernel))


@pytest.mark.parametrize("case", range(3))
def test_mechanisms_are_their_oracles(sizes, hold, case):
    time, dim, window, segments = sizes.mechanisms[case]
    hold(checks.mechanism_rows(time, dim, window, segments=segments))


def test_nothing_flows_from_later_tokens(sizes, hold):
    hold(checks.causality_rows(*sizes.causality))


def test_packed_dispatch_on_a_mesh(sizes, hold):
    hold(checks.mesh_rows(*sizes.packed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_learns_is_cut_off_and_goes_on(sizes, hold, dtype, tmp_path):
    if dtype == "float32" and jax.default_backend() != "gpu":
        pytest.skip("not run: on CPUs other tests train in float32")
    hold(gpu_training.training_rows(sizes, dtype, tmp_path))


def test_a_row_that_failed_or_was_not_run_is_told():
    with pytest.raises(AssertionError, match="'check': 'a', 'value': 3.0"):
        judge([checks.check("a", 3.0, 2.0)])
    with pytest.raises(AssertionError):
        judge([checks.check("a", float("nan"), 2.0)])
    with pytest.raises(pytest.skip.Exception, match="not run: no cuDNN"):
        judge([checks.not_run("a", "no cuDNN")])
