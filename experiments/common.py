"""How every command starts and ends: flags in, one sentence and exit code 2 for a user's mistake."""

from __future__ import annotations

import contextlib
import errno
import json
import logging as python_logging
import os
import pathlib
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Optional

from absl import flags, logging

from meta_attention_jax.training.checkpoint import Damaged
from meta_attention_jax.training.config import config_difference
from meta_attention_jax.training.interrupt import Interrupted
from meta_attention_jax.training.loop import FREE_TO_CHANGE

# Chatter of libraries, which would bury the progress line.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
logging.set_verbosity(logging.FATAL)  # What Orbax logs as an error it raises as well.
python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
warnings.filterwarnings("ignore", message="jax.core.pytype_aval_mappings")
warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def fail(message: object) -> None:
    """Ends the program with one sentence, on one line of stderr, and exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def sentence(error: Exception) -> str:
    """What the libraries say of a mistake, without their wrapping."""
    if isinstance(error, OSError):  # A missing config comes with every path that was tried.
        return re.sub(r".*\[Errno \d+\] ", "", str(error), flags=re.DOTALL)
    words: object = error
    while isinstance(words, (AttributeError, KeyError)) and words.args:
        words = words.args[0]
    unknown = re.fullmatch(r"'(\w+)'(?:\nDid you mean \"(\w+)\" .*)?", str(words))
    if not unknown:
        return str(words)
    field, near = unknown.groups()
    hint = f"; did you mean {near!r}?" if near else "."
    return f"config: expected a field of the config, got {field!r}{hint}"


@contextlib.contextmanager
def user_mistakes() -> Iterator[None]:
    """Turns the errors of checking input into `fail`. Work itself stays outside: a bug of ours
    should show its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(sentence(error))


def pin(
    path: pathlib.Path, shared: Mapping[str, Any], what: str, grows: Optional[str] = None
) -> None:
    """Writes what all runs below the folder of `path` share, or checks that it is the same.

    Created whole or not at all, so that processes that start at the same moment agree on one. Fields
    of "config" that a run may set anew differ as they like, and stay as they were.

    Args:
      path: the file.
      shared: a dict for JSON.
      what: it is, for the error.
      grows: key of a dict that may gain entries, but lose and change none.

    Raises:
      ValueError: a folder of something else, or the first field that differs.
    """
    mine = json.loads(json.dumps(shared))
    if not path.exists():
        others = [entry for entry in path.parent.glob("*") if not entry.name.startswith(f".{path.name}")]
        if others and not path.exists():
            raise ValueError(
                f"workdir: expected a new directory or one of {what}, got {str(path.parent)!r}."
            )
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
        partial.unlink()
    stored = json.loads(path.read_text())
    compared = dict(mine)
    if grows:
        compared[grows] = {k: v for k, v in mine[grows].items() if k in stored[grows]}
        if lost := stored[grows].keys() - mine[grows].keys():
            raise ValueError(f"{grows}: expected {min(lost)!r} still, as in {str(path)!r}, got none.")
    free = {f"config.{field}" for field in FREE_TO_CHANGE}
    for field, old, new in config_difference(stored, compared):
        if field not in free:
            raise ValueError(f"{field}: expected {old!r}, as in {str(path)!r}, got {new!r}.")
    if grows and mine[grows].keys() != stored[grows].keys():
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        grown = {**stored, grows: mine[grows]}
        partial.write_text(json.dumps(grown, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)


def no_room(error: BaseException) -> bool:
    """Whether a full disk is behind it. Orbax says so in words of its own, from a thread."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def run(main: Callable[[], None]) -> None:
    """Parses the flags, then calls `main`."""
    try:
        rest = flags.FLAGS(sys.argv)[1:]
        flags.FLAGS.validate_all_flags()
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError,
            SyntaxError) as error:
        fail(sentence(error))
    if rest:
        fail(f"arguments: expected flags only, got {rest[0]!r}.")
    hook = threading.excepthook
    # TensorBoard's thread meets the full disk too, and would say so at length.
    threading.excepthook = lambda args: None if no_room(args.exc_value) else hook(args)
    try:
        main()
    except Damaged as error:
        fail(error)
    except Exception as error:
        if not no_room(error):
            raise
        print(f"error: disk: {getattr(error, 'strerror', None) or 'expected room to write, got none'}; "
              "what is complete stays, and the same command goes on from it.",
              file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # Whatever is flushed on the way out would meet the full disk again, at length.
    except KeyboardInterrupt as stop:
        # Not 0: a shell script must not go on to what needs the end of this.
        number = stop.signal if isinstance(stop, Interrupted) else signal.SIGINT
        print(f"\n{str(stop) or 'SIGINT: stopped.'}", file=sys.stderr)
        raise SystemExit(128 + number) from None
