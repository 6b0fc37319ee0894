"""What no model of `recall` can go below: the entropy of its generator."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from meta_attention_jax.data.recall import RecallConfig, check_length


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
    free, answer = np.zeros(most + 1), np.zeros(most + 1)  # by the number of marks so far
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
    """h_k = E H(mark k | marks before), k = 1 .. most, by the reader who knows all but the favourite.

    With counts n_j so far, P(favourite = j) is proportional to r^n_j, r = 1 + M b / (1 - b), and P(next = j) = b
    P(favourite = j) + (1 - b) / M.
    """
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
