"""The recall corpus against a naive reading of its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from meta_attention_jax.data import recall
from meta_attention_jax.data.recall import KIND_QUERY, RecallConfig

CONFIGS = [
    RecallConfig(min_distance=8),
    RecallConfig(
        num_keys=3, num_values=5, num_fillers=7, num_pairs=3, query_rate=0.6, jump_rate=0.5
    ),
    RecallConfig(num_pairs=1, num_fillers=1, num_values=1, jump_rate=1.0),
]
LENGTH = 40


def draw(config, rows, seed=0, length=LENGTH):
    return recall.sample(np.random.default_rng(seed), config, rows, length)


def naive(tokens, config):
    """Reads one sequence by its rules: (log p of every target, kind of every input).

    The probability is that of a reader who knows the rules and all tokens before the target.
    """
    names = recall.symbols(config)
    bound, filler, asked = {}, None, None
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
        else:
            may_ask = t - (config.num_pairs - 1) >= config.min_distance
            if name[0] == "?":
                assert may_ask
                asked = name[1:]
                assert asked in bound
                p = config.query_rate / config.num_pairs
            else:
                assert name[0] == "c"
                p = 1.0 - config.query_rate if may_ask else 1.0
                symbol = int(name[1:])
                if filler is None:
                    p *= 1.0 / config.num_fillers
                else:
                    follows = symbol == (5 * filler + 1) % config.num_fillers
                    p *= config.jump_rate / config.num_fillers + (1.0 - config.jump_rate) * follows
                filler = symbol
        log_p.append(math.log(p))
        kinds.append(int(asked is not None))
    return log_p[1:], kinds[:-1]


@pytest.mark.parametrize("config", CONFIGS)
def test_sequences_follow_the_rules_and_labels_are_right(config):
    tokens, kind = draw(config, 60)
    assert tokens.shape == (60, LENGTH + 1) and kind.shape == (60, LENGTH)
    for row, labels in zip(tokens, kind, strict=True):
        assert labels.tolist() == naive(row, config)[1]
    assert (kind == KIND_QUERY).any()


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_entropy_floor_is_the_mean_of_the_true_log_probabilities(config):
    rows = 1500
    nll = np.array([-np.mean(naive(row, config)[0]) for row in draw(config, rows, seed=1)[0]])
    error = nll.std() / math.sqrt(rows)
    assert error < 0.02
    assert abs(nll.mean() - recall.entropy_floor(config, LENGTH)) < 4.0 * error


@pytest.mark.parametrize("config", CONFIGS)
def test_query_fraction(config):
    kind = draw(config, 4000, seed=2)[1]
    share = (kind == KIND_QUERY).mean(axis=1)
    error = share.std() / math.sqrt(len(share))
    assert abs(share.mean() - recall.query_fraction(config, LENGTH)) < 4.0 * error


def test_floor_in_closed_form():
    # One pair, one filler symbol: apart from the head only the coin is uncertain, at each of the
    # positions 2 and (unless 2 is a query) 3.
    config = RecallConfig(num_pairs=1, num_fillers=1, query_rate=0.5, jump_rate=1.0)
    assert recall.entropy_floor(config, 3) == pytest.approx(1.5 * math.log(2.0) / 3.0)
    assert recall.query_fraction(config, 3) == pytest.approx(0.5 / 3.0)


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
    ],
)
def test_parameters_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"recall.{field}: expected .* got {value}"):
        RecallConfig(**{field: value})


def test_a_sequence_must_have_room_for_a_query():
    config = RecallConfig(min_distance=8)
    assert recall.entropy_floor(config, 16) > 0.0
    for call in (recall.entropy_floor, recall.query_fraction, recall.check_length):
        with pytest.raises(ValueError, match="sequence_length: expected more than 15"):
            call(config, 15)
    with pytest.raises(ValueError, match="sequence_length"):
        draw(config, 1, length=15)
