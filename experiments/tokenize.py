"""Writes a corpus as token files, once, for runs with --config.data.corpus=tokens:OUT: for what is larger than memory.

python -m experiments.tokenize --corpus=path:FOLDER --out=OUT [--tokenizer=bpe --vocab_size=16384] [--workers=8]
python -m experiments.tokenize --corpus=hf:OWNER/NAME[/CONFIG] --out=OUT [--rows] [--tokenizer_from=RUN]
python -m experiments.tokenize --out=OUT --verify

Parts of the corpus are written by several processes, each whole or not at all; stopped, the same command goes on. A
file of a folder is a document; rows of the hub are lines of one text, or with --rows documents. --verify reads all
that is written, and compares checksums.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import rich.progress
from absl import flags

from experiments import common
from meta_attention_jax.console import say
from meta_attention_jax.data import token_files
from meta_attention_jax.data.parts import Part, in_parts
from meta_attention_jax.data.splits import RULES
from meta_attention_jax.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from meta_attention_jax.fields import expect
from meta_attention_jax.files import local
from meta_attention_jax.training.processes import hold

CORPUS = flags.DEFINE_string("corpus", None, "As data.corpus: texts.")
OUT = common.define_path("out", None, "The folder of the token files.")
SPLIT = flags.DEFINE_enum("split", "auto", RULES, "As data.split.")
TOKENIZER = flags.DEFINE_enum("tokenizer", "bytes", ("bytes", "bpe"), "What makes tokens.")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "Of a trained bpe.")
TOKENIZER_FROM = common.define_path("tokenizer_from", None, "Folder of a tokenizer.json to use: a run, token files.")
WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0 is one for every CPU.")
PART_MB = flags.DEFINE_integer("part_mb", 64, "Megabytes of text that a part has at least.")
ROWS = flags.DEFINE_bool("rows", False, "Every row of a data set of the hub is a document.")
VERIFY = flags.DEFINE_bool("verify", False, "Only compare what is written with its checksums.")
flags.mark_flags_as_required(["out"])


def main() -> None:
    with common.user_mistakes():
        if VERIFY.value:
            bad = token_files.damaged(OUT.value)
            expect(not bad, "out", f"parts as they were written in {OUT.value!r}", ", ".join(bad))
            say(f"{OUT.value}: every part is as it was written")
            return
        expect(CORPUS.value, "corpus", "a value, for --corpus must have a value", CORPUS.value)
        expect(CORPUS.value.startswith("hf:") or not ROWS.value, "rows", "a corpus hf:NAME with it", CORPUS.value)
        expect(WORKERS.value >= 0, "workers", "at least 0", WORKERS.value)
        expect(PART_MB.value >= 1, "part_mb", "at least 1", PART_MB.value)
        folder = local("out", OUT.value)
        found = in_parts(CORPUS.value, SPLIT.value, PART_MB.value * 10**6, rows=ROWS.value)
        begun = (folder / token_files.PLAN).is_file()
        if begun or TOKENIZER_FROM.value:
            tokenizer: Tokenizer = load_tokenizer(folder if begun else TOKENIZER_FROM.value)
        elif TOKENIZER.value == "bpe":
            say(f"bpe: {VOCAB_SIZE.value} tokens are learned from the training split")
            tokenizer = BPETokenizer.train(found.texts("train"), VOCAB_SIZE.value)
        else:
            tokenizer = ByteTokenizer()
        plan = {
            "texts": hashlib.sha256(found.known.encode()).hexdigest(), "part_mb": PART_MB.value, "rows": ROWS.value,
            "tokenizer": [TOKENIZER_FROM.value, TOKENIZER.value, VOCAB_SIZE.value],
        }
        token_files.begin(folder, plan, tokenizer)
    if (folder / token_files.MANIFEST).is_file():
        say(f"{OUT.value}: complete already")
        return
    with common.user_mistakes(), hold(folder):
        try:
            lines = written(folder, found.parts, WORKERS.value or os.cpu_count() or 1)
        except BrokenProcessPool:
            common.fail("workers: expected them to live on, got one that was killed; the same command goes on.")
        except OSError as error:
            common.fail(f"corpus: expected texts that can be read and room for tokens, got {error}; the same command "
                        "goes on.")
        token_files.finish(folder, {"source": found.source, "split_by": found.split_by}, lines)
    tokens = sum(line["bytes"] for line in lines) // token_files.dtype_of(tokenizer.vocab_size).itemsize
    skipped = sum(line["skipped"] for line in lines)
    say(f"{OUT.value}: {tokens:,} tokens of {sum(line['documents'] for line in lines):,} documents in "
        f"{len(lines)} parts" + (f"; {skipped} files that are no text left out" if skipped else ""))


def written(folder: pathlib.Path, parts: Sequence[Part], workers: int) -> list[dict[str, Any]]:
    """The manifest's lines of all parts, of which those that are not there yet are written."""
    known = {part.name: token_files.line_of(folder, part.name) for part in parts}
    todo = [part for part in parts if known[part.name] is None]
    columns = (
        "tokens", rich.progress.BarColumn(), rich.progress.TaskProgressColumn(), rich.progress.TimeElapsedColumn(),
        "ETA", rich.progress.TimeRemainingColumn(elapsed_when_finished=False),
    )
    quiet = not sys.stdout.isatty()
    with rich.progress.Progress(*columns, disable=quiet, speed_estimate_period=600) as bar:
        task = bar.add_task("", total=sum(part.size for part in todo))
        for part, line in _done(folder, todo, min(workers, len(todo))):
            known[part.name] = line
            bar.advance(task, part.size)
            seconds = bar.tasks[0].time_remaining
            if quiet:
                left = "" if seconds is None else f", ETA {seconds:.0f} s"
                say(f"{sum(map(bool, known.values()))} of {len(parts)} parts, {bar.tasks[0].percentage:.0f} %{left}")
    return [known[part.name] for part in parts]


def _done(folder: pathlib.Path, parts: Sequence[Part], workers: int) -> Iterator[tuple[Part, dict[str, Any]]]:
    if workers < 2:
        yield from ((part, token_files.write_part(folder, part.name, part.split, part.read)) for part in parts)
        return
    spawn = multiprocessing.get_context("spawn")  # JAX has threads.
    pool = ProcessPoolExecutor(workers, mp_context=spawn)
    try:
        asked = {pool.submit(token_files.write_part, folder, p.name, p.split, p.read): p for p in parts}
        for done in as_completed(asked):
            yield asked[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    common.run(main)
