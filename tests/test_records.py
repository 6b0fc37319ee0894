"""The page of recorded runs is what its command writes; what the front door links to is there."""

from __future__ import annotations

import pathlib
import re

import pytest

from experiments.studies import records
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
