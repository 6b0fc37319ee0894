"""A run that an older version trained (commit 8281a9f: `smoke` at width 16, 4 of 6 steps) is still a run."""

from __future__ import annotations

import pathlib
import shutil

import numpy as np
import pytest

from meta_attention_jax.config import dict_to_config, read_config
from meta_attention_jax.runs import load_run
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.loop import train
from tests.close import assert_close

DATA = pathlib.Path(__file__).parent / "data"


@pytest.fixture
def old(tmp_path):
    """(a copy of the run, what that version said of it)."""
    path = shutil.copytree(DATA / "run_8281a9f", tmp_path / "run")
    with np.load(DATA / "run_8281a9f.npz") as said:
        return path, dict(said)


@pytest.mark.smoke
def test_it_opens_and_says_what_it_said(old):
    path, said = old
    run = load_run(path)
    assert run.step == 4
    for mode in ("soft", "hard"):
        assert_close(run.logits(said["ids"], mode=mode), said[mode], what=mode)
    np.testing.assert_array_equal(run.routes(said["ids"], mode="hard").route, said["route"])


@pytest.mark.slow
def test_it_goes_on_to_where_it_would_have_come(old):
    path, said = old
    config = dict_to_config(read_config(path / "config.json"))
    last = train(prepare(config, path), progress=False)
    np.testing.assert_allclose(last["hard"]["nll"], said["nll"], rtol=1e-5)
    # Adam magnifies rounding, and two programs may round in another order.
    assert_close(load_run(path).logits(said["ids"], mode="soft"), said["resumed"], 1e-3)
