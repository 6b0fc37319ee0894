"""Every notebook runs from its first cell to its last, as its reader would run it."""

import os
import pathlib
import re

import jupytext
import nbclient
import pytest

from configs import retrofit_smollm2
from meta_attention_jax import load_run
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.loop import train
from tests import making

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.py"))

SMALL = {
    "01_open_a_run": {"STEPS": 20},
    "02_routing_maps": {"STEPS": 20},
    "03_uncertainty": {"STEPS": 20},
    "04_sweep": {"STEPS": 6, "STRENGTHS": (0.5, 8.0), "SEEDS": (0,)},
    "05_layer_in_your_model": {"STEPS": 3},
    "06_route_a_pretrained_model": {"STEPS": 3},
}


def exported(place):
    """A small published model, routed and exported."""
    making.published(place / "model", context=2048)
    (place / "text").mkdir()
    for split in ("train", "valid", "test"):
        (place / "text" / f"{split}.txt").write_text(f"some words of the {split} text.\n" * 400)
    config = retrofit_smollm2.get_config()
    config.update_from_flattened_dict({
        "retrofit.backbone": str(place / "model"), "retrofit.local_steps": 0, "data.corpus": f"path:{place / 'text'}",
        "data.tasks": ("prose",), "data.shares": (1.0,), "data.sequence_length": 64, "parallel.devices": 1,
        "model.window": 8, "train.steps": 10, "data.batch_size": 1, "train.eval_batches": 1,
    })
    train(prepare(config, place / "routed"), progress=False)
    load_run(place / "routed").export(place / "export")
    return place / "export"


def with_parameters(notebook, values):
    """Sets the names of the cell that is tagged so; each must be there."""
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    for name, value in values.items():
        cell.source, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", cell.source)
        assert count == 1, name


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = jupytext.read(path)
    values = dict(SMALL[path.stem])
    source = path.read_text()
    if "WORKDIR" in source:
        values["WORKDIR"] = str(tmp_path / "run")  # Absolute: ROOT / WORKDIR is WORKDIR.
    if "EXISTING" in source:
        values["EXISTING"] = str(tmp_path / "none")
    if "CONTROLLERS" in source:  # The published model is none of what the tests install.
        values["CONTROLLERS"] = str(exported(tmp_path))
    with_parameters(notebook, values)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert len(prose) >= 3
    if "analysis." in source or "figures[" in source:
        kinds = {kind for cell in code for output in cell.outputs for kind in output.get("data", {})}
        assert "image/png" in kinds, "figures show themselves"
