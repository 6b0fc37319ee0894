"""The record of the comparison on a published model: rows as they come, what they say, and how it is shown."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.studies.pretrained import differences, plan, report, study


def test_a_record_goes_on_from_whole_rows(tmp_path):
    about = {"length": 512}
    record = study.Record(tmp_path, about)
    row = {"kind": "prose", "window": 0, "arm": "full", "seed": 0, "nll": 1.0}
    record.add(row)
    assert record.choose("order", lambda: [1, 2]) == [1, 2]
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"kind": "pro')
    again = study.Record(tmp_path, about)
    assert again.rows == [row] and again.choose("order", lambda: 1 / 0) == [1, 2]
    assert study.key_of(row) in again.done
    again.add({**row, "window": 1})
    assert len(study.read_rows(tmp_path / "rows.jsonl")) == 2
    with pytest.raises(ValueError, match="^out: expected a record of {'length': 256}, got {'length': 512}"):
        study.Record(tmp_path, {"length": 256})


ABOUT = {"backbone": {"path": "package:x"}, "length": 512, "window": 64, "sinks": 4}


def made_rows():
    """Rows whose truth is known: a router that is 0.1 above full attention, a pattern that falls by what it gets."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        document = number % 8
        base = 3.0 + rng.normal() + document

        def add(arm, nll, share, seed=-1):
            rows.append({
                "kind": "prose", "window": number, "document": document, "arm": arm, "seed": seed,  # noqa: B023
                "asked": share, "share": share, "keys": share, "tokens": 448, "nll": nll, "exact": None,
            })

        add("full", base, 1.0)
        add("local", base + 1.0, 0.0)
        add("best layers@0.2", base + 0.6, 0.2)
        add("best layers@0.5", base + 0.3, 0.5)
        for seed in range(3):
            add("bayesian@0.3", base + 0.1 + 0.01 * (seed - 1) + 0.02 * rng.normal(), 0.35, seed)
        add("local bayesian@0.3", base + 0.2, 0.3, number % 3)
        add("bayesian shuffled@0.3", base + 0.4, 0.35, number % 3)
    return rows


def test_settings_of_another_record_are_taken_over_and_never_mixed(tmp_path):
    first = study.Record(tmp_path / "first", {"backbone": {"path": "a"}})
    second = study.Record(tmp_path / "second", {"backbone": {"path": "b"}})
    with pytest.raises(ValueError, match="^settings: expected another record than out, got "):
        second.take_settings(tmp_path / "second")
    with pytest.raises(ValueError, match="^settings: expected a folder with a choices.json, got "):
        second.take_settings(tmp_path / "first")
    first.choose("layers", lambda: [1])
    with pytest.raises(ValueError, match="^settings: expected chosen ones in .*choices.json, got 'none yet'"):
        second.take_settings(tmp_path / "first")
    first.choose("grid", lambda: [{"arm": "bayesian"}])
    first.choose("end to end bayesian 0.001", lambda: {"left": 0.04})
    second.take_settings(tmp_path / "first")
    second.take_settings(tmp_path / "first")
    assert "layers" not in second.choices and second.choices["settings of"] == "a"
    assert all(second.choices[name] == first.choices[name] for name in ("grid", "end to end bayesian 0.001"))
    third = study.Record(tmp_path / "third", {"backbone": {"path": "b"}})
    third.choose("grid", lambda: [])
    with pytest.raises(ValueError, match="^settings: expected 'grid' as this record has it already, got 'another in "):
        third.take_settings(tmp_path / "first")


@pytest.mark.parametrize("kind, number, arm, seed, turn, wanted", [
    ("prose", 19, "position@0.3", -1, 0, True), ("prose", 20, "position@0.3", -1, 0, False),
    ("prose", 19, "bayesian@0.3", 1, 0, True), ("prose", 20, "bayesian@0.3", 1, 0, False),
    ("prose", 20, "bayesian@0.3", 1, 1, True), ("prose", 99, "full", -1, 1, True),
    ("code", 19, "full", -1, 0, True), ("code", 20, "full", -1, 0, False), ("code", 0, "position@0.3", -1, 0, False),
])
def test_of_further_windows_the_deciding_arms_read_the_main_kinds_by_seeds_in_turn(
    kind, number, arm, seed, turn, wanted
):
    assert plan.wanted(kind, number, arm, seed, turn) == wanted


def test_a_window_counts_once_by_however_many_seeds_it_was_read():
    def row(window, arm, seed, nll, share=0.3):
        return {"kind": "prose", "window": window, "document": window, "arm": arm, "seed": seed, "nll": nll,
                "share": share, "keys": share, "tokens": 10, "exact": None}

    both = plan.FOR_SEEDS
    rows = [row(window, "full", -1, 1.0, 1.0) for window in range(2 * both)]
    rows += [  # 0.3 above, on average.
        row(window, "bayesian@0.3", seed, 1.2 + 0.1 * seed, 0.1) for window in range(both) for seed in range(3)
    ]
    rows += [row(window, "bayesian@0.3", window % 3, 1.5) for window in range(both, 2 * both)]
    [mine] = [line for line in differences.summary(rows) if line["arm"] == "bayesian@0.3"]
    assert mine["above"] == pytest.approx((0.3 + 0.5) / 2) and mine["nll"] == pytest.approx(1.4)
    assert mine["share"] == pytest.approx((0.1 + 0.3) / 2) and mine["windows"] == 2 * both
    # Over seeds where all have read: 0.2, 0.3 and 0.4, whose t-interval is 4.303 * 0.1 / sqrt(3).
    assert mine["seed_pm"] == pytest.approx(0.2484, abs=1e-4) and mine["seed_mean"] == pytest.approx(0.3)
    peer = [{**one, "arm": "best layers@0.5"} for one in rows if one["arm"] == "full"]
    between = differences.contrast(rows + peer, "prose", "bayesian@0.3", "best layers@0.5")
    assert between["difference"] == pytest.approx(mine["above"])
    assert between["seed_pm"] == pytest.approx(mine["seed_pm"])
    few = [one for one in rows if one["window"]]
    [mine] = [line for line in differences.summary(few) if line["arm"] == "bayesian@0.3"]
    assert mine["seed_pm"] is None


def test_tables_say_what_the_rows_do(tmp_path):
    rows = made_rows()
    by = {line["arm"]: line for line in differences.summary(rows)}
    assert by["full"]["above"] == 0 and by["local"]["above"] == pytest.approx(1.0)
    mine = by["bayesian@0.3"]
    assert mine["above_low"] < 0.1 < mine["above_high"] and mine["seeds"] == 3 and mine["windows"] == 40
    assert 0.01 < mine["seed_pm"] < 0.05  # t of two degrees of freedom, of seeds 0.01 apart.
    between = {(row["arm"], row["other"]): row for row in differences.contrasts(rows)}
    # At 35 %, half-way between 0.6 at 20 % and 0.3 at 50 %.
    row = between["bayesian@0.3", "best layers"]
    assert row["difference"] == pytest.approx(0.1 - 0.45, abs=0.01) and row["other_share"] == pytest.approx(0.35)
    assert 0.01 < row["seed_pm"] < 0.05 and row["windows"] == 40
    # Below 20 % the pattern was not read.
    few = [{**row, "share": 0.1} if row["arm"] == "bayesian@0.3" and row["window"] < 30 else row for row in rows]
    assert differences.contrast(few, "prose", "bayesian@0.3", "best layers")["windows"] == 10
    row = between["bayesian@0.3", "bayesian shuffled@0.3"]  # Of one seed a window, as is what it is held against.
    assert row["low"] < -0.3 < row["high"] < -0.2 and row["windows"] == 40
    assert by["local bayesian@0.3"]["seed_pm"] is None
    assert between["local bayesian@0.3", "best layers"]["windows"] == 40
    lines = [{**by[arm], "task": kind} for arm in ("bayesian@0.3", "best layers@0.5") for kind in plan.MAIN]
    lines += [{**by["local"], "task": kind} for kind in plan.MAIN] + [{**by["bayesian shuffled@0.3"], "task": "prose"}]
    assert [(line["arm"], line["met"]) for line in differences.goal(lines)] == [
        ("bayesian@0.3", "no"), ("best layers@0.5", "no")
    ]
    for above, high, met in ((0.04, 0.049, "yes"), (0.04, 0.06, "open")):
        near = [{**by["bayesian@0.3"], "task": kind, "above": above, "above_low": 0.03, "above_high": high}
                for kind in plan.MAIN]
        assert differences.goal(near)[0]["met"] == met
    study.Record(tmp_path, ABOUT).choose(
        "grid", lambda: [
            {"arm": "bayesian", "strength": 2.0, "beta": beta, "learning_rate": 1e-3, "entropy_bonus": 0.0,
             "left@0.2": left, "left@0.3": left, "share": 0.1} for beta, left in ((0.1, 0.4), (0.3, 0.3))
        ],
    )
    record = study.Record(tmp_path, ABOUT)
    for name, found in {
        "doubt bayesian": [
            dict(kind="prose", harm="full", measure="vacuity", gain=0.25, low=0.2, high=0.3, mean_harm=0.1,
                 coverage=[0, 0.5, 1], risk=[0.0, 0.05, 0.1])
        ],
        "calibration": [dict(kind="prose", arm="bayesian", seed=s, ece=0.1 * s, brier=0.2, mean=0.3, labelled=0.1,
                             predicted=[0.1, 0.9], rate=[0.2, 0.7], count=[90, 10]) for s in range(3)],
        **{f"scarce 1 {s}": [dict(arm=arm, data=f"1 {s}", windows=1, strength=2.0, preference=0.1, beta=0.1,
                                  share=0.2, entropy=0.5, vacuity=0.4) | {"left@0.2": left, "left@0.3": left - 0.1}
                             for arm, left in (("bayesian", 0.1 + 0.1 * s), ("cost_penalty", 0.15 + 0.1 * s))]
           for s in range(3)},
        "steps bayesian 0.003": [
            {"step": 50, "kinds": {"tokens": [9, 0, 0, 1], "nll": [3.5, 0, 0, 1], "fractions": [[[0.4, 0.6]] * 4] * 2}}
        ],
    }.items():
        record.find(name, lambda: found)  # noqa: B023
    assert study.Record(tmp_path, ABOUT).found == record.found
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("share", "risk", "reliability"))
    assert "| kappa 2, beta 0.3, rate 0.001, rho 0 |" in page and page.count("| 20%, 30%") == 1
    assert "+0.0" in page and "nan" not in page
    for cell in ("25.0% | 20.0% to 30.0%", "|     3 | 0.100 |", "20.0% ± 24.8%", "-5.0% ± 0.0%", "|   50 | prose | 3.5000 |"):
        assert cell in page, cell
