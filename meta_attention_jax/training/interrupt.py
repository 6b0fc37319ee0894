"""SIGTERM and SIGINT, and what schedulers and lost terminals send, end a training loop between two steps, after a save.

With several processes it is enough that one of them gets the signal. They stop after the same step, on which JAX's
preemption service makes them agree.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

from jax.experimental import multihost_utils

from meta_attention_jax.training import processes

_HINTS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU") if hasattr(signal, name))
"""What schedulers and lost terminals send. A host program may mean something else by them."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, *_HINTS)
REPEAT = 1.0
"""Seconds in which a second signal is the first one's echo: a terminal and the program that started this
one often send one each."""

Asked = Callable[[int], Optional[signal.Signals]]
"""After how many steps -> the signal to stop for now, if any. With several processes it has to be called
after every step."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the training after a save, of `step` unless the training had come to its end."""

    def __init__(self, number: signal.Signals, step: Optional[int] = None):
        after = "" if step is None else f" after step {step}"
        super().__init__(f"{number.name}: stopped{after}; what is done is saved, and the same command goes on from it.")
        self.signal = number
        self.step = step


@contextlib.contextmanager
def interruptible() -> Iterator[Asked]:
    """Inside the block the first of `SIGNALS` does nothing but be told by the function that it yields. A second one,
    not at once, does what it did before. One that is ignored stays so, and so does, but for SIGTERM and SIGINT, one for
    which the program has a handler of its own.

    Threads other than the main one get no signals; there the function always says None.

    With several processes every signal is told as SIGTERM, to all of them.

    Raises:
      Interrupted: at the end of the block, if a signal came that nobody asked for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda done: None
    elif processes.several():
        with _agreed() as asked:
            yield asked
    else:
        caught: list[signal.Signals] = []
        with _taken(SIGNALS, caught.append):
            yield lambda done: caught[0] if caught else None
        if caught:
            raise Interrupted(caught[0])


@contextlib.contextmanager
def _agreed() -> Iterator[Asked]:
    """`interruptible` for several processes. The preemption service has taken SIGTERM for itself."""
    with _taken(SIGNALS[1:], lambda number: os.kill(os.getpid(), signal.SIGTERM)):
        yield lambda done: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(done) else None


@contextlib.contextmanager
def _taken(numbers: Sequence[signal.Signals], first: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Inside the block the first of these signals calls `first`; one after its echo does what it did before."""
    before: dict[signal.Signals, Any] = {}
    began: Optional[float] = None

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number: int, frame: Any) -> None:
        nonlocal began
        if began is None:
            began = time.monotonic()
            first(signal.Signals(number))
        elif time.monotonic() - began > REPEAT:
            restore()
            signal.raise_signal(number)

    for number in numbers:
        if _ours(number):
            before[number] = signal.signal(number, catch)
    try:
        yield
    finally:
        restore()


def _ours(number: signal.Signals) -> bool:
    """Whether a signal may be taken over."""
    handler = signal.getsignal(number)
    return handler is signal.SIG_DFL if number in _HINTS else handler not in (signal.SIG_IGN, None)
