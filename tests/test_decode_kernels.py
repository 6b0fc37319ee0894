"""One new token a row by the kernels of GPUs and TPUs, interpreted: the portable form, whatever lengths and routes."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_attention_jax.mechanisms import cache as caches
from meta_attention_jax.mechanisms import decode, decode_gpu, decode_tpu, full, local
from meta_attention_jax.targets import compiling_for
from meta_attention_jax.types import AttentionSpec
from tests import making
from tests.close import assert_close
from tests.test_kernels import H100, interpreted, lowered
from tests.test_kernels_tpu import TPU, V5E

CASES = {
    "two stretches, grouped heads": dict(capacity=1024, heads=6, kv_heads=2, dim=32, window=100, sinks=3),
    "odd capacity, softcap": dict(capacity=300, heads=2, kv_heads=2, dim=16, window=37, sinks=70, softcap=3.0),
    "many tiles": dict(capacity=1000, heads=2, kv_heads=1, dim=128, window=100, sinks=3, dtype="bfloat16", most=128),
    "bfloat16, many to a key": dict(capacity=2048, heads=24, kv_heads=1, dim=64, window=700, dtype="bfloat16"),
}


def held(capacity, kv_heads, dim, dtype, lengths, seed=0):
    """A cache of two layers whose rows have these lengths."""
    rng = np.random.default_rng(seed)
    empty = caches.init_cache(layers=2, batch=len(lengths), capacity=capacity, kv_heads=kv_heads, dim=dim, dtype=dtype)
    k, v = (caches.stored(jnp.asarray(rng.normal(size=empty.k.shape), jnp.float32), empty.k.dtype) for _ in range(2))
    return empty.replace(k=k, v=v, length=jnp.asarray([lengths, lengths], jnp.int32))


KERNELS = {"gpu": decode_gpu, "tpu": decode_tpu}


@interpreted
@pytest.mark.parametrize("platform", list(KERNELS))
@pytest.mark.parametrize("name", ["two stretches, grouped heads", "many tiles", *making.slow(*(
    name for name in CASES if name not in ("two stretches, grouped heads", "many tiles")
))])
def test_is_the_portable_step(name, platform, monkeypatch):
    case = {"dtype": jnp.float32, "sinks": 0, "softcap": None} | CASES[name]
    spec = AttentionSpec(window=case["window"], sinks=case["sinks"], softcap=case["softcap"])
    monkeypatch.setattr(decode_tpu, "MOST_KEYS", case.get("most", decode_tpu.MOST_KEYS))
    interpreted = types.SimpleNamespace(attend=functools.partial(KERNELS[platform].attend, interpret=True))
    steps = {
        (form, module): jax.jit(lambda q, cache, needed, module=module: module.step(
            q, cache, 1, needed=needed, spec=spec
        )) for form in ("portable", "kernel") for module in (full, local)
    }
    for seed in range(20):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, case["capacity"], size=5, endpoint=True).tolist()
        lengths[:2] = [case["capacity"], 1] if seed % 2 else [case["window"], case["window"] + 1]
        cache = held(case["capacity"], case["kv_heads"], case["dim"], jnp.dtype(case["dtype"]), lengths, seed)
        q = jnp.asarray(rng.normal(size=(5, case["heads"], case["dim"])), case["dtype"])
        needed = jnp.asarray(rng.random(5) < (0.7 if seed else 0.0))
        for module in (full, local):
            found = []
            for form in ("portable", "kernel"):
                kernel = interpreted if form == "kernel" else None
                monkeypatch.setattr(decode, "kernel_for", lambda *_: kernel)  # noqa: B023
                with jax.default_matmul_precision("highest"):
                    found.append(steps[form, module](q, cache, needed).astype(jnp.float32))
            tolerance = 2e-2 if case["dtype"] == "bfloat16" else 1e-5
            assert_close(found[1], found[0], tolerance, f"{module.__name__} {seed}: ")
            assert not np.asarray(found[1])[~np.asarray(needed)].any()


@pytest.mark.parametrize("dtype", ["bfloat16", *making.slow("float32")])
def test_lowers_to_triton_and_is_asked_for(dtype):
    cache = held(4096, 2, 64, jnp.dtype(dtype), [9, 4096])
    q = jnp.zeros((2, 8, 64), dtype)

    def step(q, cache, kernel):
        spec = AttentionSpec(window=128, sinks=4, kernel=kernel)
        needed = jnp.ones(2, bool)
        return sum(module.step(q, cache, 0, needed=needed, spec=spec) for module in (full, local))

    with compiling_for(*H100):
        for kernel, count in (("pallas", 2), ("auto", 0)):
            text = lowered(lambda q, cache: step(q, cache, kernel), q, cache)  # noqa: B023
            assert text.count("@__gpu$xla.gpu.triton(") == count
        small = held(32, 2, 64, jnp.dtype(dtype), [9, 32])
        assert "triton" not in lowered(lambda q, cache: step(q, cache, "pallas"), q, small)
    with pytest.raises(ValueError, match="^kernel: expected for 'pallas' a TPU, or an NVIDIA GPU"):
        step(q, cache, "pallas")


@pytest.mark.parametrize("dtype", ["bfloat16", *making.slow("float32")])
def test_lowers_to_mosaic_and_is_asked_for(dtype):
    cache = held(4096, 2, 128, jnp.dtype(dtype), [9, 4096])
    q = jnp.zeros((2, 8, 128), dtype)

    def text_of(cache, kernel):
        def step(q, cache):
            spec = AttentionSpec(window=128, sinks=4, kernel=kernel)
            return sum(module.step(q, cache, 0, needed=jnp.ones(2, bool), spec=spec) for module in (full, local))

        with compiling_for(*TPU), jax.sharding.use_abstract_mesh(V5E):
            return jax.jit(step).trace(q, cache).lower(lowering_platforms=("tpu",)).as_text()

    assert text_of(cache, "pallas").count("@tpu_custom_call(") == 2
    assert "tpu_custom_call" not in text_of(cache, "auto")
    assert "tpu_custom_call" not in text_of(held(32, 2, 128, jnp.dtype(dtype), [9, 32]), "pallas")
