"""A run does not die of its own output: closed streams, other encodings, names that libraries parse."""

from __future__ import annotations

import errno
import io
import os
import pty
import select
import subprocess
import sys
import threading
import time
import warnings

import pytest

from experiments import common
from experiments.studies import outcome, reports
from meta_attention_jax import analysis, console
from meta_attention_jax.analysis import canvas
from meta_attention_jax.console import Tolerant, say
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.logs import Progress
from meta_attention_jax.training.loop import train
from tests.test_commands import ROOT, SMOKE, environment
from tests.test_faults import light

NAMES = ("[/x]", "[red]", "cost $5 or $6", "$_{$", "ü – 漢字", "\udce9", "a\\b{", "_hidden", "%d {0}")
"""What rich takes for markup, matplotlib for mathematics, encodings for nothing at all."""


def broken_pipe():
    read, write = os.pipe()
    os.close(read)
    return open(write, "w", encoding="utf-8")


class Failing(io.StringIO):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


BROKEN = {
    "closed pipe": broken_pipe,
    "closed": closed,
    "none": lambda: None,
    "gone terminal": lambda: Failing(errno.EIO),
    "full disk": lambda: Failing(errno.ENOSPC),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_nothing_is_raised_by_a_stream_that_takes_nothing(kind, monkeypatch):
    stream = BROKEN[kind]()
    monkeypatch.setattr(sys, "stdout", stream)
    for _ in range(3):
        say("words")
    line = Progress("name", total=2, start=0, tokens_per_step=1)
    for step in (1, 2):
        line.update(step, "status")
    line.say("words")
    line.close()
    tolerant = Tolerant(stream)
    print("words" * 10_000, file=tolerant, flush=True)
    assert not tolerant.isatty()
    if kind == "closed pipe":
        stream.close()


def no_waiting_pipe():
    """A pipe that is full after its 64 KiB or so, its reading end, and a stream that writes into it."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    return read, open(write, "w", encoding="utf-8")


@pytest.mark.parametrize("size", [10, 5_000, 400_000])
def test_a_pipe_that_does_not_block_gets_all_of_it(size):
    read, stream = no_waiting_pipe()
    words = "".join(f"{i} é\n" for i in range(size))
    got = []

    def slow():
        time.sleep(0.2)
        while piece := os.read(read, 30_000):
            got.append(piece)

    reader = threading.Thread(target=slow)
    reader.start()
    tolerant = Tolerant(stream)
    print(words, file=tolerant, end="")
    print("and this", file=tolerant, end="", flush=True)
    stream.close()
    reader.join(30)
    os.close(read)
    assert b"".join(got).decode() == f"{words}and this" and tolerant.lost is None


def test_a_pipe_whose_reader_sleeps_is_waited_for_once_and_heard_again(monkeypatch):
    monkeypatch.setattr(console, "PATIENCE", 0.3)
    read, stream = no_waiting_pipe()
    tolerant = Tolerant(stream)
    began = time.monotonic()
    for _ in range(50):
        print("x" * 10_000, file=tolerant, flush=True)
    assert 0.3 <= time.monotonic() - began < 5
    assert tolerant.lost.errno == errno.EAGAIN
    os.set_blocking(read, False)
    while select.select([read], [], [], 0.1)[0] and os.read(read, 1 << 20):
        pass
    print("here again", file=tolerant, flush=True)
    assert os.read(read, 1 << 20).endswith(b"here again\n")
    stream.close()
    os.close(read)


@pytest.mark.parametrize("number, for_good, remembered", [
    (errno.EAGAIN, False, True), (errno.EINTR, False, False), (errno.ENOSPC, False, True),
    (errno.EDQUOT, False, True), (errno.EPIPE, True, False), (errno.EIO, True, True),
    (errno.EBADF, True, True),
])
def test_what_ends_a_stream_for_good(number, for_good, remembered):
    stream = Failing(number)
    tolerant = Tolerant(stream)
    tolerant.write("lost")
    monkeypatched = io.StringIO.write
    stream.write = lambda text: monkeypatched(stream, text)
    if number == errno.EAGAIN:
        def full():
            stream.flush = lambda: None
            raise BlockingIOError(errno.EAGAIN, "")

        stream.flush = full
        tolerant.flush()
    tolerant.write("words")
    assert stream.getvalue() == ("" if for_good else "words")
    assert (tolerant.lost is not None) == remembered


@pytest.mark.parametrize("use", ["write", "flush", "isatty"])
def test_another_thread_may_let_go_of_a_stream_at_any_moment(use):
    """Between the look and the write: here, in what is asked of the stream meanwhile, its reader leaves."""

    class Leaving(io.StringIO):
        gone = False

        def leave(self):
            if not self.gone:
                self.gone = True
                tolerant.flush()

        def flush(self):
            if self.gone:
                raise BrokenPipeError(errno.EPIPE, "")

        def fileno(self):
            self.leave()
            raise io.UnsupportedOperation

        def isatty(self):
            self.leave()
            return False

    stream = Leaving()
    tolerant = Tolerant(stream)
    getattr(tolerant, use)(*["words"][: use == "write"])
    assert tolerant.lost is None and stream.gone == (use != "flush")


@pytest.mark.parametrize("encoding, said", [("ascii", "a ? b\n"), ("latin-1", "a ? b\n"),
                                            ("utf-8", "a ─ b\n")])
def test_an_encoding_replaces_what_it_lacks(encoding, said):
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding) as stream:
        print("a ─ b", file=Tolerant(stream), flush=True)
        assert raw.getvalue().decode(encoding) == said


def test_commands_have_such_streams_also_where_there_were_none(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", closed())
    console.tolerant_streams()
    print("words")
    with pytest.raises(SystemExit):
        common.fail("field: expected this, got that")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("name", NAMES)
def test_the_live_line_shows_a_name_as_it_is(name, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    line = Progress(name, total=2, start=0, tokens_per_step=1)
    line.update(1, name)
    line.say(f"said {name}")
    line.close()
    assert f"said {name}" in terminal.getvalue() and "1/2" in terminal.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_pictures_show_names_as_they_are(name):
    lines = [
        {"setting": f"{name}{i}", "point": {"name": f"{name}{i}"}, "seeds": 1, "cost": 0.3 + i,
         "cost_pm": 0.0, "nll_hard": 1.0, "nll_hard_pm": 0.0, "nll_soft": 1.0, "nll_soft_pm": 0.0}
        for i in range(2)
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        assert canvas.render(analysis.pareto_figure(lines, [f"{name}0"], None, title=name), dpi=30)
        run = {"corpus": name, "arm": name, "steps": [1, 2], "train_nll": [2.0, 1.0], "eval_steps": [2],
               "eval_nll_soft": [1.0], "eval_nll_hard": [1.0], "gate_start": 0.0, "gate_end": 1.0}
        assert canvas.render(analysis.loss_curves([run], {}), dpi=30)
        page = analysis.html_page(name, [analysis.Section(name, "", name)])
    assert "<html" in page


def test_logarithmic_axes_keep_their_exponents():
    figure, [[axes]] = canvas.frame(1, 2.0, [1.5], "title", "caption")
    axes.plot([1, 10], [1, 2])
    axes.set_xscale("log")
    canvas.render(figure, dpi=30)
    first = canvas.render(figure, dpi=30)
    assert first == canvas.render(figure, dpi=30)
    labels = [label for label in axes.get_xticklabels() if "$" in label.get_text()]
    assert labels and all(label.get_parse_math() for label in labels)


def test_a_picture_that_fails_costs_no_table(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise ValueError("no such glyph")

    row = {"label": "a", "setting": "a", "point": {}, "seed": 0, "nll_hard": 1.0, "nll_soft": 1.0,
           "gap": 0.0, "cost": 0.3, "routing_entropy": 0.1, "usage_entropy": 0.1, "full": 0.1, "kl": 0.0}
    monkeypatch.setattr(outcome, "rows", lambda *_: [row])
    monkeypatch.setattr(analysis, "pareto_figure", fails)
    with pytest.warns(UserWarning, match="pareto.png: left out, ValueError: no such glyph"):
        outcome.write_results(tmp_path, [{}], "name")
    assert (tmp_path / "table.md").is_file() and (tmp_path / "rows.json").is_file()
    assert "chosen: a" in capsys.readouterr().out


@pytest.mark.slow
def test_a_picture_that_fails_costs_no_page(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ValueError("no such glyph")

    monkeypatch.setattr(analysis, "pareto_figure", fails)
    monkeypatch.setattr(analysis, "routing_by_position", fails)
    row = {"label": "a", "setting": "a", "point": {"seed": 1}, "seed": 1, "nll_hard": 1.0, "nll_soft": 1.0,
           "gap": 0.0, "cost": 0.3, "routing_entropy": 0.1, "usage_entropy": 0.1, "full": 0.1, "kl": 0.0}
    with pytest.warns(UserWarning, match="Hard nats against cost: .* left out, ValueError: no such glyph"):
        page = reports.sweep_page(outcome.concluded([row], 1), "name")
    assert "Settings: validation split" in page and "<img" not in page
    (tmp_path / "ablation.json").write_text('{"config": {"name": "name"}}')
    with pytest.warns(UserWarning, match="equal tokens: left out, ValueError: no such glyph"):
        page = reports.ablation_page(tmp_path, [{**row, "view": "tokens", "arm": "bayesian"}])
    assert "Equal tokens, test split" in page
    train(prepare(light(), tmp_path / "run"), progress=False)
    kind, page = reports.report(tmp_path / "run")
    with pytest.warns(UserWarning, match="smoke: positions: left out, ValueError: no such glyph"):
        page = page()
    assert "Held-out text" in page and page.count("<img") == 2 and "Positions" not in page


def test_a_run_trains_on_without_a_reader(tmp_path, monkeypatch):
    config = light(name="[/x] $5 and $6 漢")
    with broken_pipe() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        train(prepare(config, tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / str(config.train.steps)).is_dir()


FULL = """
import os, sys
from experiments import common


def ended(place, prints, *argv):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if place is None:
        read, place = os.pipe()
        os.close(read)
    else:
        place = os.open(place, os.O_WRONLY)
    os.dup2(place, 1)
    sys.argv = ["name", *argv]
    common.run(lambda: print("words"), prints=prints)
    raise SystemExit


common.define_path("json", None, "")
codes = [
    ended("/dev/full", True), ended("/dev/full", True, "--help_config"), ended("/dev/full", False),
    ended("/dev/full", True, "--json=/dev/null"), ended(None, True), ended("/dev/null", True),
]
print(*codes)
"""


@pytest.mark.slow
def test_a_command_whose_result_is_printed_says_that_it_is_lost():
    """On a full disk; a reader that has had enough, and training, are another matter."""
    done = subprocess.run([sys.executable, "-c", FULL], cwd=ROOT, env=environment(), capture_output=True,
                          text=True, timeout=120, check=True)
    assert done.stdout == "2 2 0 0 0 0\n", done.stderr
    sentence = "error: stdout: expected room for what this command prints, got 'No space left on device'."
    assert done.stderr.splitlines() == [sentence] * 2


@pytest.mark.slow
@pytest.mark.parametrize("way", ["| head -n 1", ">&-", ">&- 2>&-", "> /dev/full", "ascii", "terminal"])
def test_the_command_trains_to_its_end(way, tmp_path):
    shell = [sys.executable, "-m", "experiments.train", *SMOKE, "--config.name=[/x] $5 ─ [red]",
             f"--workdir={tmp_path / 'run'}"]
    env = {**environment(), "TERM": "xterm"}
    if way == "ascii":
        env["PYTHONIOENCODING"] = "ascii"
    if way == "terminal":
        master, slave = pty.openpty()
        done = subprocess.Popen(shell, cwd=ROOT, env=env, stdout=slave)
        os.close(slave)
        os.read(master, 1)
        os.close(master)  # From here on it writes into a terminal that is gone.
        code = done.wait(120)
        assert code in (0, -1, 129), code  # A session leader would be sent SIGHUP, and saves.
    else:
        quoted = " ".join(f"'{word}'" for word in shell)
        more = way if way[0] in "|>" else ""
        script = f"set -o pipefail; {quoted} {more}"
        done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()
