"""Windows that are tasks, against a naive reading of what they say; and what is reported of their answers."""

from __future__ import annotations

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from meta_attention_jax import RoutingHypers
from meta_attention_jax.config import completed, config_to_dict, default_config
from meta_attention_jax.data import tasks as tasks_lib
from meta_attention_jax.data.corpora import SPLITS
from meta_attention_jax.data.manifest import digest, same_data, write_manifest
from meta_attention_jax.data.pipeline import TaskDataset, TextDataset, make_dataset
from meta_attention_jax.data.tasks import KINDS, LOOKUP, NEEDLES, OTHER, PROSE, REPEAT, SEEN, TaskConfig
from meta_attention_jax.data.tokenizer import BPETokenizer
from meta_attention_jax.objective import forward, loss_sums, summarise
from meta_attention_jax.training import build
from tests import making

T, B, WINDOW = 256, 12, 16
NEEDLE = re.compile(rb"\n\nNote: the code word of ([A-Z][a-z]{3}) is ([A-Z][a-z]{3})\.\n\n")
END = re.compile(rb"\n\nRemember the note above: the code word of ([A-Z][a-z]{3}) is ([A-Z][a-z]{3})$")


def text(number, size):
    """Sentences of made-up words without capitals, so that no long stretch is there twice."""
    rng = np.random.default_rng(number)
    words = ["".join(chr(c) for c in rng.integers(97, 123, rng.integers(2, 9))) for _ in range(size // 4)]
    ends = np.where(rng.random(len(words)) < 0.2, rng.choice([". ", ".\n"], len(words)), " ")
    return "".join(word + end for word, end in zip(words, ends)).encode()[:size]


SIZES = {"train": [3000, 200, 2000], "validation": [2500], "test": [2600]}
DOCUMENTS = {
    split: [text(1000 * i + n, size) for n, size in enumerate(SIZES[split])] for i, split in enumerate(SPLITS)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for split, documents in DOCUMENTS.items():
        (root / split).mkdir()
        for number, data in enumerate(documents):
            (root / split / f"{number}.txt").write_bytes(data)
    return root


def make(folder, *tasks, **changes):
    arguments = dict(
        corpus=f"path:{folder}", sequence_length=T, batch_size=B, seed=3, window=WINDOW, tasks=tasks, needles=4,
        shares=(1.0,) * len(tasks),
    )
    return make_dataset(**{**arguments, **changes})


def batches(dataset):
    """(split, batch) of training and of every split."""
    yield from (("train", dataset.train_batch(step)) for step in range(3))
    yield from ((split, batch) for split in SPLITS for batch in dataset.eval_batches(split, max_batches=2))


def windows(batch):
    return np.concatenate([batch.tokens[:, :1], batch.targets], axis=1)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rows_of(batch):
    return {row.tobytes() for row in windows(batch)}


def test_what_is_labelled_a_repeat_is_the_token_a_period_before(folder):
    periods = set()
    for split, batch in batches(make(folder, "repeat", min_distance=40)):
        assert batch.loss_mask.all() and set(np.unique(batch.kind)) == {REPEAT, OTHER}
        for row, kind in zip(windows(batch), batch.kind):
            period = next(p for p in range(1, T) if (row[p:] == row[:-p]).all())
            periods.add(period)
            labelled = 1 + np.flatnonzero(kind == REPEAT)
            assert labelled.tolist() == list(range(period + SEEN, T + 1))
            assert any(row[:period].astype(np.uint8).tobytes() in data for data in DOCUMENTS[split])
    assert min(periods) >= 40 and max(periods) <= T // 2 and len(periods) > 40
    shortest = make(folder, "repeat", sequence_length=4 * WINDOW)
    for row in windows(shortest.train_batch(0)):
        assert (row[2 * WINDOW :] == row[: -2 * WINDOW]).all(), "two windows, without a distance"


@pytest.mark.parametrize("needles, length", [(1, T), (4, 400), (0, 900)])
def test_a_question_is_answered_by_one_needle_out_of_reach(folder, needles, length):
    dataset = make(folder, "lookup", needles=needles, sequence_length=length, min_distance=30)
    counts, behind, depths = set(), 0, []
    for split, batch in batches(dataset):
        assert batch.loss_mask.all() and set(np.unique(batch.kind)) == {LOOKUP, OTHER}
        for row, kind in zip(windows(batch), batch.kind):
            said = dataset.tokenizer.decode(row)
            found = list(NEEDLE.finditer(said))
            asked = END.search(said)
            names, values = ([one.group(i) for one in found] for i in (1, 2))
            assert len(set(names + values)) == 2 * len(found)
            counts.add(len(found))
            answer = b" " + asked.group(2)
            assert dataset.tokenizer.decode(row[1:][kind == LOOKUP]) == answer
            assert (kind[-len(answer) :] == LOOKUP).all()
            [needle] = [one for one in found if one.group(1) == asked.group(1)]
            assert needle.group(2) == asked.group(2) and said.count(asked.group(2)) == 2
            assert asked.start() - (needle.end() - 1) > 30
            depths.append(needle.start() / length)
            prose = NEEDLE.sub(b"", said[: asked.start()])
            assert any(prose in data for data in DOCUMENTS[split])
            behind += sum(said[one.start() - 1 : one.start()] in (b".", b"\n") for one in found) == len(found)
    assert counts == ({needles} if needles else set(NEEDLES))
    assert behind > 0.8 * len(depths), "few windows have no end of a sentence before the distance"
    assert np.std(depths) > 0.1


def test_needles_of_other_tokenizers_and_wordings(folder):
    """The question's tokens begin the asked needle, and the answer's follow."""
    bpe = BPETokenizer.train(DOCUMENTS["train"], 300)
    for tokenizer, wording in (("bytes", 2), (bpe, 1), (bpe, 2)):
        dataset = make(folder, "lookup", tokenizer=tokenizer, wording=wording, needles=1)
        batch = dataset.train_batch(0)
        for row, kind in zip(windows(batch), batch.kind):
            answer = row[1:][kind == LOOKUP]
            said = dataset.tokenizer.decode(row)
            form, size = ((rb" The code word of \w{4} is", 4), (rb" [A-Z]\w{3}'s secret number is", 6))[wording - 1]
            first, last = (re.escape(one) for one in re.findall(form, said))
            value = rb" \w{%d}" % size
            assert first == last and re.search(first + value + rb"\.[\s\S]*" + last + value + rb"$", said)
            question = len(dataset.tokenizer.encode(re.findall(form, said)[-1]))
            end = row[T + 1 - len(answer) - question :]
            places = [i for i in range(T - len(end)) if (row[i : i + len(end)] == end).all()]
            assert len(places) == 1 and T + 1 - len(end) - (places[0] + len(end)) >= WINDOW
            assert dataset.tokenizer.decode(answer) == said[-size - 1 :] and said[-size - 1 :].startswith(b" ")


def test_windows_are_functions_of_seed_step_and_row(folder):
    tasks = ("prose", "repeat", "lookup")
    dataset = make(folder, *tasks)
    wanted = dataset.train_batch(7)
    dataset.train_batch(2)
    equal(make(folder, *tasks).train_batch(7), wanted)
    for other in (dataset.train_batch(8), make(folder, *tasks, seed=4).train_batch(7)):
        assert not rows_of(other) & rows_of(wanted)
    for rows in (slice(0, 5), slice(1, None, 2)):
        part = make(folder, *tasks, rows=rows)
        equal(jax.tree.map(lambda leaf: leaf[rows], wanted), part.train_batch(7))
        for whole, own in zip(dataset.eval_batches("test"), part.eval_batches("test"), strict=True):
            equal(jax.tree.map(lambda leaf: leaf[rows], whole), own)
    few = make(folder, *tasks, batch_size=3)
    equal(jax.tree.map(lambda leaf: leaf[:3], wanted), few.train_batch(7))
    first = next(dataset.eval_batches("validation"))
    again = np.concatenate([windows(b) for b in few.eval_batches("validation", max_batches=B // 3)])
    np.testing.assert_array_equal(again, windows(first))


def test_held_out_windows_are_fixed_and_apart_and_take_the_tasks_in_turn(folder):
    tasks = ("prose", "lookup", "repeat")
    dataset, other = make(folder, *tasks), make(folder, *tasks, seed=0, shares=(5, 1, 1))
    seen = set()
    for split in SPLITS:
        for a, b in zip(dataset.eval_batches(split), other.eval_batches(split), strict=True):
            equal(a, b)
            for row, kind in enumerate(a.kind):
                assert {PROSE: 0, LOOKUP: 1, REPEAT: 2}[min(set(kind) - {OTHER})] == row % 3
            seen |= rows_of(a)
    assert dataset.num_eval_batches("test") == 16 and dataset.num_eval_batches("test", max_batches=40) == 40
    for made in (dataset, other):
        assert not seen & rows_of(made.train_batch(0))
    for ask in (dataset.eval_batches, dataset.num_eval_batches):
        with pytest.raises(ValueError, match="split: expected one of train, validation, test"):
            ask("valid")


def test_training_rows_are_of_the_tasks_by_their_shares(folder):
    rows = 900
    dataset = make(folder, "prose", "repeat", "lookup", shares=(2.0, 1.0, 1.0), batch_size=rows, needles=1)
    batch = dataset.train_batch(0)
    counts = [(batch.kind == kind).any(axis=1).sum() for kind in (PROSE, REPEAT, LOOKUP)]
    # Windows of the short document are prose and padded.
    padded = ~batch.loss_mask
    counts[0] = rows - counts[1] - counts[2]
    assert padded.any() and not batch.kind[padded].any() and (batch.kind[padded.any(axis=1)] == PROSE).all()
    for count, share in zip(counts, (0.5, 0.25, 0.25)):
        assert abs(count - rows * share) < 4 * np.sqrt(rows * share * (1 - share))


def test_prose_alone_is_the_text_as_it_was(folder):
    given = make(folder, "prose", needles=0, min_distance=9)
    plain = make_dataset(corpus=f"path:{folder}", sequence_length=T, batch_size=B, seed=3)
    assert type(given) is type(plain) is TextDataset and given.num_kinds == 1
    assert given.manifest() == plain.manifest() and given.about() == plain.about()
    for a, b in zip(batches(given), batches(plain), strict=True):
        equal(a[1], b[1])


def test_a_manifest_has_the_tasks(folder, tmp_path):
    dataset = make(folder, "repeat", "lookup", shares=(3, 1))
    write_manifest(dataset, tmp_path)
    assert dataset.about()["tasks"] == "repeat 75%, lookup 25%" and ", repeat 75%, lookup 25%, split" in str(dataset)
    assert dataset.kinds == KINDS and dataset.num_kinds == 4
    write_manifest(make(folder, "repeat", "lookup", shares=(3, 1), seed=8, batch_size=2, sequence_length=250), tmp_path)
    stored = json.loads((tmp_path / "data_manifest.json").read_text())
    assert stored["tasks"]["period"] == 2 * WINDOW and stored["tasks"]["distance"] == WINDOW
    for other in (make(folder, "prose"), make(folder, "repeat", "lookup"), make(folder, "repeat", "lookup", needles=1)):
        assert not same_data(stored, other.manifest()) and digest(stored) != digest(other.manifest())
        with pytest.raises(ValueError, match="got other data or other tasks; use another workdir."):
            write_manifest(other, tmp_path)


@pytest.mark.parametrize("tasks, changes, sentence", [
    (("repaet",), {}, "data.tasks: expected some of prose, repeat, lookup, got 'repaet'; did you mean 'repeat'"),
    ((), {}, r"data.tasks: expected one or more distinct names, got \(\)."),
    (("prose", "prose"), {}, "data.tasks: expected one or more distinct names, got"),
    (("prose", "repeat"), dict(shares=(1.0,)), r"data.shares: expected a number > 0 for each of \('prose', 'repeat'\)"),
    (("repeat",), dict(shares=(0.0,)), r"data.shares: expected a number > 0 for each of .*, got \(0.0,\)."),
    (("repeat",), dict(shares=(float("nan"),)), "data.shares: expected a number > 0"),
    (("lookup",), dict(needles=-1), "data.needles: expected 0 to 500, got -1."),
    (("lookup",), dict(needles=10**6), "data.needles: expected 0 to 500, got 1000000."),
    (("lookup",), dict(min_distance=-1), "data.min_distance: expected at least 0, got -1."),
    (("lookup",), dict(wording=3), "wording: expected one of 0 to 2, got 3."),
    (("repeat",), dict(corpus="recall"), r"data.tasks: expected \('prose',\) for the corpus 'recall', got \('repeat'"),
    (("repeat",), dict(min_distance=129), "sequence_length: expected at least 258 tokens, two copies of .* 129, got "),
    (("lookup",), dict(needles=0), "sequence_length: expected at least 711 tokens, as data.needles may be 16 and"),
    (("lookup",), dict(sequence_length=3000 - 1), "sequence_length: expected less for 'lookup', made of 3000 tokens of "
                                                  "one document, which none of 'validation' has, got 2999."),
    (("lookup",), dict(tokenizer="model"), "tokenizer: expected a pretrained backbone, whose tokenizer 'model' is, "),
])
def test_what_cannot_be_is_one_sentence(folder, tasks, changes, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}") as error:
        make(folder, *tasks, **changes)
    assert "\n" not in str(error.value) and str(error.value)[-1] in ".?"


def test_needles_fit_exactly_where_they_just_fit(folder):
    note, question = len("\n\nNote: the code word of Milu is Zora.\n\n"), len(
        "\n\nRemember the note above: the code word of Milu is Zora"
    )
    least = 4 * note + question + WINDOW - 1
    for row in windows(make(folder, "lookup", sequence_length=least, batch_size=40).train_batch(0)):
        assert len(NEEDLE.findall(row.astype(np.uint8).tobytes())) == 4
    with pytest.raises(ValueError, match=f"^sequence_length: expected at least {least} tokens"):
        make(folder, "lookup", sequence_length=least - 1)


def test_a_config_says_the_tasks(folder, tmp_path):
    config = smoke.get_config()
    config.update_from_flattened_dict({
        "data.corpus": f"path:{folder}", "data.tasks": ("repeat", "lookup"), "data.shares": (1.0, 2.0),
        "data.needles": 1, "data.sequence_length": T, "data.min_distance": 20,
    })
    build.check(config)
    dataset = build.build_dataset(config)
    assert isinstance(dataset, TaskDataset) and build.build_spec(config, dataset).num_kinds == 4
    assert dataset.config == TaskConfig(("repeat", "lookup"), (1.0, 2.0), 1, config.model.window, 20)
    config.data.shares = (1.0, "x")
    with pytest.raises(ValueError, match=r"^data.shares: expected numbers such as \(1.0,\), got \(1.0, 'x'\)."):
        build.check(config)
    plain = config_to_dict(default_config())
    older = {**plain, "data": {k: v for k, v in plain["data"].items() if k not in ("tasks", "shares", "needles")}}
    assert completed(older) == plain


def test_answers_of_a_model_are_exact_by_window(folder):
    """Against a loop over windows; some targets are made to be what the model says."""
    dataset = make(folder, "prose", "repeat", "lookup", sequence_length=128, needles=1, batch_size=9)
    batch = jax.tree.map(jnp.asarray, next(dataset.eval_batches("test")))
    model = making.model(
        vocab_size=256, model_dim=16, num_layers=1, num_heads=1, window=WINDOW, mechanisms=("full", "local"),
        controller="fixed",
    )
    hypers = RoutingHypers(
        strength=jnp.float32(2), preference=jnp.float32(0.1), costs=jnp.float32([1, 0.15]), threshold=jnp.float32(0)
    )
    params = making.initial(model, batch.tokens, hypers=hypers)["params"]
    output = jax.jit(lambda params: forward(model, params, batch, hypers))(params)
    guess = np.argmax(output.logits, axis=-1)
    right = np.arange(9)[:, None] % 2 == 0
    targets = np.where(right & (np.asarray(batch.kind) != OTHER), guess, batch.targets)
    batch = batch.replace(targets=jnp.asarray(targets))
    sums = jax.jit(functools.partial(loss_sums, num_kinds=dataset.num_kinds))(output, batch)
    found = summarise(sums, mechanisms=("full", "local"), costs=(1.0, 0.15))["kinds"]["exact"]
    for kind in range(len(KINDS)):
        windows_of_kind = [
            [guess[b, t] == targets[b, t] for t in range(128) if batch.kind[b, t] == kind and batch.loss_mask[b, t]]
            for b in range(9)
        ]
        asked = [all(window) for window in windows_of_kind if window]
        assert found[kind] == pytest.approx(np.mean(asked), rel=1e-6), KINDS[kind]
    assert 0 < found[LOOKUP] < 1 and 0 < found[REPEAT] < 1 and found[OTHER] == 0


def test_words_are_those_that_it_says():
    rng = np.random.default_rng(0)
    words = {tasks_lib._word(rng) for _ in range(500)}
    assert len(words) > 450 and all(re.fullmatch("[A-Z][aeiou][b-z][aeiou]", word) for word in words)
