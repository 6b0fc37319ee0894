"""Naive references in float64 NumPy: values and gradients, written from the equations.

Everything is computed on the full square of pairs with an explicit table of who may attend to whom.
Nothing is shared with the package.
"""

from __future__ import annotations

import numpy as np
from scipy import special


def allowed_pairs(
    segment_ids: np.ndarray, *, causal: bool, window: int | None, sinks: int = 0
) -> np.ndarray:
    """[B, T, T] table: may t attend to s?"""
    time = segment_ids.shape[1]
    t, s = np.arange(time)[:, None], np.arange(time)[None, :]
    of_t, of_s = segment_ids[:, :, None], segment_ids[:, None, :]
    near = window is None or abs(t - s) < window
    # A sink has fewer than `sinks` tokens of its segment before it.
    before = [[np.sum(row[:s] == row[s]) for s in range(time)] for row in segment_ids]
    sink = (np.asarray(before) < sinks)[:, None, :]
    return (s <= t if causal else True) & (of_t == of_s) & (of_t != 0) & (near | sink)


def softmax_attention(q, k, v, cotangent, segment_ids, *, causal=True, window=None, sinks=0, softcap=np.inf):
    """softmax(z) v over the allowed pairs, z = q . k / sqrt(d), or c tanh(z / c) with a softcap c.

    Returns:
      (out, dq, dk, dv), the gradients those of sum(out * cotangent); [B, T, heads, d] each.
    """
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    allowed = allowed_pairs(segment_ids, causal=causal, window=window, sinks=sinks)
    group, scale = q.shape[2] // k.shape[2], 1 / np.sqrt(q.shape[3])
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            key, value, g = k[b, :, h // group], v[b, :, h // group], cotangent[b, :, h]
            plain = q[b, :, h] @ key.T * scale
            bent = np.tanh(plain / softcap) if np.isfinite(softcap) else np.zeros_like(plain)
            logits = np.where(allowed[b], softcap * bent if np.isfinite(softcap) else plain, -np.inf)
            top = np.where(allowed[b].any(1), logits.max(1), 0.0)
            weights = np.exp(logits - top[:, None])
            weights /= np.maximum(weights.sum(1, keepdims=True), 1e-300)
            out[b, :, h] = weights @ value
            d_weights = g @ value.T
            d_logits = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True)) * (1 - bent**2)
            dq[b, :, h] = d_logits @ key * scale
            dk[b, :, h // group] += d_logits.T @ q[b, :, h] * scale
            dv[b, :, h // group] += weights.T @ g
    return out, dq, dk, dv


def linear_attention(q, k, v, cotangent, segment_ids, *, causal=True, epsilon=1e-6):
    """sum_s a_ts v_s / (sum_s a_ts + epsilon), a_ts = phi(q_t) . phi(k_s), phi(x) = ELU(x) + 1.

    Returns:
      (out, dq, dk, dv) as `softmax_attention`.
    """
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    allowed = allowed_pairs(segment_ids, causal=causal, window=None)
    group = q.shape[2] // k.shape[2]

    def phi(x):
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

    def slope(x):
        return np.where(x > 0, 1.0, np.exp(np.minimum(x, 0)))

    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            query, key = q[b, :, h], k[b, :, h // group]
            value, g = v[b, :, h // group], cotangent[b, :, h]
            scores = np.where(allowed[b], phi(query) @ phi(key).T, 0.0)
            total = scores.sum(1, keepdims=True) + epsilon
            out[b, :, h] = scores @ value / total
            d_scores = (g @ value.T - (g * out[b, :, h]).sum(1, keepdims=True)) / total
            d_scores = np.where(allowed[b], d_scores, 0.0)
            dq[b, :, h] = d_scores @ phi(key) * slope(query)
            dk[b, :, h // group] += d_scores.T @ phi(query) * slope(key)
            dv[b, :, h // group] += (scores / total).T @ g
    return out, dq, dk, dv


def rotate(x, positions, base=10000.0):
    """Rotary positions as complex multiplication: (x_i + i x_{i + d/2}) exp(i p base^(-2i/d))."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    angle = np.asarray(positions)[:, :, None, None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def paper_controller(x, mlp, *, costs, beta0, epsilon):
    """(alpha, E pi, KL, u) of the authors' controller for x `[batch time model]`, segments from 0 on.

        alpha_t = beta0 (1 - c) + epsilon + softplus(W_2 gelu(W_1 [x; |x| / sqrt(D); position]))

    with our position feature, log(1 + t) / 10, in the place of theirs, which looks ahead.
    """
    batch, time, model = x.shape
    position = np.broadcast_to(np.log1p(np.arange(time))[None, :, None] / 10.0, (batch, time, 1))
    h = np.concatenate([x, np.linalg.norm(x, axis=-1, keepdims=True) / np.sqrt(model), position], -1)
    w = {name: np.asarray(value, np.float64) for name, value in flatten(mlp).items()}
    z = h @ w["hidden/kernel"] + w["hidden/bias"]
    z = z * 0.5 * (1.0 + special.erf(z / np.sqrt(2.0)))
    f = z @ w["output/kernel"] + w["output/bias"]
    prior = beta0 * (1.0 - np.asarray(costs)) + epsilon
    alpha = prior + np.logaddexp(0.0, f)
    total = alpha.sum(-1)
    lgamma, psi = special.gammaln, special.psi
    kl = (
        lgamma(total) - lgamma(alpha).sum(-1) - lgamma(prior.sum()) + lgamma(prior).sum()
        + ((alpha - prior) * (psi(alpha) - psi(total)[..., None])).sum(-1)
    )
    num = alpha.shape[-1]
    log_beta = lgamma(alpha).sum(-1) - lgamma(total)
    entropy = log_beta + (total - num) * psi(total) - ((alpha - 1.0) * psi(alpha)).sum(-1)
    return alpha, alpha / total[..., None], kl, np.exp(entropy + lgamma(num))


def flatten(tree, prefix=""):
    """Nested dicts as `a/b`."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return flat
