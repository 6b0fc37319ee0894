"""The recall corpus against a naive reading of its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from configs import recall_oracle
from meta_attention_jax.data import recall
from meta_attention_jax.data.recall import KIND_AGGREGATE, KIND_LOCAL, KIND_QUERY, RecallConfig, entropy_floor
from meta_attention_jax.training import build

CONFIGS = [
    RecallConfig(min_distance=8),
    RecallConfig(
        num_keys=3, num_values=5, num_fillers=7, num_pairs=3, query_rate=0.6, jump_rate=0.5
    ),
    RecallConfig(num_pairs=1, num_fillers=1, num_values=1, jump_rate=1.0),
    RecallConfig(
        num_keys=4, num_values=3, num_fillers=5, num_pairs=2, query_rate=0.2, min_distance=5,
        num_marks=4, mark_rate=0.3, mark_bias=0.6, aggregate_rate=0.15,
    ),
]
LENGTH = 40
FIRST_TOKENS = [189, 56, 212, 38, 240, 17, 138, 106, 302, 295, 288, 289]


def draw(config, rows, seed=0, length=LENGTH):
    return recall.sample(np.random.default_rng(seed), config, rows, length)


def naive(tokens, config):
    """Reads one sequence by its rules: (log p of every target, kind of every input).

    The probability is that of a reader who knows the rules and all tokens before the target.
    """
    names = recall.symbols(config)
    bound, filler, asked = {}, None, None
    counts, most = np.zeros(config.num_marks), None
    log_p, kinds = [], []
    for t, token in enumerate(tokens):
        name = names[token]
        if t < config.num_pairs:
            key, value = name.split("=")
            assert key not in bound
            p = 1.0 / ((config.num_keys - len(bound)) * config.num_values)
            bound[key] = value
        elif asked is not None:
            assert name == bound[asked]
            p, asked = 1.0, None
        elif most is not None:
            assert name == f"a{most}"
            p, most = 1.0, None
        else:
            may_ask = t - (config.num_pairs - 1) >= config.min_distance
            if name == "?most":
                assert may_ask
                most = max(range(config.num_marks), key=lambda m: (counts[m], -m))
                p = config.aggregate_rate
            elif name[0] == "m":
                # Bayes over the favourite, mark by mark.
                b, num = config.mark_bias, config.num_marks
                given = b * np.eye(num) + (1 - b) / num  # [favourite mark]
                favourite = np.prod(given**counts[None], axis=1)
                p = config.mark_rate * (favourite @ given[:, int(name[1:])]) / favourite.sum()
                counts[int(name[1:])] += 1
            elif name[0] == "?":
                assert may_ask
                asked = name[1:]
                assert asked in bound
                p = config.query_rate / config.num_pairs
            else:
                assert name[0] == "c"
                p = 1.0 - may_ask * (config.query_rate + config.aggregate_rate)
                if filler is not None:  # The body's first token is no mark.
                    p -= config.mark_rate
                symbol = int(name[1:])
                if filler is None:
                    p *= 1.0 / config.num_fillers
                else:
                    follows = symbol == (5 * filler + 1) % config.num_fillers
                    p *= config.jump_rate / config.num_fillers + (1.0 - config.jump_rate) * follows
                filler = symbol
        log_p.append(math.log(p))
        local = config.num_marks and name[0] in "vam" and "=" not in name
        kinds.append(
            KIND_QUERY if asked else KIND_AGGREGATE if most is not None else KIND_LOCAL * bool(local)
        )
    return log_p[1:], kinds[:-1]


@pytest.mark.parametrize("config", CONFIGS)
def test_sequences_follow_the_rules_and_labels_are_right(config):
    tokens, kind = draw(config, 60)
    assert tokens.shape == (60, LENGTH + 1) and kind.shape == (60, LENGTH)
    for row, labels in zip(tokens, kind, strict=True):
        assert labels.tolist() == naive(row, config)[1]
    assert (kind == KIND_QUERY).any()


@pytest.mark.parametrize("config", [*CONFIGS[:2], CONFIGS[3]])
def test_entropy_floor_is_the_mean_of_the_true_log_probabilities(config):
    rows = 1500
    nll = np.array([-np.mean(naive(row, config)[0]) for row in draw(config, rows, seed=1)[0]])
    error = nll.std() / math.sqrt(rows)
    assert error < 0.02
    assert abs(nll.mean() - entropy_floor(config, LENGTH)) < 4.0 * error


def test_without_marks_nothing_is_new():
    """The same sequences, vocabulary and kinds as a generator that knows of no marks."""
    config = RecallConfig(min_distance=8)
    assert config.num_kinds == 2 and config.vocab_size == 304
    tokens, kind = draw(config, 2)
    assert tokens[0, :12].tolist() == FIRST_TOKENS
    assert not (kind == KIND_AGGREGATE).any()


def test_aggregate_answers_need_the_whole_past():
    """In the shipped config, the majority of what both layers' windows reach is often another one than
    that of the whole past, and few answers are ties."""
    shipped = recall_oracle.get_config()
    config = build.build_dataset(shipped).config
    length, window = shipped.data.sequence_length, shipped.model.window
    reach = shipped.model.num_layers * (window - 1) + 1
    assert config.min_distance >= reach, "no stack of windows sees a binding from a query"
    tokens, kind = draw(config, 300, length=length)
    marks = tokens[:, :-1] - config.mark_offset
    right = {reach: 0, length: 0}
    ties = 0
    rows, columns = np.nonzero(kind == KIND_AGGREGATE)
    for row, t in zip(rows, columns):
        answer = tokens[row, t + 1] - config.mark_offset - config.num_marks - 1
        for window in right:
            seen = marks[row, max(0, t + 1 - window) : t + 1]
            counts = [np.sum(seen == m) for m in range(config.num_marks)]
            right[window] += np.argmax(counts) == answer
        ties += np.sort(counts)[-1] == np.sort(counts)[-2]
    assert right[length] == len(rows) and right[reach] < 0.7 * len(rows)
    assert ties < 0.2 * len(rows)
    assert np.bincount(kind.ravel(), minlength=4).min() > 100


def test_floor_in_closed_form():
    # One pair, one filler symbol: apart from the head only the coin is uncertain, at each of the
    # positions 2 and (unless 2 is a query) 3.
    config = RecallConfig(num_pairs=1, num_fillers=1, query_rate=0.5, jump_rate=1.0)
    assert entropy_floor(config, 3) == pytest.approx(1.5 * math.log(2.0) / 3.0)


def test_bindings_and_queries_are_uniform():
    config = RecallConfig(min_distance=4)
    tokens, kind = draw(config, 4000, seed=3)
    pairs = tokens[:, : config.num_pairs]
    counts = np.bincount(pairs.ravel(), minlength=config.query_offset)[: config.query_offset]
    expected = pairs.size / config.query_offset
    assert np.abs(counts - expected).max() < 6.0 * math.sqrt(expected)
    # Which binding is asked for: all places of the head alike.
    row, column = np.nonzero(kind == KIND_QUERY)
    key = tokens[row, column] - config.query_offset
    place = np.argmax(pairs[row] // config.num_values == key[:, None], axis=1)
    places = np.bincount(place, minlength=config.num_pairs)
    expected = len(row) / config.num_pairs
    assert np.abs(places - expected).max() < 6.0 * math.sqrt(expected)


def test_rows_do_not_depend_on_their_number():
    config = CONFIGS[0]
    few, many = draw(config, 3, seed=4), draw(config, 50, seed=4)
    for a, b in zip(few, many, strict=True):
        np.testing.assert_array_equal(a, b[:3])


def test_symbols_name_every_id():
    config = CONFIGS[0]
    names = recall.symbols(config)
    assert len(set(names)) == len(names) == config.vocab_size == 304
    assert names[3 * config.num_values + 7] == "k3=v7"
    assert names[config.query_offset + 3] == "?k3"
    assert names[config.value_offset + 7] == "v7"
    assert names[config.filler_offset + 5] == "c5"


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_keys", 0),
        ("num_values", 0),
        ("num_fillers", -1),
        ("num_pairs", 0),
        ("num_pairs", 17),
        ("min_distance", 1),
        ("query_rate", 0.0),
        ("query_rate", 1.0),
        ("jump_rate", 0.0),
        ("jump_rate", 1.5),
        ("num_marks", 1),
        ("mark_rate", 0.1),
        ("aggregate_rate", 0.1),
        ("mark_bias", 0.0),
    ],
)
def test_parameters_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"recall.{field}: expected .* got {value}"):
        RecallConfig(**{field: value})


def test_a_sequence_must_have_room_for_a_query():
    config = RecallConfig(min_distance=8)
    assert entropy_floor(config, 16) > 0.0
    for call in (entropy_floor, recall.check_length):
        with pytest.raises(ValueError, match="sequence_length: expected more than 15"):
            call(config, 15)
    with pytest.raises(ValueError, match="sequence_length"):
        draw(config, 1, length=15)
