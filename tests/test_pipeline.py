"""Batches: pure in (seed, step, row), windows within one document, every target evaluated once."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from meta_attention_jax.data import recall as recall_lib
from meta_attention_jax.data import tokenized
from meta_attention_jax.data.corpora import SPLITS, load_corpus
from meta_attention_jax.data.manifest import write_manifest
from meta_attention_jax.data.pipeline import Dataset, make_dataset
from meta_attention_jax.data.recall import KIND_QUERY, RecallConfig
from meta_attention_jax.types import Batch

T, B = 32, 6
SIZES = {"train": [400, 5, 33, 32, 1, 97], "validation": [64, 65, 66, 2], "test": [40, 1, 7]}


def text(number, size):
    """Random letters, so that no window occurs at two places."""
    return np.random.default_rng(number).integers(32, 127, size).astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for split, sizes in SIZES.items():
        (root / split).mkdir()
        for number, size in enumerate(sizes):
            (root / split / f"{number}.txt").write_bytes(text(number, size))
    return root


def make(folder, **changes) -> Dataset:
    arguments = dict(corpus=f"path:{folder}", sequence_length=T, batch_size=B, seed=3)
    return make_dataset(**{**arguments, **changes})


def make_recall(**changes) -> Dataset:
    return make("", corpus="recall", window=8, **changes)


@pytest.fixture(scope="module", params=["text", "text of older runs", "recall"])
def maker(request, folder):
    order = 1 if "older" in request.param else 2
    return make_recall if request.param == "recall" else lambda **c: make(folder, order=order, **c)


def assert_equal(a: Batch, b: Batch):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def check_layout(batch: Batch, dataset: Dataset):
    """What holds for every batch whatever its source."""
    local = (len(dataset.rows), dataset.sequence_length)
    for field in dataclasses.fields(Batch):
        value = getattr(batch, field.name)
        assert value.shape == (local[:1] if field.name == "row" else local)
        assert value.dtype == (np.bool_ if field.name == "loss_mask" else np.int32)
    real = batch.loss_mask
    assert (real[:, :-1] >= real[:, 1:]).all()
    np.testing.assert_array_equal(batch.segment_ids, real.astype(np.int32))
    np.testing.assert_array_equal(batch.positions, np.where(real, np.arange(local[1]), 0))
    np.testing.assert_array_equal(batch.row, dataset.rows)
    both = real[:, 1:]
    np.testing.assert_array_equal(batch.tokens[:, 1:][both], batch.targets[:, :-1][both])
    for padded in (batch.tokens, batch.targets, batch.num_bytes, batch.kind):
        assert not padded[~real].any()
    assert 0 <= batch.tokens.min() and batch.tokens.max() < dataset.vocab_size


@pytest.mark.smoke
def test_layout(maker):
    dataset = maker()
    check_layout(dataset.train_batch(0), dataset)
    for split in SPLITS:
        for batch in dataset.eval_batches(split):
            check_layout(batch, dataset)


def test_a_batch_is_a_function_of_seed_and_step(maker):
    dataset = maker()
    wanted = dataset.train_batch(7)
    for step in (3, 8, 0):
        dataset.train_batch(step)
    assert_equal(dataset.train_batch(7), wanted)
    assert_equal(maker().train_batch(7), wanted)
    for other in (dataset.train_batch(8), maker(seed=4).train_batch(7)):
        assert (other.tokens != wanted.tokens).any()
    assert (maker(seed=0).train_batch(3).tokens != maker(seed=3).train_batch(0).tokens).any()


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 6), slice(1, None, 2)])
def test_a_process_makes_its_rows_of_the_whole_batch(maker, rows):
    whole, part = maker(), maker(rows=rows)
    pairs = [(whole.train_batch(7), part.train_batch(7))]
    for split in ("validation", "test"):
        pairs += zip(whole.eval_batches(split), part.eval_batches(split), strict=True)
    for a, b in pairs:
        assert_equal(jax.tree.map(lambda leaf: leaf[rows], a), b)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_read_one_sequence_whatever_their_number(folder, processes):
    """Also from any step on, and over the end of an epoch."""
    whole = [row.tobytes() for s in range(12) for row in make(folder, batch_size=4).train_batch(s).tokens]
    share = 8 // processes
    parts = [make(folder, batch_size=8, rows=slice(i * share, (i + 1) * share)) for i in range(processes)]
    for step in (5, 2):
        rows = [row.tobytes() for part in parts for row in part.train_batch(step).tokens]
        assert rows == whole[8 * step : 8 * step + 8]


def test_an_epoch_has_every_window_once_and_the_next_one_another_order(folder):
    count = sum(max(-(-(size - 1) // T), 1) for size in SIZES["train"] if size > 1)
    dataset = make(folder, batch_size=count)
    epochs = [[row.tobytes() for row in dataset.train_batch(step).tokens] for step in range(3)]
    assert len(set(epochs[0])) == count and len(set(map(tuple, epochs))) == 3
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    batch = dataset.train_batch(0)
    seen = {n: np.zeros(size, bool) for n, size in enumerate(SIZES["train"]) if size > 1}
    for row in range(count):
        n = batch.loss_mask[row].sum()
        window = bytes([*batch.tokens[row, :n], batch.targets[row, n - 1]])
        (found,) = [d for d in seen if window in text(d, SIZES["train"][d])]
        start = text(found, SIZES["train"][found]).index(window)
        seen[found][start + 1 : start + n + 1] = True
        assert n == min(T, SIZES["train"][found] - 1), "none is padded but a shorter document's"
    assert all(targets[1:].all() for targets in seen.values())


def test_a_release_of_grain_with_another_shuffle_is_refused(folder, monkeypatch):
    monkeypatch.setattr(tokenized, "_SHUFFLED", tuple(range(10)))
    with pytest.raises(ValueError, match="data.order: expected the shuffle of grain 0.2.18"):
        make(folder).check_training()


def test_order_1_draws_each_row_of_a_step_whatever_the_batch_size(folder):
    small, large = (make(folder, batch_size=size, order=1).train_batch(5) for size in (2, 9))
    assert_equal(jax.tree.map(lambda leaf: leaf[:2], large), small)


def test_order_1_reaches_all_places(folder):
    dataset = make(folder, batch_size=8000, order=1)
    batch = dataset.train_batch(0)
    documents = [text(n, size) for n, size in enumerate(SIZES["train"])]
    # Every window there is; a document of one byte has none.
    documents = [d for d in documents if len(d) > 1]
    starts = {d[s : s + T + 1]: 0 for d in documents for s in range(max(len(d) - T, 1))}
    for row in range(8000):
        n = batch.loss_mask[row].sum()
        window = [*batch.tokens[row, :n], batch.targets[row, n - 1]]
        starts[dataset.tokenizer.decode(window)] += 1
    share = 8000 / len(starts)
    assert min(starts.values()) > 0 and max(starts.values()) < share + 6.0 * share**0.5
    np.testing.assert_array_equal(batch.num_bytes, batch.loss_mask)


@pytest.mark.parametrize("split", SPLITS)
def test_evaluation_covers_every_target_once_and_in_order(folder, split):
    dataset = make(folder)
    batches = list(dataset.eval_batches(split))
    assert len(batches) == dataset.num_eval_batches(split)
    rows = [
        (batch.tokens[r, : m.sum()], batch.targets[r, : m.sum()])
        for batch in batches
        for r, m in enumerate(batch.loss_mask)
    ]
    documents = [text(n, size) for n, size in enumerate(SIZES[split])]
    assert np.concatenate([y for _, y in rows]).astype(np.uint8).tobytes() == b"".join(
        d[1:] for d in documents
    )
    assert np.concatenate([x for x, _ in rows]).astype(np.uint8).tobytes() == b"".join(
        d[:-1] for d in documents
    )
    assert sum(batch.num_bytes.sum() for batch in batches) == sum(s - 1 for s in SIZES[split])


def test_fewer_evaluation_batches_are_spread_over_the_split(folder):
    dataset = make(folder, batch_size=2)
    whole = [tuple(row) for batch in dataset.eval_batches("train") for row in batch.tokens]
    assert dataset.num_eval_batches("train", max_batches=3) == 3
    some = list(dataset.eval_batches("train", max_batches=3))
    again = list(dataset.eval_batches("train", max_batches=3))
    jax.tree.map(np.testing.assert_array_equal, some, again)
    total = -(-399 // T) + 1 + 1 + 1 + 3
    expected = [i * total // 6 for i in range(6)]
    assert [tuple(row) for batch in some for row in batch.tokens] == [whole[i] for i in expected]
    assert dataset.num_eval_batches("train", max_batches=999) == dataset.num_eval_batches("train")


def test_bits_per_byte_add_up_under_bpe(tmp_path):
    (tmp_path / "in.txt").write_text("the cat and the dog – the end\n" * 400)
    spec = f"path:{tmp_path / 'in.txt'}"
    dataset = make("", corpus=spec, tokenizer="bpe", vocab_size=270, tokenizer_dir=tmp_path / "run")
    data = load_corpus(spec).splits["test"][0].data
    ids = dataset.tokenizer.encode(data)
    dataset.tokenizer.save(tmp_path / "run")
    counted = sum(batch.num_bytes.sum() for batch in dataset.eval_batches("test"))
    assert counted == len(data) - dataset.tokenizer.token_bytes[ids[0]]
    again = make("", corpus=spec, tokenizer="bpe", vocab_size=270, tokenizer_dir=tmp_path / "run")
    assert_equal(again.train_batch(1), dataset.train_batch(1))


def test_recall_labels_survive_and_the_window_sets_the_distance():
    dataset = make_recall(recall=RecallConfig(num_pairs=4))
    assert dataset.config.min_distance == 8 and dataset.num_kinds == 2
    assert make_recall(recall=RecallConfig(num_pairs=4, min_distance=9)).config.min_distance == 9
    batch = dataset.train_batch(2)
    names = np.array(recall_lib.symbols(dataset.config))
    is_query = np.char.startswith(names[batch.tokens], "?")
    np.testing.assert_array_equal(batch.kind == KIND_QUERY, is_query)
    assert is_query.any() and batch.loss_mask.all() and not batch.num_bytes.any()


def test_recall_splits_are_apart_and_independent_of_the_seed():
    dataset, other = make_recall(), make_recall(seed=0)
    seen = set()
    for source, name in ((dataset, "validation"), (dataset, "test"), (dataset, "train")):
        for batch in source.eval_batches(name, max_batches=3):
            seen |= {row.tobytes() for row in batch.tokens}
    for step in range(3):
        for source in (dataset, other):
            seen |= {row.tobytes() for row in source.train_batch(step).tokens}
    assert len(seen) == (9 + 6) * B
    for a, b in zip(dataset.eval_batches("test"), other.eval_batches("test"), strict=True):
        assert_equal(a, b)
    assert dataset.num_eval_batches("test") == 16
    assert dataset.num_eval_batches("test", max_batches=40) == 40


def test_manifest_is_written_once(maker, tmp_path):
    dataset = maker()
    write_manifest(dataset, tmp_path)
    path = tmp_path / "data_manifest.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(dataset.manifest()))
    write_manifest(maker(seed=9, batch_size=2, sequence_length=T - 2), tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="use another workdir"):
        write_manifest(make_recall(recall=RecallConfig(num_pairs=3)), tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["data_manifest.json"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(sequence_length=0), "sequence_length: expected at least 1, got 0"),
        (dict(batch_size=0), "batch_size: expected at least 1, got 0"),
        (dict(seed=-1), "seed: expected at least 0, got -1"),
        (dict(rows=slice(6, 9)), "rows: expected some of the batch's 6 rows"),
    ],
)
def test_bad_sizes_are_refused(maker, changes, message):
    with pytest.raises(ValueError, match=message):
        maker(**changes)


def test_bad_evaluations_are_refused_when_asked_for(maker):
    dataset = maker()
    for ask in (dataset.eval_batches, dataset.num_eval_batches):
        with pytest.raises(ValueError, match="split: expected one of train, validation, test"):
            ask("valid")
        with pytest.raises(ValueError, match="max_batches: expected at least 1, got 0"):
            ask("test", max_batches=0)


def test_data_without_room_are_refused(folder, tmp_path):
    tokens = sum(size for size in SIZES["train"] if size > 1)
    assert make(folder, sequence_length=tokens - 1).train_batch(0).loss_mask.any()
    with pytest.raises(ValueError, match=f"sequence_length: expected at most {tokens - 1}"):
        make(folder, sequence_length=tokens)
    with pytest.raises(ValueError, match="sequence_length: expected more than 15"):
        make_recall(sequence_length=15)
    for number, split in enumerate(SPLITS):
        content = b"x" if split == "test" else text(number, 99)
        (tmp_path / f"{split}.txt").write_bytes(content)
    with pytest.raises(ValueError, match="2 tokens in split 'test'"):
        make(tmp_path)
