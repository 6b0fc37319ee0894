"""What only a GPU can show of decoding: its kernel against the portable form, row by row of a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from meta_attention_jax.mechanisms import cache as caches
from meta_attention_jax.mechanisms import full, local
from meta_attention_jax.types import AttentionSpec
from tests.gpu_checks import EXACT, VALUES, Row, check, errors, highest

CASES = {
    "d 128, grouped heads": ("bfloat16", 4096, 128, 16, 4, dict(window=1024, sinks=4)),
    "d 64, one key head": ("float32", 1500, 64, 8, 1, dict(window=100)),
    "d 256, softcap": ("bfloat16", 2048, 256, 4, 2, dict(window=300, sinks=9, softcap=20.0)),
}
"""name -> (dtype, capacity, d, heads, key heads, changes to the spec)."""


def rows(case: str) -> list[Row]:
    """Both mechanisms that read the cache, some rows not needed, one full, one of a single token."""
    dtype, capacity, dim, heads, kv_heads, changes = CASES[case]
    rng = np.random.default_rng(capacity)
    lengths = [capacity, 1, *rng.integers(2, capacity, size=4).tolist()]
    cache = caches.init_cache(
        layers=2, batch=6, capacity=capacity, kv_heads=kv_heads, dim=dim, dtype=jnp.dtype(dtype)
    )
    k, v = (caches.stored(jnp.asarray(rng.normal(size=cache.k.shape), jnp.float32), cache.k.dtype) for _ in range(2))
    cache = cache.replace(k=k, v=v, length=jnp.asarray([lengths, lengths], jnp.int32))
    q = jnp.asarray(rng.normal(size=(6, heads, dim)), dtype)
    needed = jnp.asarray([True, True, False, True, True, False])
    found = []
    for name, module in (("full", full), ("local", local)):
        def step(kernel, module=module):
            spec = AttentionSpec(kernel=kernel, **changes)
            return jax.jit(lambda q, cache: module.step(q, cache, 1, needed=needed, spec=spec))(q, cache)

        with highest():
            expected, got = step("portable"), step("pallas")
        bounds = (EXACT, 10 * EXACT) if dtype == "float32" else VALUES
        measured, *_ = errors([got] * 4, [np.asarray(expected.astype(jnp.float32), np.float64)] * 4).values()
        found += [
            check(f"decoding, pallas = portable, {case}, {name}, {kind}", value, bound)
            for kind, value, bound in zip(("norm", "worst entry"), measured, bounds)
        ]
    return found
