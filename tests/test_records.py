"""The page of recorded runs is what its command writes; what the front door links to is there."""

from __future__ import annotations

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from experiments.studies import records
from meta_attention_jax.run import Run
from tests.test_commands import ROOT


def test_the_tables_are_those_of_the_raw_rows():
    assert (records.RESULTS / "README.md").read_text(encoding="utf-8") == records.page()


def test_every_recorded_file_of_rows_is_shown():
    shown = {record.path.split("/")[0] for record in records.RECORDS}
    assert shown == {path.name for path in records.RESULTS.iterdir() if path.suffix != ".md"}


def anchors(path: pathlib.Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", [
    "README.md", "CONTRIBUTING.md", "experiments/results/README.md", "experiments/results/FINDINGS.md",
])
def test_links_lead_somewhere(name):
    path = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        found = path.parent / target if target else path
        assert found.exists(), link
        assert not anchor or anchor in anchors(found), link


def test_the_front_door_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_layer_of_the_front_door_stands_in_a_model():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    [snippet] = [block for block in blocks if "MetaAttention(" in block]

    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x, segment_ids):
            names = {"x": x, "segment_ids": segment_ids}
            exec(snippet, names)
            return names["y"]

    x, ids = jnp.ones((2, 9, 16)), jnp.ones((2, 9), jnp.int32)
    keys = {"params": jax.random.key(0), "routing": jax.random.key(1)}
    y, variables = jax.eval_shape(lambda: Parent().init_with_output(keys, x, ids))
    assert y.shape == x.shape and jax.tree.leaves(variables["params"])


def test_what_the_front_door_asks_of_a_run_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    asked = set(re.findall(r"^run\.(\w+)", text, re.MULTILINE)) | {"at_budget"}
    assert len(asked) > 6 and all(hasattr(Run, name) for name in asked)
