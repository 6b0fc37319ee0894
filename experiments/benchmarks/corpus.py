"""What does a corpus larger than memory cost before the first step, and in memory?

python -m experiments.benchmarks.corpus [--json=FILE] [--gigabytes=20] [--lengths=1000,500]

Token files that are holes (a sparse file: no disk is needed), documents of so many tokens on average; each is opened in
a process of its own, which makes 50 training batches of 64 windows of 256 tokens far apart. Against one of 20 MB:
`ratio` is what the process holds more at its most, of the corpus' bytes; seconds are from the call to the data set, and
to its first batch. Windows are found by offsets of documents, 8 bytes each, so memory grows with their number.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from absl import flags

from experiments import common as commands
from experiments.benchmarks import common

JSON = commands.define_path("json", None, "Write the rows here.")
GIGABYTES = flags.DEFINE_float("gigabytes", 20.0, "Of the corpus.", 0.1)
LENGTHS = flags.DEFINE_list("lengths", ["1000", "500"], "Mean tokens of a document.")
SMALL, PART = 0.02, 0.2  # Gigabytes: of what it is held against, and of a part.

OPEN = """
import json, resource, sys, time
import grain, jax.numpy
from meta_attention_jax.data.pipeline import make_dataset
began = time.perf_counter()
dataset = make_dataset(corpus=sys.argv[1], sequence_length=256, batch_size=64, seed=0)
opened = time.perf_counter() - began
dataset.train_batch(0)
first = time.perf_counter() - began
for step in range(50):
    dataset.train_batch(step * 997)
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"opened": opened, "first": first, "most": most}))
"""


def write(root: pathlib.Path, gigabytes: float, length: int) -> tuple[int, int]:
    """Token files with documents of `length` tokens on average; their bytes, and how many documents."""
    root.mkdir()
    rng, lines = np.random.default_rng(0), []
    parts = max(round(gigabytes / PART), 1)
    size = int(gigabytes * 1e9 / parts / 2 / length)  # Documents of a part; two bytes a token.
    for split, count in (("train", parts), ("validation", 1), ("test", 1)):
        for i in range(count):
            name, documents = f"{split}-{i:05d}", size if split == "train" else 100
            offsets = np.concatenate([[0], np.cumsum(rng.integers(length // 2, length * 3 // 2 + 1, documents))])
            offsets.astype("<i8").tofile(root / f"{name}.offsets")
            with open(root / f"{name}.tokens", "wb") as file:
                file.truncate(2 * int(offsets[-1]))
            lines.append(dict(name=name, split=split, bytes=2 * int(offsets[-1]), sha256="0" * 64, documents=documents))
    manifest = {"source": "generated", "split_by": "by place", "documents": lines}
    (root / "manifest.json").write_text(json.dumps(manifest))
    (root / "tokenizer.json").write_text('{"kind": "bytes"}')
    return sum(line["bytes"] for line in lines), sum(line["documents"] for line in lines)


def main() -> None:
    with commands.user_mistakes():
        lengths = common.numbers("lengths", LENGTHS.value, "at least 4", lambda n: n >= 4)
    rows = []
    for length in lengths:
        with tempfile.TemporaryDirectory() as folder:
            found = {}
            for name, gigabytes in (("small", SMALL), ("large", GIGABYTES.value)):
                place = pathlib.Path(folder) / name
                total, documents = write(place, gigabytes, length)
                said = subprocess.run(
                    [sys.executable, "-c", OPEN, f"tokens:{place}"], check=True, capture_output=True, text=True
                ).stdout
                found[name] = json.loads(said.splitlines()[-1])
        above = found["large"]["most"] - found["small"]["most"]
        rows.append({
            "name": "a corpus of token files", "gigabytes": total / 1e9, "documents": documents,
            "ratio": above / total, "spread": 0.0, "megabytes above a small one": above / 1e6,
            "seconds to open": found["large"]["opened"], "seconds to the first batch": found["large"]["first"],
            "small: seconds to open": found["small"]["opened"],
        })
    common.tell([rows], JSON.value)


if __name__ == "__main__":
    commands.run(main, prints=True)
