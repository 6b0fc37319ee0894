"""The terminal's view of a generation: text, routes, and which tokens were hard."""

from __future__ import annotations

import types

import numpy as np
import pytest

from experiments.studies import samples
from meta_attention_jax.data.tokenizer import ByteTokenizer
from meta_attention_jax.generation import Trace

MECHANISMS = ("linear", "full", "local")


def test_letters_stand_below_their_characters():
    pieces = [bytes([b]) for b in "né\tx\n".encode()] + [b"two words"]
    legend, text, letters = samples.lettered(pieces, np.array([0, 1, 1, 2, 0, 1, 2]), MECHANISMS)\
        .split("\n")
    assert legend == "L linear  F full  w local"
    assert text == "n·é⇥x↵two words"
    assert letters == "LFFwLFwwwwwwwww"


def test_lines_break_and_nothing_is_lost():
    pieces, route = [b"abc "] * 50, np.arange(50) % 3
    lines = samples.lettered(pieces, route, MECHANISMS).split("\n")[1:]
    assert "".join(lines[::2]) == "abc " * 50
    assert "".join(lines[1::2]) == "".join("LFw"[k] * 3 + " " for k in route)
    assert max(map(len, lines)) < samples.LINE + 4


@pytest.fixture
def run():
    config = types.SimpleNamespace(model=types.SimpleNamespace(mechanisms=MECHANISMS))
    pieces = lambda ids: [ByteTokenizer().decode([token]) for token in ids]  # noqa: E731
    # Layer 1 of three is a window by nature.
    model = types.SimpleNamespace(config=types.SimpleNamespace(routed=(0, 2)))
    return types.SimpleNamespace(config=config, pieces=pieces, model=model)


def trace(route, hard):
    """Two tokens of prompt, the rest generated; [layer time]."""
    route, hard = np.asarray(route)[:, None], np.asarray(hard)[:, None]
    zeros = np.zeros(route.shape)
    return Trace(
        tokens=np.zeros((1, route.shape[2] - 2), int), lengths=np.array([route.shape[2] - 2]),
        route=route[..., 2:], hard=hard[..., 2:],
        uncertainty=zeros[..., 2:], prompt_route=route[..., :2], prompt_hard=hard[..., :2],
        prompt_uncertainty=zeros[..., :2],
    )


def test_the_layer_with_most_full_is_shown_with_the_shares_of_all(run):
    ids = np.frombuffer(b"abcd", np.uint8)
    route = [[0, 0, 2, 0], [1, 0, 2, 1]]
    shown = samples.show_routes(run, ids, trace(route, np.ones((2, 4), bool)))
    assert shown == (
        "layer 0: linear 75%, full 0%, local 25%\n"
        "layer 2: linear 25%, full 50%, local 25%\n"
        "\n"
        "routes of layer 2, the prompt's 2 tokens first\n"
        "L linear  F full  w local\n"
        "abcd\n"
        "FLwF"
    )
    other = samples.show_routes(run, ids, trace(route, np.ones((2, 4), bool)), layer=0)
    assert other.endswith("routes of layer 0, the prompt's 2 tokens first\n"
                          "L linear  F full  w local\nabcd\nLLwL")


def test_tokens_that_mix_are_counted(run):
    hard = np.array([[True, False, False, True]])
    shown = samples.show_routes(run, np.arange(65, 69), trace([[0, 1, 1, 2]], hard))
    assert "k* only: 50% of these tokens mix all mechanisms" in shown


def test_control_characters_do_not_reach_the_terminal():
    assert samples.printable("a\tb\nc\x1b[31m\r") == "a\tb\nc\ufffd[31m\ufffd"


@pytest.mark.parametrize("name, value", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_can_be_refused(monkeypatch, name, value):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert samples.wants_colour()
    monkeypatch.setenv(name, value)
    assert not samples.wants_colour()
