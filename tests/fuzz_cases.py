"""For test_fuzz.py: bad inputs, drawn from a seed."""

from __future__ import annotations

import dataclasses
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

from configs import smoke

ROOT = pathlib.Path(__file__).parent.parent
SMOKE = f"--config={ROOT}/configs/smoke.py"


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line that is a mistake, in a folder that `made` prepares.

    The folder has `run`, a trained run, if the case `needs_run`; names in `argv` are relative
    to it.
    """

    name: str
    command: str
    argv: tuple[str, ...]
    made: Callable[[pathlib.Path], Any] = lambda root: None
    needs_run: bool = False


def fields(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


FIELDS = dict(fields(smoke.get_config().to_dict()))

ZERO_IS_FINE = {
    "seed", "data.seed", "data.min_distance", "data.num_marks", "data.mark_rate",
    "data.aggregate_rate", "data.needles", "model.mlp_dim", "controller.entropy_bonus", "objective.beta",
    "objective.beta_warmup", "gate.start", "gate.threshold", "gate.price", "optimizer.warmup",
    "optimizer.final_fraction", "optimizer.weight_decay", "optimizer.clip",
    "train.packed_dense_rows", "train.profile_step", "parallel.devices", "model.sinks",
    "retrofit.lora_rank", "retrofit.local_steps", "retrofit.local_beta",
}
LIMITLESS = {"seed", "data.seed"}
ANY_TEXT = {"name"}
ANY_SIGN = {"gate.price"}

WRONG = {
    int: ("many", "1.5", "", "nan", "1e3", "0x", "-"),
    float: ("much", "", "1,5", "0..1", "nan", "inf", "-inf", "1e39", "-1e-3", "1e999"),
    bool: ("maybe", "2", "None", "-1"),
    str: ("nonsense", "", "None", "0", "adam w", "\u00fcber", "path:", "x" * 5000),
    tuple: ("", "()", "5", "('full',", "full,local", "('full', 'full')", "('ful', 'local')", "None",
            "(('full',), 'local')", "{'full': 1}", "(1, 2)", "(None,)"),
}


def config_values(draw: random.Random) -> list[Case]:
    """Every field with every wrong value of its type."""
    made = []
    for field, default in FIELDS.items():
        kind = type(default)
        values = list(WRONG[kind])
        if kind in (int, float):
            values.append(f"-{draw.randint(2, 10**6)}" if kind is int else f"-{draw.random():.3f}")
            if field not in ZERO_IS_FINE:
                values += ["0", "1e-50"] if kind is float else ["0"]
        if kind is int:
            values += [str(10 ** draw.randint(15, 40))]
            if field not in LIMITLESS:
                values += [str(2**31)]
        if field in ANY_TEXT:
            continue
        if field in ANY_SIGN:
            values = [value for value in values if value[:1] != "-" or value == "-inf"]
        if field in ("train.init_from", "retrofit.backbone"):
            values.remove("")
        if field == "controller.fixed":
            values += ["('nonsense',)"]
            values = [v for v in values if v not in ("('full', 'full')", "{'full': 1}")]
        if field == "train.trackers":
            values.remove("()")  # Shown nowhere.
        if field == "data.shares":
            values.remove("5")  # As good as one share of 1.
        for value in values:
            if kind is float and value == "-0.000":
                continue
            made.append(Case(f"--config.{field}={value[:40]}", "train", (
                SMOKE, "--workdir=new", f"--config.{field}={value}")))
    return made


def config_names(draw: random.Random) -> list[Case]:
    """Fields that there are not, some of them nearly."""
    made = []
    for field in FIELDS:
        at = draw.randrange(len(field))
        near = field[:at] + draw.choice("xyz_") + field[at + draw.randint(0, 1):]
        if near not in FIELDS:
            made.append(near)
    made += ["train", "model", "steps", "train.steps.more", "train.", "data.corpus.x", "controller"]
    return [Case(f"--config.{name}", "train", (SMOKE, "--workdir=new", f"--config.{name}=1"))
            for name in made]


TOGETHER = (
    {"model.model_dim": 30}, {"model.num_heads": 3}, {"model.num_heads": 32},
    {"model.num_kv_heads": 4}, {"model.num_heads": 4, "model.num_kv_heads": 3},
    {"model.model_dim": 2**30, "model.num_heads": 1, "model.num_kv_heads": 1},
    {"model.num_layers": 10**9}, {"data.batch_size": 10**9}, {"data.sequence_length": 10**9},
    {"data.num_keys": 10**5, "data.num_values": 10**5}, {"model.mlp_dim": 10**9},
    {"controller.hidden": 2 * 10**9}, {"data.num_marks": 10**9, "data.mark_rate": 0.1,
                                        "data.aggregate_rate": 0.1},
    {"data.batch_size": 7, "optimizer.accumulate": 2}, {"optimizer.accumulate": 16},
    {"parallel.devices": 2000}, {"parallel.mode": "mesh"}, {"data.num_pairs": 17},
    {"data.num_keys": 3}, {"data.sequence_length": 5}, {"model.window": 40},
    {"data.min_distance": 1}, {"data.min_distance": 64}, {"data.num_marks": 1},
    {"data.num_marks": 4}, {"data.mark_rate": 0.2}, {"data.aggregate_rate": 0.2},
    {"data.query_rate": 0.5, "data.num_marks": 4, "data.mark_rate": 0.3,
     "data.aggregate_rate": 0.3},
    {"train.packed": True, "gate.kind": "none"}, {"train.packed": True, "gate.end": 1.0},
    {"train.packed": True, "gate.threshold": 0.5}, {"train.packed": True, "gate.kind": "settled"},
    {"train.packed": True, "controller.name": "fixed"},
    {"model.scan_layers": True, "controller.name": "fixed", "controller.fixed": "('full','local')"},
    {"controller.name": "fixed", "model.mechanisms": "('full','linear')",
     "controller.fixed": "('local',)"},
    {"controller.name": "softmax", "controller.uncertainty": "vacuity"},
    {"controller.name": "gumbel", "controller.uncertainty": "mutual_information"},
    {"gate.start": 0.8, "gate.end": 0.4}, {"gate.start": 0.5, "gate.end": 0.5},
    {"gate.end": 0.41, "train.steps": 3}, {"train.profile_step": 30}, {"train.profile_step": -2},
    {"prior.costs": "1,1"}, {"prior.costs": "1,0,1"}, {"prior.costs": "1,nan,1"},
    {"prior.costs": "1,inf,1"}, {"prior.costs": "1,-1,1"}, {"prior.costs": "1,,1"},
    {"prior.costs": "1e39,1,1"}, {"prior.costs": "1,1e-50,1"}, {"prior.costs": "a,b,c"},
    {"prior.costs": "1;2;3"}, {"prior.costs": "expensive"}, {"model.implementation": "cudnn"},
    {"model.dtype": "float16"}, {"model.mechanisms": "('full',)"}, {"data.tokenizer": "bpe",
     "data.corpus": "path:text.txt", "data.vocab_size": 100},
    {"data.tokenizer": "bpe", "data.corpus": "path:text.txt", "data.vocab_size": 10**6},
    {"data.tokenizer": "bpe", "data.corpus": "path:text.txt", "data.vocab_size": 260,
     "data.sequence_length": 10**5},
    {"data.tokenizer": "words", "data.corpus": "path:text.txt"},
    {"data.corpus": "path:text.txt", "data.sequence_length": 10**5},
    {"data.tasks": "('repeat',)"}, {"data.tasks": "('prose', 'lookup')"}, {"data.shares": "(0.5, 0.5)"},
    {"data.tasks": "('lookup',)", "data.corpus": "path:text.txt", "data.sequence_length": 64},
    {"data.tasks": "('repeat',)", "data.corpus": "path:text.txt", "data.min_distance": 10**4},
    {"data.tasks": "('prose', 'repeat')", "data.corpus": "path:text.txt"}, {"data.needles": 10**6},
    {"data.tokenizer": "model", "data.corpus": "path:text.txt"},
    {"train.init_from": "nowhere"}, {"train.init_from": "text.txt"}, {"train.init_from": "."},
    {"controller.temperature": 1e-38, "controller.temperature_start": 1e38},
    {"seed": 2**63}, {"data.seed": -2},
)
"""Fields that do not go together, or ask for more than any machine has."""


def text(root: pathlib.Path) -> None:
    (root / "text.txt").write_text("a line of text, and not much of it\n" * 200)


def config_pairs(draw: random.Random) -> list[Case]:
    del draw
    return [
        Case(str(changes), "train", (SMOKE, "--workdir=new", *(
            f"--config.{field}={value}" for field, value in changes.items())), text)
        for changes in TOGETHER
    ]


CONFIG_FILES = {
    "empty": "", "no function": "x = 1\n", "syntax": "def get_config(:\n", "indent": "  x\n y\n",
    "name": "def get_config():\n    return nothing\n", "division": "1 / 0\n",
    "raises": "def get_config():\n    raise RuntimeError('no')\n",
    "import": "import nothing_of_this_name\n", "not a function": "get_config = 3\n",
    "argument": "def get_config(x):\n    return x\n", "zero": "\0", "latin": "# \xe9\n",
    **{f"returns {value}": f"def get_config():\n    return {value}\n"
       for value in ("None", "3", "'text'", "[]", "{}", "dict(train=dict(steps=3))")},
}

CHANGED = (
    "train.steps = None", "train.steps = True", "train.strps = 3", "new = 1", "train = None",
    "data.corpus = None", "name = None", "seed = None", "gate.kind = None", "prior.strength = None",
    "model.mechanisms = None", "model.mechanisms = ('full', None)",
    "model.mechanisms = (['full'],'x')",
    "controller.fixed = ('full', 3)", "model.scan_layers = None", "prior.costs = None",
    "train.init_from = None", "objective.beta = float('nan')", "prior.preference = 10.0**400",
    "data.min_distance = None", "data.query_rate = None", "data.seed = None", "train.packed = None",
    "parallel.mode = None", "optimizer.clip = None", "data.tokenizer = None", "gate.start = True",
    "train.profile_step = None", "model.remat = None", "data.corpus = 'path:a\\0b'",
    "train.init_from = 'a\\0b'",
)
DELETED = ("train", "model", "data.corpus", "train.steps", "controller.name", "prior.strength",
           "gate.kind", "optimizer.name", "name", "seed", "parallel.devices", "data.batch_size")


def config_files(draw: random.Random) -> list[Case]:
    """Config files that are none, or that set fields as the command line could not."""
    bodies = dict(CONFIG_FILES)
    head = "from configs import smoke\n\n\ndef get_config():\n    c = smoke.get_config()\n"
    sweep = ("\n\ndef get_sweep():\n    return [{'seed': 0}, {'seed': 1}]\n")
    for change in CHANGED:
        bodies[change] = f"{head}    c.{change}\n    return c\n"
    for field in DELETED:
        bodies[f"del {field}"] = f"{head}    del c.{field}\n    return c\n"
    made = []
    for name, body in bodies.items():
        command = draw.choice(("train", "train", "sweep"))
        body += sweep if command == "sweep" and "get_config" in body else ""

        def write(root, body=body):
            encoding = "latin-1" if "\xe9" in body else "utf-8"
            (root / "c.py").write_text(body, encoding=encoding)

        argv = ("--config=c.py", "--workdir=new")
        made.append(Case(f"config file: {name}", command, argv, write))
    for config in ("none.py", ".", "", "text.txt"):
        argv = (f"--config={config}", "--workdir=new")
        made.append(Case(f"config file {config!r}", "train", argv, text))
    return made


TEXTS: dict[str, bytes] = {
    "empty": b"", "zero": b"\0", "binary": bytes(range(256)) * 40, "not UTF-8": b"ab\xff\n" * 999,
    "cut UTF-8": "é".encode()[:1], "UTF-16": "a line\n".encode("utf-16") * 99, "one letter": b"x",
    "one short line": b"hello\n", "one line": b"hello, hello", "line ends": b"\n" * 20,
}


def corpora(draw: random.Random) -> list[Case]:
    """Files and folders that are no text, or too little of it."""
    made = []
    for name, content in TEXTS.items():
        for place in ("text.txt", "folder"):
            def write(root, content=content, place=place):
                (root / "folder").mkdir()
                (root / place / "a.txt" if place == "folder" else root / place).write_bytes(content)
            made.append(Case(f"text: {name} in {place}", "train", (
                SMOKE, "--workdir=new", f"--config.data.corpus=path:{place}"), write))
        for split in ("train", "valid", "test"):
            short = ("one letter", "one short line", "one line", "line ends")
            if name in short and split != "train":
                continue

            def write(root, content=content, split=split):
                for other in ("train", "valid", "test"):
                    (root / f"{other}.txt").write_bytes(b"enough text for a sequence\n" * 40)
                (root / f"{split}.txt").write_bytes(content)
            if name not in ("one line",):
                made.append(Case(f"text: {name} in {split}", "train", (
                    SMOKE, "--workdir=new", "--config.data.corpus=path:train.txt"), write))

    def mixed(root):
        for place in ("data/train/a", "data/test/a", "data/notes"):
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (root / place).write_text(f"text of {place}\n" * 40)

    for place, rule in (("data", "auto"), ("data", "names"), ("data/train", "names"),
                        ("data/notes", "names"), ("data/notes", "no"), ("data", "")):
        made.append(Case(f"split {rule!r} of {place}", "train", (
            SMOKE, "--workdir=new", f"--config.data.corpus=path:{place}",
            f"--config.data.split={rule}"), mixed))
    for corpus in ("recall", "sotu", "stdlib", "hf:a/b"):
        made.append(Case(f"split of {corpus}", "train", (
            SMOKE, "--workdir=new", f"--config.data.corpus={corpus}", "--config.data.split=hash")))
    names = ["path:", "path:nowhere", "path:folder", "path:" + "x" * 300, "path:text.txt/x", "hf:",
             "hf:a/b/c/d", "hf:nowhere", "file:text.txt", "text.txt", "recal", "Path:text.txt",
             "path:" + "/".join(["y"] * 3000), "path: text.txt", "path:\ud800"]

    def folder(root):
        text(root)
        (root / "folder").mkdir()
        (root / "folder" / ".hidden.txt").write_text("text\n" * 99)
    made += [Case(f"corpus {name[:40]!r}", "train", (
        SMOKE, "--workdir=new", f"--config.data.corpus={name}"), folder) for name in names]
    for noise in range(6):
        content = draw.randbytes(draw.randint(40, 4000)) + b"\xff"

        def write(root, content=content):
            (root / "text.txt").write_bytes(content)
        made.append(Case(f"text: noise {noise}", "train", (
            SMOKE, "--workdir=new", "--config.data.corpus=path:text.txt"), write))
    return made
