"""For test_fuzz.py: damaged run directories, and wrong words to the commands that open one."""

from __future__ import annotations

import json
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

from tests.fuzz_cases import SMOKE, Case
from tests.fuzz_sweeps import JSONS

OPENING = {"evaluate": (), "generate": ("--prompt=k3=v1 c0",), "report": ()}
"""Commands that open a run, with what they need besides."""

CHANGES: tuple[tuple[str, Any], ...] = (
    ("model", None), ("model", 3), ("model", []), ("data", "recall"), ("controller", {}),
    ("train.steps", "many"), ("train.steps", None), ("train.steps", 0), ("train.steps", 1.5),
    ("model.num_heads", 0), ("model.num_heads", -2), ("model.num_heads", True),
    ("model.num_heads", 3), ("model.num_heads", 4), ("model.model_dim", 64),
    ("model.model_dim", [32]), ("model.window", {}),
    ("model.num_layers", 3), ("model.num_layers", 10**12), ("model.mechanisms", "full"),
    ("model.mechanisms", [["full"], "local"]), ("model.mechanisms", ["full"]),
    ("model.mechanisms", None),
    ("model.mechanisms", ["full", "nonsense"]), ("model.dtype", "float99"), ("model.dtype", 3),
    ("controller.name", None), ("controller.name", "nonsense"), ("controller.fixed", []),
    ("controller.fixed", [3]), ("controller.temperature", 0), ("controller.hidden", "x"),
    ("prior.costs", 3), ("prior.costs", "1,2"), ("prior.costs", "measured"), ("prior.strength", -1),
    ("prior.strength", float("nan")), ("prior.strength", 1e300), ("prior.family", []),
    ("gate.kind", "nonsense"), ("gate.kind", None), ("gate.threshold", 2), ("gate.end", 0),
    ("data.corpus", None), ("data.corpus", 3), ("data.corpus", "nonsense"),
    ("data.sequence_length", 0), ("data.sequence_length", 10**10), ("data.batch_size", -1),
    ("data.num_keys", 0), ("data.num_pairs", 99), ("name", None), ("name", {}), ("seed", "x"),
    ("optimizer.learning_rate", None), ("parallel.mode", 3), ("objective.beta", "x"),
)
MISSING = ("model", "data", "controller", "prior", "gate", "train", "optimizer", "objective",
           "name", "model.num_heads", "model.mechanisms", "controller.name", "data.corpus",
           "prior.costs", "gate.threshold", "data.sequence_length", "seed",
           "optimizer.learning_rate")


def _change(tree: dict[str, Any], field: str, value: Any) -> None:
    *sections, name = field.split(".")
    for section in sections:
        tree = tree[section]
    if value is _change:
        del tree[name]
    else:
        tree[name] = value


def configs(draw: random.Random) -> list[Case]:
    """A stored config that lacks something, or that somebody has edited."""
    made = []
    for field, value in (*CHANGES, *((field, _change) for field in MISSING)):
        def edit(root, field=field, value=value):
            path = root / "run" / "config.json"
            stored = json.loads(path.read_text())
            _change(stored, field, value)
            path.write_text(json.dumps(stored))

        command = draw.choice(list(OPENING))
        if field.split(".")[0] == "data" and command == "generate":
            command = "evaluate"  # Generation needs no data.
        what = f"without {field}" if value is _change else f"{field} = {value!r}"
        argv = ("--workdir=run", *OPENING[command])
        made.append(Case(f"{command}: config.json {what}", command, argv, edit, True))
    for name, content in JSONS.items():
        def write(root, content=content):
            (root / "run" / "config.json").write_bytes(content)

        for command in ("train", draw.choice(list(OPENING))):
            argv = ("--workdir=run", *OPENING.get(command, (SMOKE,)))
            made.append(Case(f"{command}: config.json {name}", command, argv, write, True))
    return made


def _noise(path: pathlib.Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(max(16, path.stat().st_size)))


def _cut(path: pathlib.Path, draw: random.Random) -> None:
    # Less than parameters take of a state: where moments alone are lost, whoever reads parameters may go on, and which
    # of them lie in front is not the same every time.
    path.write_bytes(path.read_bytes()[: path.stat().st_size // draw.randint(8, 16)])


def _empty(path: pathlib.Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def _text(path: pathlib.Path, draw: random.Random) -> None:
    texts = ("[]", "null", '{"nll": "x"}', "{}", "not json", "3", '{"nll": NaN}')
    path.write_text(draw.choice(texts))


def _folder(path: pathlib.Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _gone(path: pathlib.Path, draw: random.Random) -> None:
    path.unlink()


def _files(root: pathlib.Path, patterns: tuple[str, ...]) -> list[pathlib.Path]:
    return sorted(p for pattern in patterns for p in (root / "run").glob(pattern) if p.is_file())


STATE = ("checkpoints/4/state/ocdbt.process_0/d/*", "checkpoints/4/state/manifest.ocdbt",
         "checkpoints/4/state/_METADATA", "checkpoints/4/state/d/*",
         "checkpoints/4/state/ocdbt.process_0/manifest.ocdbt")
DAMAGE: dict[str, tuple[tuple[str, ...], tuple[Callable, ...]]] = {
    "all of the state": (STATE, (_noise, _cut, _empty, _gone)),
    "the state's data": (STATE[:1], (_noise, _cut, _empty, _gone)),
    "the state's manifest": (STATE[1:2], (_noise, _cut, _empty, _gone)),
    "the state's metadata": (STATE[2:3], (_noise, _cut, _empty, _gone, _text)),
    "metrics": (("checkpoints/4/metrics/metrics",), (_noise, _cut, _empty, _text, _folder)),
    "tokenizer": (("tokenizer.json",), (_noise, _cut, _empty, _text, _folder, _gone)),
}


def files(draw: random.Random) -> list[Case]:
    """Files of a run that are damaged in many ways."""
    made = []
    for name, (patterns, ways) in DAMAGE.items():
        for way in ways:
            seed = draw.randrange(10**6)

            def damage(root, patterns=patterns, way=way, seed=seed):
                own = random.Random(seed)
                for path in _files(root, patterns):
                    way(path, own)

            for command in draw.sample(list(OPENING), 2):
                made.append(Case(f"{command}: {name} {way.__name__[1:]}", command,
                                 ("--workdir=run", *OPENING[command]), damage, True))
    return made


def _without(name: str) -> Callable[[pathlib.Path], None]:
    def remove(root):
        path = root / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return remove


def _emptied(name: str) -> Callable[[pathlib.Path], None]:
    def empty(root):
        shutil.rmtree(root / "run" / name)
        (root / "run" / name).mkdir()
    return empty


def _file_at(name: str) -> Callable[[pathlib.Path], None]:
    def replace(root):
        shutil.rmtree(root / "run" / name)
        (root / "run" / name).write_text("x")
    return replace


def _odd(root: pathlib.Path) -> None:
    (root / "file").write_text("text")
    (root / "empty").mkdir()
    (root / "other").mkdir()
    (root / "other" / "notes.txt").write_text("text")


def _other_data(root: pathlib.Path) -> None:
    path = root / "run" / "data_manifest.json"
    stored = json.loads(path.read_text())
    stored["recall"]["num_keys"] += 1
    path.write_text(json.dumps(stored))


def _log(text: str) -> Callable[[pathlib.Path], None]:
    def write(root):
        (root / "run" / "metrics.jsonl").write_text(text)
    return write


def folders(draw: random.Random) -> list[Case]:
    """What is no run, and runs that lack a part."""
    made = []
    for place in ("nowhere", "file", "empty", "other", "file/below", "", ".", "x" * 300,
                  "other/notes.txt"):
        for command in OPENING:
            made.append(Case(f"{command} of {place[:20]!r}", command,
                             (f"--workdir={place}", *OPENING[command]), _odd))
        if place in ("file", "other", "file/below", "x" * 300, "other/notes.txt"):
            made.append(Case(f"train in {place[:20]!r}", "train", (
                SMOKE, f"--workdir={place}"), _odd))
    broken = {
        "no checkpoints": _without("checkpoints"), "empty checkpoints": _emptied("checkpoints"),
        "checkpoints a file": _file_at("checkpoints"), "empty steps": lambda root: [
            _emptied(f"checkpoints/{step}")(root) for step in (2, 4)],
        "steps that are files": lambda root: [
            _file_at(f"checkpoints/{step}")(root) for step in (2, 4)],
        "no state": _without("checkpoints/4/state"), "empty state": _emptied("checkpoints/4/state"),
        "no config": _without("config.json"),
    }
    for name, damage in broken.items():
        for command in OPENING:
            argv = ("--workdir=run", *OPENING[command])
            made.append(Case(f"{command}: {name}", command, argv, damage, True))
    data = {"manifest of other data": _other_data}
    for name, content in JSONS.items():
        data[f"manifest {name}"] = lambda root, content=content: (
            root / "run" / "data_manifest.json").write_bytes(content)
    logs = {
        "no log": _without("metrics.jsonl"), "log empty": _log(""),
        "log of numbers": _log("1\n2\n"),
        "log of noise": _log("\x00\x01" * 99), "log cut": _log('{"event": "eval", "st'),
        "log without evaluation": _log('{"event": "start", "step": 0}\n'),
        "log with odd evaluation": _log('{"event": "eval", "step": 4}\n'),
        "log of odd types": _log('{"event": "eval", "step": "x", "hard": 3, "soft": []}\n'),
    }
    for name, damage in data.items():
        command = draw.choice(("evaluate", "report"))
        made.append(Case(f"{command}: {name}", command, ("--workdir=run",), damage, True))
    for name, damage in logs.items():
        made.append(Case(f"report: {name}", "report", ("--workdir=run",), damage, True))
    return made


GENERATE = (
    ("--prompt=",), ("--prompt= ",), ("--prompt=hello",), ("--prompt=k99=v1",),
    ("--prompt=k3=v1 c0 zz",),
    ("--prompt=\ud800",), ("--prompt=\udcff",), ("--prompt=\u00e9",), ("--prompt=k3=v1,c0",),
    ("--prompt",),    ("--prompt=K3=V1",), ("--prompt=" + "x" * 100_000,), (),
    *(("--prompt=c0", flag) for flag in (
        "--steps=0", "--steps=-1", "--steps=x", "--steps=1.5", "--steps=10000000000", "--steps=",
        "--temperature=0", "--temperature=-1", "--temperature=nan", "--temperature=inf",
        "--temperature=1e-50", "--temperature=1e39", "--temperature=x", "--top_k=0", "--top_k=-3",
        "--top_k=x", "--top_k=1.5", "--top_k=99999999999", "--top_p=0", "--top_p=-1", "--top_p=nan",
        "--top_p=1.01", "--top_p=x", "--threshold=nan", "--threshold=2", "--threshold=-1",
        "--threshold=x", "--seed=-1", "--seed=99999999999", "--seed=x", "--layer=-1", "--layer=1",
        "--layer=999", "--layer=x", "--mode=firm", "--mode=", "--mode=Hard", "--step=3", "--step=x",
        "--step=", "--step=-1", "--step=4.0", "--step=newest", "--color=red", "--show_routes=x",
        "--nothing", "--promt=x", "more", "--workdir", "--noworkdir",
    )),
)
EVALUATE = tuple((flag,) for flag in (
    "--split=tset", "--split=", "--split=Train", "--modes=soft,firm", "--modes=", "--modes=,",
    "--modes=soft hard", "--samples=-1", "--samples=few", "--samples=1.5", "--length=0",
    "--length=-5", "--length=x", "--length=6", "--length=99999999999", "--threshold=nan",
    "--threshold=1.5", "--threshold=x", "--max_batches=0", "--max_batches=-1", "--max_batches=x",
    "--step=3", "--step=bst", "--step=0", "--json=run", "--json=run/config.json/x.json",
    "--json=" + "x" * 300, "--lenght=4", "more", "--samples", "--nosamples",
))
REPORT = tuple((flag,) for flag in (
    "--out=run", "--out=run/config.json/x.html", "--out=" + "x" * 300, "--oot=x", "more", "--out",
))


def arguments(draw: random.Random) -> list[Case]:
    """Wrong prompts and flags for a whole run."""
    del draw
    made = []
    for command, lines in (("generate", GENERATE), ("evaluate", EVALUATE), ("report", REPORT)):
        for line in lines:
            shown = " ".join(line)[:60]
            argv = ("--workdir=run", *line)
            made.append(Case(f"{command} {shown}", command, argv, needs_run=True))
        made.append(Case(f"{command} without workdir", command, OPENING[command]))
    return made
