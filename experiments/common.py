"""How every command starts and ends: flags in, one sentence and exit code 2 for a user's mistake."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging as python_logging
import math
import os
import pathlib
import platform
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

import jax
from absl import flags, logging
from ml_collections.config_flags import tuple_parser

from meta_attention_jax.config import SCHEMA, check_fields, help_table
from meta_attention_jax.console import tolerant_streams
from meta_attention_jax.data.splits import RULES
from meta_attention_jax.fields import LARGEST, expect, near
from meta_attention_jax.files import at, check_reached, in_bucket, local, place
from meta_attention_jax.training.checkpoint import Damaged
from meta_attention_jax.training.interrupt import Interrupted

flags.disclaim_key_flags()  # What `define_path` defines is the calling command's.

# Chatter of libraries, which would bury the progress line.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
logging.set_verbosity(logging.FATAL)  # What Orbax logs as an error it raises as well.
for chatty in ("asyncio", "gcsfs", "fsspec", "google.auth"):
    python_logging.getLogger(chatty).setLevel(python_logging.CRITICAL)
warnings.filterwarnings("ignore", message="jax.core.pytype_aval_mappings")
warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


class _PathParser(flags.ArgumentParser):
    """A flag's path on this machine, as it was given where that is a path already; of `buckets`, what `place` knows."""

    def __init__(self, buckets: bool = False):
        self._find = place if buckets else local

    def parse(self, argument: str) -> str:
        found = str(self._find("path", argument))
        return found if "://" in found or argument.lower().startswith(("~", "file:")) else argument


def define_path(name: str, default: Optional[str], help: str, *, buckets: bool = False) -> flags.FlagHolder[str]:
    """A flag that says where something is: `~` and `file://` are resolved, other addresses refused, but for those of
    `buckets`."""
    return flags.DEFINE(_PathParser(buckets), name, default, help)


def finite(field: str, texts: Sequence[str]) -> list[float]:
    """Numbers of a list flag; raises ValueError of one sentence unless all are finite."""
    found = []
    for text in texts:
        try:
            found.append(float(text))
        except ValueError:
            found.append(math.nan)
        expect(abs(found[-1]) <= LARGEST, field, "finite numbers", text)
    return found


def define_data() -> Callable[[], dict[str, Optional[str]]]:
    """The flags of a command that says where data and published models of runs are now; gives them as `load_run` takes
    them."""
    corpus = flags.DEFINE_string("corpus", None, "Where the data of runs are now: path:FILE_OR_FOLDER.")
    split = flags.DEFINE_enum("data_split", None, RULES, "data.split, where it has to be another.")
    model = flags.DEFINE_string("backbone", None, "Where the published model of a run is now.")
    return lambda: {"corpus": corpus.value, "data_split": split.value, "backbone": model.value}


def fail(message: object) -> None:
    """Ends the program with one sentence, on one line of stderr, and exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def _flag_mistake(words: str) -> Optional[str]:
    """What absl says of a flag, in our words; None if it is something else."""
    if missing := re.search(r"Flag --(\S+) must have a value", words):
        return f"{missing[1]}: expected a value, for --{missing[1]} must have a value, got none."
    if bare := re.match(r"Missing value for flag --?(\S+)", words):
        return f"{bare[1]}: expected a value, got none."
    if not (wrong := re.match(r"flag --([^=]+)=(.*?): (.*)", words, re.DOTALL)):
        return None
    name, value, reason = wrong.groups()
    field, parser = name.removeprefix("config."), flags.FLAGS[name].parser
    if name == "config":  # The last line of a traceback of the file.
        reason = reason.strip().splitlines()[-1].rstrip(".")
        return f"config: expected a file whose get_config() runs, got {value!r}: {reason}."
    if isinstance(parser, _PathParser):
        return f"{field}: {reason.removeprefix('path: ')}"
    if isinstance(parser, flags.EnumParser):
        expected = f"one of {', '.join(parser.enum_values)}"
    elif isinstance(parser, flags.BooleanParser):
        expected = "true or false"
    elif isinstance(parser, tuple_parser.TupleParser):
        expected = "a tuple such as \"('full', 'local')\""
    elif "ConfigDict" in reason:
        expected = f"a value for one of its fields, as in --{name}.<field>=<value>"
    else:
        expected = parser.syntactic_help or "another value"
    return f"{field}: expected {expected}, got {value!r}."


def sentence(error: Exception) -> str:
    """What is wrong with the flags or the config file, without the wrapping of the libraries."""
    if isinstance(error, OSError):  # A missing config comes with every path that was tried.
        words = re.sub(r".*\[Errno \d+\] ", "", str(error), flags=re.DOTALL).splitlines()[-1]
        return f"config: expected a file that can be read, got {words}."
    words: object = error
    while isinstance(words, (AttributeError, KeyError)) and words.args:
        words = words.args[0]
    if isinstance(error, flags.UnrecognizedFlagError):
        meant = re.search(r"Did you mean: (\S+) ", str(error))
        hint = f"; did you mean --{meant[1]}?" if meant else "."
        return f"flags: expected one that this command has, got --{error.flagname}{hint}"
    if unknown := re.fullmatch(r"'(\w+)'(?:\nDid you mean \"(\w+)\" .*)?", str(words)):
        field, meant = unknown.groups()
        hint = f"; did you mean {meant!r}?" if meant else "."
        return f"config: expected a field of the config, got {field!r}{hint}"
    if said := _flag_mistake(str(words)):
        return said
    for flag in sys.argv:  # ml_collections has many words for a field of what has no fields.
        field = re.match(r"--?(?:no)?config\.([^=]*)", flag)
        if field and field[1] not in SCHEMA and not isinstance(error, SyntaxError):
            return f"config: expected a field of the config, got {field[1]!r}{near(field[1], SCHEMA)}"
    kind = "" if isinstance(error, (AttributeError, flags.Error)) else f"{type(error).__name__}: "
    return f"config: expected a Python file that runs and has get_config(), got {kind}{words}."


@contextlib.contextmanager
def user_mistakes() -> Iterator[None]:
    """Turns the errors of checking input into `fail`. Work itself stays outside: a bug of ours
    should show its traceback."""
    try:
        yield
    except OSError as error:
        words = re.sub(r"^\[Errno \d+\] ", "", str(error))
        fail(f"file: expected one that can be read or written, got {words}.")
    except UnicodeError as error:
        got = repr(getattr(error, "object", str(error)))  # One of no place has no text.
        fail(f"text: expected text of Unicode, got {got:.80}.")
    except ValueError as error:
        fail(error)


@contextlib.contextmanager
def spared(what: str) -> Iterator[None]:
    """Pictures of finished work: what goes wrong with them is said, and costs nothing else."""
    try:
        yield
    except Exception as error:  # Of any kind: the work is done, and is to be kept.
        warnings.warn(f"{what}: left out, {type(error).__name__}: {error}", stacklevel=3)


def check_output(field: str, path: str | pathlib.Path) -> None:
    """Checks that a file can be written at `path`, before hours of work end there."""
    if in_bucket(at(path)):
        check_reached(field, at(path))
        return
    path = pathlib.Path(os.path.abspath(path))
    if path.is_dir():
        raise ValueError(f"{field}: expected a file to write, got the folder {str(path)!r}.")
    if path.exists() and not path.is_file():  # A terminal, a pipe: written through.
        expect(os.access(path, os.W_OK), field, "what can be written to", str(path))
        return
    path = pathlib.Path(os.path.realpath(path))
    if path.is_file() and os.access(path, os.W_OK):  # In place, if it cannot be replaced.
        return
    above = next(parent for parent in path.parents if parent.exists())
    free = above.is_dir() and os.access(above, os.W_OK)
    expect(free, field, "a file in a folder that can be written", str(path))


def no_room(error: BaseException) -> bool:
    """Whether a full disk is behind it. Orbax says so in words of its own, from a thread."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def missing_platform() -> Optional[str]:
    """What is wrong with JAX_PLATFORMS where it asks for devices that jax cannot have, a sentence. Asked
    after a failure only: the processes of a run meet before the first of them looks for its devices."""
    asked = os.environ.get("JAX_PLATFORMS")
    try:
        if asked:
            jax.devices()
    except Exception as error:  # Of an unknown platform another kind than of one without devices.
        # They may be there, and another process have them.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")
        return f"JAX_PLATFORMS: expected platforms that this machine has, got {asked!r} ({reason})."
    return None


def quiet_threads() -> None:
    """From here on nothing is heard of what threads and coroutines of libraries say, at length, of an error that is
    raised as well: of a full disk, and Orbax's that still read when another file turned out damaged."""
    of_threads, ignored = threading.excepthook, sys.unraisablehook

    def unraisable(args: Any) -> None:
        code = getattr(args.object, "cr_code", None)
        of_orbax = code is not None and "orbax" in code.co_filename
        if not of_orbax and str(args.exc_value) != "Event loop is closed":
            ignored(args)

    threading.excepthook = lambda args: None if no_room(args.exc_value) else of_threads(args)
    sys.unraisablehook = unraisable


def check_printed() -> None:
    """Fails if words that a command has printed are lost, but for those that nobody wanted to read."""
    sys.stdout.flush()
    if (lost := getattr(sys.stdout, "lost", None)) is not None:
        words = getattr(lost, "strerror", None) or str(lost)
        fail(f"stdout: expected room for what this command prints, got {words!r}.")


def keep_compiled() -> None:
    """Has JAX keep what took it a second or more to compile, for the next command: in the user's cache directory, by
    kind of processor, since a home may be on several machines. Where JAX is told of a place, or told to keep nothing,
    or there is no such directory to be had, that holds."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not jax.config.jax_enable_compilation_cache:
        return
    try:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        known = pathlib.Path("/proc/cpuinfo")
        lines = known.read_text().splitlines() if known.is_file() else []
        kind = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
        place = home / "meta_attention_jax" / "compiled" / hashlib.sha256(kind.encode()).hexdigest()[:8]
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(place))
    except (OSError, RuntimeError):  # RuntimeError: nobody's home.
        return


def run(main: Callable[[], None], *, prints: bool = False) -> None:
    """Parses the flags, then calls `main`.

    `prints`: the result is what is printed, unless --json says where else it goes; if that cannot be
    written, the command has failed. Elsewhere printing costs nothing but the words.
    """
    tolerant_streams()
    given = sys.argv[1:]
    if "--help_config" in given or {"--help", "-h"} & set(given):
        about = (sys.modules["__main__"].__doc__ or "").strip()
        print(help_table() if "--help_config" in given else f"{about}\n{flags.FLAGS.main_module_help()}")
        check_printed()
        return
    try:
        rest = flags.FLAGS(sys.argv)[1:]
        flags.FLAGS.validate_all_flags()
        given = "config" in flags.FLAGS and flags.FLAGS["config"].present
        if given:
            getattr(flags.FLAGS.config, "items", None)  # A file that was not read says so here.
    except Exception as error:  # Of any kind: the user's config file has run in here too.
        fail(sentence(error))
    if given:
        with user_mistakes():
            check_fields(flags.FLAGS.config)
    if rest:
        fail(f"arguments: expected flags only, got {rest[0]!r}.")
    kept = "json" in flags.FLAGS and flags.FLAGS.json is not None
    if kept:
        with user_mistakes():
            check_output("json", flags.FLAGS.json)
    quiet_threads()
    keep_compiled()
    try:
        main()
    except Damaged as error:
        fail(error)
    except Exception as error:
        if not no_room(error):
            if missing := missing_platform():
                fail(missing)
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
    if prints and not kept:
        check_printed()
