"""For test_fuzz.py: sweeps that are none, and damaged files of comparisons."""

from __future__ import annotations

import random

from tests.fuzz_cases import SMOKE, Case

JSONS = {
    "empty": b"", "text": b"not json", "list": b"[]", "number": b"3", "null": b"null",
    "object": b"{}", "cut": b'{"config": {"name": "x"', "latin": b'{"\xe9": 1}',
    "zeros": b"\0" * 64,
    "deep": b"[" * 100_000, "points": b'{"config": 3, "points": [1]}',
    "inner": b'{"config": {"name": 3}, "points": {"a": 3}}', "huge": b"1" * 5000,
}

SWEEPS = (
    "[]", "None", "[3]", "[{}, {}]", "[{'zzz': 1}]", "[{'train.steps': 'many'}]",
    "[{'seed': None}]", "[{'seed': -1}]", "[{'prior.strength': -1.0}]", "[{'train': 3}]",
    "[{'train.steps': 0}]",
    "[{'prior.strength': float('nan')}]", "1 / 0", "nothing", "[{1: 2}]", "[{'seed': [1]}]",
    "[{'train.init_from': 'nowhere'}]", "[{'data.corpus': 'path:nowhere'}]", "[{'name': 3}]",
    "[{'model.num_heads': 3}]", "[{'controller.fixed': ('nonsense',)}]", "({'seed': 1},)",
    "[{'seed': True}, {'seed': 2}]", "[{'name': '..'}]", "[{'name': 'x' * 999}]",
)


def sweep_arguments(draw: random.Random) -> list[Case]:
    """get_sweep() of something else, and wrong flags of the command."""
    del draw
    head = "from configs import smoke\n\n\ndef get_config():\n    return smoke.get_config()\n"
    made = []
    for value in SWEEPS:
        def write(root, value=value):
            (root / "s.py").write_text(f"{head}\n\ndef get_sweep():\n    return {value}\n")
        made.append(Case(f"sweep of {value}", "sweep", ("--config=s.py", "--workdir=new"), write))

    def whole(root):
        points = "[{'seed': 0}, {'seed': 1}]"
        (root / "s.py").write_text(f"{head}\n\ndef get_sweep():\n    return {points}\n")
        (root / "file").write_text("x")
        (root / "other").mkdir()
        (root / "other" / "file").write_text("x")

    for argv in (
        ["--group=1"], ["--group=a"], ["--group="], ["--group=-1"], ["--group=0.5"], ["--group"],
        ["--engine=slurm"], ["--engine="], ["--address=auto"], ["--devices_per_group=0"],
        ["--points_at_once=-1"], ["--points_at_once=x"], ["--test_batches=-1"], ["--together=x"],
        ["--test_batches=1.5"], ["--config.seed=x"], ["--config.train.steps=-3"], ["more"],
        ["--workdir=file"], ["--workdir=other"], ["--workdir=file/below"], ["--workdir="],
        ["--search=bayes"], ["--search=optuna"], ["--trials=2"], ["--sampler=tpe"], ["--search=optuna", "--trials=0"],
        ["--nothing"], ["--config.zzz=1"], ["--config.train.init_from=nowhere"],
    ):
        line = ("--config=s.py", "--workdir=new", *argv)
        made.append(Case(f"sweep {argv}", "sweep", line, whole))
    made.append(Case("sweep without get_sweep", "sweep", (SMOKE, "--workdir=new")))
    for name, content in JSONS.items():
        def damaged(root, content=content):
            whole(root)
            (root / "new").mkdir()
            (root / "new" / "sweep.json").write_bytes(content)
        for command, argv in (("sweep", ("--config=s.py",)), ("report", ())):
            line = ("--workdir=new", *argv)
            made.append(Case(f"{command}: sweep.json {name}", command, line, damaged))
    for name, content in JSONS.items():
        def damaged(root, content=content):
            (root / "new").mkdir()
            (root / "new" / "ablation.json").write_bytes(content)
        made.append(Case(f"report: ablation.json {name}", "report", ("--workdir=new",), damaged))
    return made
