"""`recall`: a generated corpus whose right routes are known, and its entropy floor, the loss that no model goes below.

A sequence binds P random keys to values, one pair token each, then mixes a local grammar of fillers with queries, a key
alone that is answered by its value:

    k3=v7 k0=v1 ... k9=v7  c5 c10 c3 ...  ?k0 v1  c0 c1 ?k9 v7 c6 ...

A query stands at least `min_distance` tokens behind every binding, so a window of that size cannot see it: exact recall
(full attention) is needed at query tokens. The rest follows from the last few tokens, but for which keys are bound, a
set without order, worth log(num_keys / num_pairs) nats per query to whoever guesses the next one. A key that is asked
twice may find its first answer nearby.

With `num_marks` there is a third kind. Marks m0, m1, ... are strewn among the fillers, one of them oftener than the
others in every sequence, and an aggregate query is answered by the most frequent mark so far:

    ... c5 m2 c10 m0 m2 c3 ... ?most a2 c0 ...

That is a statistic of the whole past without any position: linear attention suffices, where a window holds too few
marks.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Int

from meta_attention_jax.fields import expect

KIND_OTHER, KIND_QUERY, KIND_AGGREGATE, KIND_LOCAL = 0, 1, 2, 3
KINDS = ("other", "recall", "aggregate", "local")
"""Names of the kinds of tokens, by what it takes to predict the next one. With marks, `other` needs
nothing but the token itself (fillers, and the head, whose next token is random); without, it holds the
local ones too."""

TRUE_MECHANISMS = (None, "full", "linear", "local")  # The cheapest mechanism that suffices for each kind; None for any.

Uniforms = Float[np.ndarray, "rows draws"]
Sample = tuple[Int[np.ndarray, "rows length_and_next"], Int[np.ndarray, "rows length"]]


@dataclasses.dataclass(frozen=True)
class RecallConfig:
    """The generator's parameters. Token ids, in this order: pairs (key-major), queries, values, fillers, and with
    marks: marks, the aggregate query, its answers."""

    num_keys: int = 16  # Keys that exist.
    num_values: int = 16  # Values that exist; several keys may share one.
    num_fillers: int = 16  # n, symbols of the local grammar; c is followed by 5c + 1 mod n.
    num_pairs: int = 8  # P, distinct keys bound at the head of a sequence, in random order.
    # Least distance in tokens from any binding to a query; at least the window for queries that no window can answer.
    # (L stacked windows of w reach L (w - 1) tokens back.)
    min_distance: int = 2
    query_rate: float = 0.25  # Probability that a token which is free to be a query is one.
    jump_rate: float = 0.1  # Probability that a filler is drawn uniformly instead of following the grammar.
    num_marks: int = 0  # M, symbols to be counted; 0 for none of this.
    mark_rate: float = 0.0  # Probability that a token that is neither query nor answer is a mark.
    mark_bias: float = 0.5  # Probability that a mark is the sequence's favourite; else it is uniform.
    aggregate_rate: float = 0.0  # As `query_rate`, of aggregate queries. Without a mark so far the answer is a0.

    def __post_init__(self) -> None:
        for field in ("num_keys", "num_values", "num_fillers", "num_pairs"):
            value = getattr(self, field)
            expect(value >= 1, f"recall.{field}", "at least 1", value)
        most = f"at most num_keys = {self.num_keys}"
        expect(self.num_pairs <= self.num_keys, "recall.num_pairs", most, self.num_pairs)
        expect(self.min_distance >= 2, "recall.min_distance", "at least 2", self.min_distance)
        expect(0.0 < self.query_rate < 1.0, "recall.query_rate", "within (0, 1)", self.query_rate)
        expect(0.0 < self.jump_rate <= 1.0, "recall.jump_rate", "within (0, 1]", self.jump_rate)
        expect(self.num_marks >= 0 and self.num_marks != 1, "recall.num_marks", "0 or at least 2", self.num_marks)
        for field in ("mark_rate", "aggregate_rate"):
            value = getattr(self, field)
            ok = 0.0 < value < 1.0 if self.num_marks else value == 0.0
            expect(ok, f"recall.{field}", "within (0, 1)" if self.num_marks else "0 without marks", value)
        expect(0.0 < self.mark_bias <= 1.0, "recall.mark_bias", "within (0, 1]", self.mark_bias)
        rates = self.ask_rate + self.mark_rate
        expect(rates < 1.0, "recall.query_rate + aggregate_rate + mark_rate", "a sum below 1", rates)

    @property
    def query_offset(self) -> int:
        return self.num_keys * self.num_values

    @property
    def value_offset(self) -> int:
        return self.query_offset + self.num_keys

    @property
    def filler_offset(self) -> int:
        return self.value_offset + self.num_values

    @property
    def vocab_size(self) -> int:
        return self.mark_offset + (2 * self.num_marks + 1 if self.num_marks else 0)

    @property
    def mark_offset(self) -> int:
        """Id of the first mark; the aggregate query and its answers follow the marks."""
        return self.filler_offset + self.num_fillers

    @property
    def num_kinds(self) -> int:
        return 4 if self.num_marks else 2

    @property
    def ask_rate(self) -> float:
        """Probability that a token which is free to be a query of either kind is one."""
        return self.query_rate + self.aggregate_rate

    @property
    def first_query(self) -> int:
        """First position that may hold a query; from P to there all tokens are fillers."""
        return self.num_pairs - 1 + self.min_distance


def symbols(config: RecallConfig) -> tuple[str, ...]:
    """Readable names of the tokens by id: k3=v7, ?k3, v7, c5; m1, ?most, a1."""
    keys = [f"k{k}" for k in range(config.num_keys)]
    values = [f"v{v}" for v in range(config.num_values)]
    fillers = [f"c{c}" for c in range(config.num_fillers)]
    pairs = [f"{key}={value}" for key in keys for value in values]
    marks = [f"m{m}" for m in range(config.num_marks)]
    aggregate = ["?most", *(f"a{m}" for m in range(config.num_marks))] if marks else []
    return (*pairs, *(f"?{key}" for key in keys), *values, *fillers, *marks, *aggregate)


def check_length(config: RecallConfig, length: int) -> None:
    """Raises ValueError unless a sequence of `length` inputs can hold a query."""
    if length <= config.first_query:
        raise ValueError(
            f"sequence_length: expected more than {config.first_query} tokens, so that a query "
            f"fits behind {config.num_pairs} pairs at distance {config.min_distance}, got {length}."
        )


def num_draws(config: RecallConfig, length: int) -> int:
    """Uniform numbers that one sequence of `length` inputs uses up."""
    favourite = int(config.num_marks > 0)
    return config.num_keys + config.num_pairs + 3 * (length + 1 - config.num_pairs) + favourite


def sample(rng: np.random.Generator, config: RecallConfig, rows: int, length: int) -> Sample:
    """Draws `rows` sequences; see `sequences`. Row r does not depend on `rows`."""
    return sequences(rng.random((rows, num_draws(config, length))), config, length)


def sequences(uniforms: Uniforms, config: RecallConfig, length: int) -> Sample:
    """Sequences as a deterministic function of uniform numbers.

    `uniforms` are independent, in [0, 1), `num_draws(config, length)` in a row; `length` is T, the inputs of a
    sequence.

    Returns:
      tokens: [rows, T + 1], inputs and targets overlapping by T - 1.
      kind: [rows, T]; KIND_QUERY or KIND_AGGREGATE where the input is a query, so that its target is the answer. With
        marks, KIND_LOCAL where the input is an answer or a mark, after which the grammar goes on from a filler further
        back; else KIND_OTHER.
    """
    check_length(config, length)
    pairs, body = config.num_pairs, length + 1 - config.num_pairs
    widths = np.cumsum([config.num_keys, pairs, body, body, body])
    order, value_draw, coin, choice, symbol, favourite = np.split(uniforms, widths, axis=1)
    keys = np.argsort(order, axis=1, kind="stable")[:, :pairs]
    values = _pick(value_draw, config.num_values)

    # A coin asks for a query, but the token after a query is its answer: in a run of such coins
    # every second one counts.
    index = np.arange(body)
    wants = (coin < config.ask_rate) & (index >= config.first_query - pairs)
    run_start = np.maximum.accumulate(np.where(wants, -1, index), axis=1)
    ask = wants & ((index - run_start) % 2 == 1)
    answer = np.zeros_like(ask)
    answer[:, 1:] = ask[:, :-1]
    aggregate = ask & (coin >= config.query_rate)
    # The body starts with a filler (min_distance >= 2).
    mark = ~(ask | answer) & (index > 0)
    mark &= (coin >= config.ask_rate) & (coin < config.ask_rate + config.mark_rate)
    filler = ~(ask | answer | mark)

    asked = _pick(choice, pairs)
    asked[:, 1:] = np.where(answer[:, 1:], asked[:, :-1], asked[:, 1:])
    asked_keys = np.take_along_axis(keys, asked, axis=1)
    answers = np.take_along_axis(values, asked, axis=1)

    # A filler is the last freely drawn one, moved on by the number of fillers since; the first is
    # drawn freely.
    drawn = filler & (choice < config.jump_rate)
    drawn[:, 0] = True
    last = np.maximum.accumulate(np.where(drawn, index, 0), axis=1)
    count = np.cumsum(filler, axis=1)
    since = count - np.take_along_axis(count, last, axis=1)
    start = np.take_along_axis(_pick(symbol, config.num_fillers), last, axis=1)
    fillers = _orbits(config.num_fillers, body)[start, since]

    text = np.where(
        ask, config.query_offset + asked_keys,
        np.where(answer, config.value_offset + answers, config.filler_offset + fillers),
    )
    if config.num_marks:
        marks = np.where(choice < config.mark_bias, _pick(favourite, config.num_marks), _pick(symbol, config.num_marks))
        most = _most_frequent(np.where(mark, marks, -1), config.num_marks)
        asked_most = config.mark_offset + config.num_marks
        text = np.where(mark, config.mark_offset + marks, text)
        text = np.where(aggregate, asked_most, text)
        text[:, 1:] = np.where(aggregate[:, :-1], asked_most + 1 + most[:, :-1], text[:, 1:])
    tokens = np.concatenate([keys * config.num_values + values, text], axis=1).astype(np.int32)
    kind = np.full((len(tokens), length), KIND_OTHER, np.int32)
    kinds = np.where(aggregate, KIND_AGGREGATE, np.where(ask, KIND_QUERY, KIND_OTHER))
    if config.num_marks:
        kinds = np.where(answer | mark, KIND_LOCAL, kinds)
    kind[:, pairs:] = kinds[:, :-1]
    return tokens, kind


def _most_frequent(marks: Int[np.ndarray, "rows body"], num_marks: int) -> Int[np.ndarray, "rows body"]:
    """The most frequent mark up to every place, the first of equals; -1 is no mark."""
    counts = np.cumsum(marks[..., None] == np.arange(num_marks), axis=1)
    return np.argmax(counts, axis=-1)


def _pick(uniforms: Float[np.ndarray, "rows n"], count: int) -> Int[np.ndarray, "rows n"]:
    return (uniforms * count).astype(np.int64)


def _orbits(num_fillers: int, steps: int) -> Int[np.ndarray, "fillers steps"]:
    """Where c -> 5c + 1 mod n has moved each symbol after 0, 1, ... steps."""
    orbits = np.empty((num_fillers, steps), np.int64)
    orbits[:, 0] = np.arange(num_fillers)
    for step in range(1, steps):
        orbits[:, step] = (5 * orbits[:, step - 1] + 1) % num_fillers
    return orbits


def entropy_floor(config: RecallConfig, length: int) -> float:
    """Nats per target of the generator itself, given the whole past: no model can go below.

    With P pairs, n fillers, rho the query rate, and a_t the probability that token t is free to be a query (a_t = 1 -
    rho a_{t-1} from the first position on that allows one), the entropies are

        t < P:         log(num_keys - t) + log(num_values)     the next pair, its key not yet bound
        t = P:         log n                                   the first filler
        no query yet:  h_f = H(next filler | last filler)
        else:          a_t (H(rho) + rho log P + (1 - rho) h_f), and 0 for an answer,

    summed over the targets t = 1 .. T and divided by T. With marks (rate mu, aggregate queries sigma) the coin has four
    sides, a mark takes the place of a filler, and the k-th mark of a sequence adds h_k, its entropy given the k - 1
    before: a mean over simulated sequences, with a standard error of about 2e-3 nats per mark, and so of some 1e-4 of
    the floor.
    """
    check_length(config, length)
    rho, sigma, mu = config.query_rate, config.aggregate_rate, config.mark_rate
    stray = config.jump_rate / config.num_fillers
    follow = 1.0 - config.jump_rate + stray
    filler = -follow * math.log(follow) - (config.num_fillers - 1) * stray * math.log(stray)
    rest = 1.0 - rho - sigma - mu
    step = _entropy(rho, sigma, mu, rest) + rho * math.log(config.num_pairs) + rest * filler
    before = _entropy(mu, 1.0 - mu) + (1.0 - mu) * filler
    pairs = sum(math.log(config.num_keys - t) + math.log(config.num_values) for t in range(1, config.num_pairs))
    quiet = config.first_query - config.num_pairs - 1
    free = _free(config, length)
    total = pairs + math.log(config.num_fillers) + quiet * before + step * float(free.sum())
    if config.num_marks:
        places = _mark_places(config, quiet, len(free))
        total += float(places @ _mark_entropies(config, len(places)))
    return total / length


def _free(config: RecallConfig, length: int) -> Float[np.ndarray, "tokens"]:
    """a_t for t from the first position of a query to the last token, t = T."""
    free = np.ones(length + 1 - config.first_query)
    for t in range(1, len(free)):
        free[t] = 1.0 - config.ask_rate * free[t - 1]
    return free


def _entropy(*probabilities: float) -> float:
    """-sum p log p, with 0 log 0 = 0."""
    return -sum(p * math.log(p) for p in probabilities if p > 0.0)


def _mark_places(config: RecallConfig, quiet: int, active: int) -> Float[np.ndarray, "marks"]:
    """Expected number (0 to 1) of k-th marks in a sequence, k = 1, 2, ...: by the distribution of the marks so far,
    over `quiet` tokens without queries and `active` ones with them."""
    most = quiet + active
    free, answer = np.zeros(most + 1), np.zeros(most + 1)  # By the number of marks so far.
    free[0], places = 1.0, np.zeros(most)
    for place in range(most):
        ask = config.ask_rate if place >= quiet else 0.0
        drawn = config.mark_rate * free
        places += drawn[:-1]
        stays = (1.0 - ask - config.mark_rate) * free + answer
        stays[1:] += drawn[:-1]
        answer = ask * free
        free = stays
    return places


def _mark_entropies(config: RecallConfig, most: int) -> Float[np.ndarray, "marks"]:
    """h_k = E H(mark k | marks before), k = 1 .. most, by the reader who knows all but the favourite. With counts n_j
    so far, P(favourite = j) is proportional to r^n_j, r = 1 + M b / (1 - b), and P(next = j) = b P(favourite = j) + (1
    - b) / M."""
    num, bias = config.num_marks, config.mark_bias
    rng = np.random.default_rng(0)
    rows = 4000
    odds = math.log1p(num * bias / (1.0 - bias)) if bias < 1.0 else 50.0
    favourite = rng.integers(num, size=rows)
    counts = np.zeros((rows, num))
    entropies = np.zeros(most)
    for k in range(most):
        posterior = np.exp(odds * (counts - counts.max(axis=1, keepdims=True)))
        posterior /= posterior.sum(axis=1, keepdims=True)
        predictive = np.maximum(bias * posterior + (1.0 - bias) / num, 1e-30)
        entropies[k] = -np.mean(np.sum(predictive * np.log(predictive), axis=1))
        uniform = rng.integers(num, size=rows)
        counts[np.arange(rows), np.where(rng.random(rows) < bias, favourite, uniform)] += 1
    return entropies
