"""`recall`: a generated corpus whose right routes are known.

A sequence binds P random keys to values, one pair token each, then mixes a local grammar of fillers
with queries, a key alone that is answered by its value:

    k3=v7 k0=v1 ... k9=v7  c5 c10 c3 ...  ?k0 v1  c0 c1 ?k9 v7 c6 ...

A query stands at least `min_distance` tokens behind every binding, so a window of that size cannot
see it: exact recall (full attention) is needed at query tokens. The rest follows from the last few
tokens, but for which keys are bound, a set without order, worth log(num_keys / num_pairs) nats per
query to whoever guesses the next one. A key that is asked twice may find its first answer nearby.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Int

KIND_OTHER, KIND_QUERY = 0, 1
NUM_KINDS = 2

Uniforms = Float[np.ndarray, "rows draws"]
Sample = tuple[Int[np.ndarray, "rows length+1"], Int[np.ndarray, "rows length"]]


@dataclasses.dataclass(frozen=True)
class RecallConfig:
    """The generator's parameters.

    Token ids, in this order: pairs (key-major), queries, values, fillers.

    Attributes:
      num_keys: keys that exist.
      num_values: values that exist; several keys may share one.
      num_fillers: n, symbols of the local grammar; c is followed by 5c + 1 mod n.
      num_pairs: P, distinct keys bound at the head of a sequence, in random order.
      min_distance: least distance in tokens from any binding to a query; at least the window for
        queries that no window can answer. (L stacked windows of w reach L (w - 1) tokens back.)
      query_rate: probability that a token which is free to be a query is one.
      jump_rate: probability that a filler is drawn uniformly instead of following the grammar.

    Raises:
      ValueError: a parameter out of range.
    """

    num_keys: int = 16
    num_values: int = 16
    num_fillers: int = 16
    num_pairs: int = 8
    min_distance: int = 2
    query_rate: float = 0.25
    jump_rate: float = 0.1

    def __post_init__(self) -> None:
        for field in ("num_keys", "num_values", "num_fillers", "num_pairs"):
            value = getattr(self, field)
            if value < 1:
                raise ValueError(f"recall.{field}: expected at least 1, got {value}.")
        if self.num_pairs > self.num_keys:
            raise ValueError(
                f"recall.num_pairs: expected at most num_keys = {self.num_keys}, got "
                f"{self.num_pairs}."
            )
        if self.min_distance < 2:
            raise ValueError(f"recall.min_distance: expected at least 2, got {self.min_distance}.")
        if not 0.0 < self.query_rate < 1.0:
            raise ValueError(f"recall.query_rate: expected within (0, 1), got {self.query_rate}.")
        if not 0.0 < self.jump_rate <= 1.0:
            raise ValueError(f"recall.jump_rate: expected within (0, 1], got {self.jump_rate}.")

    @property
    def query_offset(self) -> int:
        """Id of the first query token."""
        return self.num_keys * self.num_values

    @property
    def value_offset(self) -> int:
        """Id of the first value token."""
        return self.query_offset + self.num_keys

    @property
    def filler_offset(self) -> int:
        """Id of the first filler token."""
        return self.value_offset + self.num_values

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.filler_offset + self.num_fillers

    @property
    def first_query(self) -> int:
        """First position that may hold a query; from P to there all tokens are fillers."""
        return self.num_pairs - 1 + self.min_distance


def symbols(config: RecallConfig) -> tuple[str, ...]:
    """Readable names of the tokens by id: k3=v7, ?k3, v7, c5."""
    keys = [f"k{k}" for k in range(config.num_keys)]
    values = [f"v{v}" for v in range(config.num_values)]
    fillers = [f"c{c}" for c in range(config.num_fillers)]
    pairs = [f"{key}={value}" for key in keys for value in values]
    return (*pairs, *(f"?{key}" for key in keys), *values, *fillers)


def check_length(config: RecallConfig, length: int) -> None:
    """Raises ValueError unless a sequence of `length` inputs can hold a query."""
    if length <= config.first_query:
        raise ValueError(
            f"sequence_length: expected more than {config.first_query} tokens, so that a query "
            f"fits behind {config.num_pairs} pairs at distance {config.min_distance}, got {length}."
        )


def num_draws(config: RecallConfig, length: int) -> int:
    """Uniform numbers that one sequence of `length` inputs uses up."""
    return config.num_keys + config.num_pairs + 3 * (length + 1 - config.num_pairs)


def sample(rng: np.random.Generator, config: RecallConfig, rows: int, length: int) -> Sample:
    """Draws `rows` sequences; see `sequences`. Row r does not depend on `rows`."""
    return sequences(rng.random((rows, num_draws(config, length))), config, length)


def sequences(uniforms: Uniforms, config: RecallConfig, length: int) -> Sample:
    """Sequences as a deterministic function of uniform numbers.

    Args:
      uniforms: in [0, 1), independent; shape [rows, num_draws(config, length)].
      config: the generator.
      length: inputs per sequence, T.

    Returns:
      tokens: [rows, T + 1], inputs and targets overlapping by T - 1.
      kind: [rows, T]; KIND_QUERY where the input is a query, so that its target is the answer.

    Raises:
      ValueError: `length` leaves no room for a query.
    """
    check_length(config, length)
    pairs, body = config.num_pairs, length + 1 - config.num_pairs
    widths = np.cumsum([config.num_keys, pairs, body, body])
    order, value_draw, coin, choice, symbol = np.split(uniforms, widths, axis=1)
    keys = np.argsort(order, axis=1, kind="stable")[:, :pairs]
    values = _pick(value_draw, config.num_values)

    # A coin asks for a query, but the token after a query is its answer: in a run of such coins
    # every second one counts.
    index = np.arange(body)
    wants = (coin < config.query_rate) & (index >= config.first_query - pairs)
    run_start = np.maximum.accumulate(np.where(wants, -1, index), axis=1)
    query = wants & ((index - run_start) % 2 == 1)
    answer = np.zeros_like(query)
    answer[:, 1:] = query[:, :-1]
    filler = ~(query | answer)

    asked = _pick(choice, pairs)
    asked[:, 1:] = np.where(answer[:, 1:], asked[:, :-1], asked[:, 1:])
    asked_keys = np.take_along_axis(keys, asked, axis=1)
    answers = np.take_along_axis(values, asked, axis=1)

    # A filler is the last freely drawn one, moved on by the number of fillers since. The body
    # starts with a filler (min_distance >= 2), which is drawn freely.
    drawn = filler & (choice < config.jump_rate)
    drawn[:, 0] = True
    last = np.maximum.accumulate(np.where(drawn, index, 0), axis=1)
    count = np.cumsum(filler, axis=1)
    since = count - np.take_along_axis(count, last, axis=1)
    start = np.take_along_axis(_pick(symbol, config.num_fillers), last, axis=1)
    fillers = _orbits(config.num_fillers, body)[start, since]

    tokens = np.concatenate(
        [
            keys * config.num_values + values,
            np.where(
                query,
                config.query_offset + asked_keys,
                np.where(answer, config.value_offset + answers, config.filler_offset + fillers),
            ),
        ],
        axis=1,
    ).astype(np.int32)
    kind = np.full((len(tokens), length), KIND_OTHER, np.int32)
    kind[:, pairs:] = np.where(query[:, :-1], KIND_QUERY, KIND_OTHER)
    return tokens, kind


def entropy_floor(config: RecallConfig, length: int) -> float:
    """Nats per target of the generator itself, given the whole past: no model can go below.

    With P pairs, n fillers, rho the query rate, and a_t the probability that token t is free to be
    a query (a_t = 1 - rho a_{t-1} from the first position on that allows one), the entropies are

        t < P:         log(num_keys - t) + log(num_values)     the next pair, its key not yet bound
        t = P:         log n                                   the first filler
        no query yet:  h_f = H(next filler | last filler)
        else:          a_t (H(rho) + rho log P + (1 - rho) h_f), and 0 for an answer,

    summed over the targets t = 1 .. T and divided by T.

    Raises:
      ValueError: `length` leaves no room for a query.
    """
    check_length(config, length)
    rho = config.query_rate
    stray = config.jump_rate / config.num_fillers
    follow = 1.0 - config.jump_rate + stray
    filler = -follow * math.log(follow) - (config.num_fillers - 1) * stray * math.log(stray)
    coin = -rho * math.log(rho) - (1.0 - rho) * math.log(1.0 - rho)
    step = coin + rho * math.log(config.num_pairs) + (1.0 - rho) * filler
    pairs = sum(
        math.log(config.num_keys - t) + math.log(config.num_values)
        for t in range(1, config.num_pairs)
    )
    quiet = math.log(config.num_fillers) + (config.first_query - config.num_pairs - 1) * filler
    free = _free(config, length)
    return (pairs + quiet + step * float(free.sum())) / length


def query_fraction(config: RecallConfig, length: int) -> float:
    """Expected share of the T inputs that are queries.

    Times log(num_values), it is what a model that knows all but the answers loses over
    `entropy_floor`, in nats per target.

    Raises:
      ValueError: `length` leaves no room for a query.
    """
    check_length(config, length)
    return config.query_rate * float(_free(config, length)[:-1].sum()) / length


def _free(config: RecallConfig, length: int) -> Float[np.ndarray, "tokens"]:
    """a_t for t from the first position of a query to the last token, t = T."""
    free = np.ones(length + 1 - config.first_query)
    for t in range(1, len(free)):
        free[t] = 1.0 - config.query_rate * free[t - 1]
    return free


def _pick(uniforms: Float[np.ndarray, "rows n"], count: int) -> Int[np.ndarray, "rows n"]:
    return (uniforms * count).astype(np.int64)


def _orbits(num_fillers: int, steps: int) -> Int[np.ndarray, "fillers steps"]:
    """Where c -> 5c + 1 mod n has moved each symbol after 0, 1, ... steps."""
    orbits = np.empty((num_fillers, steps), np.int64)
    orbits[:, 0] = np.arange(num_fillers)
    for step in range(1, steps):
        orbits[:, step] = (5 * orbits[:, step - 1] + 1) % num_fillers
    return orbits
