"""The sweep command: points, shards, resuming, divergence, results."""

from __future__ import annotations

import json

import pytest

from meta_attention_jax.training.logs import read_metrics
from tests.test_commands import check_mistake, check_success, command  # noqa: F401

CONFIG = '''
from configs import smoke
from meta_attention_jax.training.points import chain, point, product, sweep


def get_config():
    config = smoke.get_config()
    config.name = "try <i>"
    config.model.num_layers = 1
    config.controller.name = "softmax"
    config.train.steps = 6
    config.train.eval_every = config.train.checkpoint_every = 6
    return config


def get_sweep():
    return chain(
        product(sweep("optimizer.learning_rate", (1e-3, 3e-3, 1e30)), sweep("seed", (0, 1))),
        point(name="local", **{"controller.name": "fixed", "controller.fixed": ("local",)}),
    )
'''


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "sweep_try.py"
    path.write_text(CONFIG)
    return f"--config={path}"


@pytest.mark.slow
def test_shards_fill_one_directory_and_the_last_tells_all(command, config, tmp_path):  # noqa: F811
    root = tmp_path / "sweep"
    first = check_success(
        command("sweep", config, f"--workdir={root}", "--shard=0/2", "--test_batches=1")
    )
    assert not list(root.glob("points/*/test.json"))  # The test split waits for the last point.
    out = check_success(
        command("sweep", config, f"--workdir={root}", "--shard=1/2", "--test_batches=1")
    )
    names = [f"learning_rate={rate},seed={seed}" for rate in ("0.001", "0.003") for seed in (0, 1)]
    for name in [*names, "local"]:
        assert read_metrics(root / "points" / name)[-1]["step"] == 6
    for seed in (0, 1):
        assert "expected finite" in (root / "points" / f"learning_rate=1e+30,seed={seed}.diverged").read_text()
    rows = json.loads((root / "rows.json").read_text())
    assert len(rows) == 7
    tested = {row["setting"] for row in rows if "test" in row}
    assert len(tested) == 1 and tested.pop().startswith("learning_rate=0.00")
    table = (root / "table.md").read_text()
    assert table.count("chosen") == 1 and "local" in table
    for name in ("pareto.png", "against.png", "table.csv"):
        assert (root / name).stat().st_size > 0
    assert "runs of" in first + out and "as one program" in first + out
    # A point is an ordinary run.
    check_success(command(
        "evaluate", f"--workdir={root / 'points' / 'local'}", "--max_batches=1"
    ))
    for path, kind in ((root, "sweep"), (root / "points" / names[0], "run")):
        told = check_success(command("report", f"--workdir={path}"))
        assert told.startswith(f"{kind}: ")
        page = (path / "report" / "index.html").read_text()
        assert "<i>" not in page and "&lt;i&gt;" in page and "://" not in page
        assert "<script" not in page and "data:image/png;base64" in page
    again = check_success(command("sweep", config, f"--workdir={root}"))
    assert "as one program" not in again and "chosen:" in again


def test_a_report_of_nothing_is_one_line(command, tmp_path):  # noqa: F811
    check_mistake(command("report", f"--workdir={tmp_path}"), "workdir: expected the directory of")


def test_mistakes_come_before_any_work(command, config, tmp_path):  # noqa: F811
    check_mistake(
        command("sweep", "--config=configs/smoke.py", f"--workdir={tmp_path / 'a'}"),
        "get_sweep",
    )
    check_mistake(
        command("sweep", config, f"--workdir={tmp_path / 'b'}", "--shard=2/2"), "shard"
    )
    bad = tmp_path / "bad.py"
    bad.write_text(CONFIG.replace('"seed"', '"sede"'))
    check_mistake(
        command("sweep", f"--config={bad}", f"--workdir={tmp_path / 'c'}"), "sede"
    )
    check_mistake(
        command("sweep", config, f"--workdir={tmp_path / 'd'}", "--config.data.corpus=path:/none"),
        "/none",
    )
    assert not (tmp_path / "d").exists(), "the corrected command must be free to use it"
    assert not (tmp_path / "a").exists() and not (tmp_path / "c").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    check_mistake(command("sweep", config, f"--workdir={tmp_path / 'full'}"), "workdir")
