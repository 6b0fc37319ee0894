"""How every command starts and ends: flags in, one sentence and exit code 2 for a user's mistake."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator

from absl import flags, logging

# Chatter of libraries, which would bury the progress line.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
logging.set_verbosity(logging.ERROR)
warnings.filterwarnings("ignore", message="jax.core.pytype_aval_mappings")


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
    main()
