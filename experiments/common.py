"""How every command starts and ends: flags in, one sentence and exit code 2 for a user's mistake."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator

from absl import flags, logging

# Chatter of libraries, which would bury the progress line.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
logging.set_verbosity(logging.ERROR)
warnings.filterwarnings("ignore", message="jax.core.pytype_aval_mappings")


def fail(message: object) -> None:
    """Ends the program with one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def user_mistakes() -> Iterator[None]:
    """Turns the errors of checking input into `fail`. Work itself stays outside: a bug of ours
    should show its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)


def run(main: Callable[[], None]) -> None:
    """Parses the flags, then calls `main`."""
    try:
        rest = flags.FLAGS(sys.argv)[1:]
        flags.FLAGS.validate_all_flags()
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError,
            SyntaxError) as error:
        fail(" ".join(str(error).strip("'\"").split()))
    if rest:
        fail(f"arguments: expected flags only, got {rest[0]!r}.")
    main()
