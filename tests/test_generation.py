"""Caches, prefill, decode and samplers: one truth with the training forward, in every mode."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_attention_jax import RoutingHypers, generation, get_mechanism, register_mechanism
from meta_attention_jax.mechanisms import cache as caches
from meta_attention_jax.mechanisms import registry
from meta_attention_jax.types import AttentionSpec
from tests import making
from tests.close import assert_close

VOCAB, TIME, LAYERS = 13, 18, 2
LENGTHS = np.array([3, 9, 5])
BATCH, PROMPT = len(LENGTHS), int(LENGTHS.max())
FULL, LINEAR, LOCAL = range(3)
ROWS = np.arange(BATCH)
STEPS = TIME - PROMPT
HYPERS = RoutingHypers(
    strength=jnp.float32(2.0),
    preference=jnp.float32(0.3),
    costs=jnp.array([1.0, 0.15, 0.3]),
    threshold=jnp.float32(0.6),
)


def make(mode="hard", **fields):
    """Two layers, scanned unless the case says otherwise: half the program to compile."""
    defaults = dict(
        vocab_size=VOCAB, model_dim=16, num_layers=LAYERS, num_heads=4, num_kv_heads=2, window=4,
        mlp_dim=32, hidden=8, mode=mode, scan_layers=True,
    )
    return making.model(**{**defaults, **fields})


@functools.lru_cache(maxsize=None)
def parameters(model):
    """Random parameters of the shapes that `init` says: every token is routed its own way."""
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), hypers=HYPERS)
    )["params"]
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        centre = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(centre + 0.4 * rng.standard_normal(shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def text(seed=0):
    return np.asarray(jax.random.randint(jax.random.key(seed), (BATCH, TIME), 0, VOCAB))


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Most of the time here is compilation of small programs, which need no optimisation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def prompts():
    return [list(row[:length]) for row, length in zip(text(), LENGTHS)]


def seen(out):
    """Logits and what a generation keeps of the routing."""
    r = out.routing
    return out.logits, dict(route=r.route, hard=r.hard, uncertainty=r.uncertainty)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, route=None):
    return seen(model.apply({"params": params}, tokens, hypers=HYPERS, route=route))


@functools.partial(jax.jit, static_argnums=0)
def step(model, params, cache, token, route=None):
    cache, out = model.apply(
        {"params": params}, cache, token, hypers=HYPERS, route=route, method="decode"
    )
    return cache, *seen(out)


def assert_stepwise_is_forward(model, route=None):
    params, tokens = parameters(model), text()
    whole, whole_routing = forward(model, params, tokens, route)
    chosen = None if route is None else route[:, :, :PROMPT]
    cache, logits, routing = generation.prefill(
        model, params, tokens[:, :PROMPT], LENGTHS, HYPERS, capacity=TIME, route=chosen
    )
    assert_close(logits, whole[ROWS, LENGTHS - 1])
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(
            routing["route"][:, row, :length], whole_routing["route"][:, row, :length]
        )
    for t in range(STEPS):
        at = LENGTHS + t
        forced = None if route is None else route[:, ROWS, at]
        cache, logits, routing = step(model, params, cache, tokens[ROWS, at], forced)
        assert_close(logits, whole[ROWS, at])
        expected = {name: values[:, ROWS, at] for name, values in whole_routing.items()}
        for name in ("route", "hard"):
            np.testing.assert_array_equal(routing[name], expected[name], err_msg=name)
        assert_close(routing["uncertainty"], expected["uncertainty"])
    np.testing.assert_array_equal(cache.length, np.tile(LENGTHS + STEPS, (LAYERS, 1)))


CASES = {
    "soft, unrolled": dict(mode="soft", scan_layers=False),
    "hard": dict(mode="hard"),
    "hard, packed prefill, sinks": dict(mode="hard", dispatch="packed", window=3, sinks=2),
    "one key head, gated": dict(mode="gated", num_kv_heads=1, remat=True),
    "window beyond the text": dict(mode="soft", window=64),
    "softmax, window of one": dict(controller="softmax", window=1, num_kv_heads=None),
    "fixed pattern": dict(controller="fixed", fixed=("local", "full"), scan_layers=False),
}


SELDOM = "hard", "window beyond the text", "fixed pattern", "softmax, window of one", "one key head, gated"


@pytest.mark.parametrize("name", [*(name for name in CASES if name not in SELDOM), *making.slow(*SELDOM)])
def test_prefill_and_steps_are_one_forward_pass_at_own_routes(name):
    assert_stepwise_is_forward(make(**CASES[name]))


@pytest.mark.parametrize("name", ["one key head, gated", *making.slow("fixed pattern")])
def test_prefill_and_steps_are_one_forward_pass_at_forced_routes(name):
    route = jax.random.randint(jax.random.key(5), (LAYERS, BATCH, TIME), 0, 3)
    assert_stepwise_is_forward(make(**CASES[name]), route)


def test_own_routes_in_these_tests_use_every_mechanism():
    routes = forward(make(), parameters(make()), text())[1]["route"]
    assert set(np.unique(routes)) == {0, 1, 2}


@pytest.mark.slow
def test_bfloat16_stays_near_its_forward_pass():
    # Routes are forced: near ties, rounding would choose.
    route = jax.random.randint(jax.random.key(5), (LAYERS, BATCH, TIME), 0, 3)
    model = make(dtype=jnp.bfloat16, scan_layers=False)
    params, tokens = parameters(model), text()
    whole = np.asarray(forward(model, params, tokens, route)[0])
    cache, *_ = generation.prefill(
        model, params, tokens[:, :PROMPT], LENGTHS, HYPERS, capacity=TIME,
        route=route[:, :, :PROMPT],
    )
    assert cache.k.dtype == jnp.uint16 and cache.s.dtype == jnp.float32
    for t in range(STEPS):
        at = LENGTHS + t
        cache, logits, _ = step(model, params, cache, tokens[ROWS, at], route[:, ROWS, at])
        error = np.linalg.norm(logits - whole[ROWS, at]) / np.linalg.norm(whole[ROWS, at])
        assert error < 4 * 2.0**-8  # a few units in the last place of bfloat16


@pytest.mark.smoke
def test_greedy_text_with_cache_is_greedy_text_without():
    model = make()
    params = parameters(model)
    out = generation.generate(model, params, prompts(), steps=STEPS, hypers=HYPERS)
    tokens = np.zeros((BATCH, TIME), np.int32)
    for row, prompt in enumerate(prompts()):
        tokens[row, : len(prompt)] = prompt
    for t in range(STEPS):
        logits = forward(model, params, tokens)[0][ROWS, LENGTHS + t - 1]
        tokens[ROWS, LENGTHS + t] = np.argmax(logits, axis=-1)
    np.testing.assert_array_equal(
        out.tokens, [row[n : n + STEPS] for row, n in zip(tokens, LENGTHS)]
    )
    route = forward(model, params, tokens)[1]["route"]
    for row, n in enumerate(LENGTHS):
        np.testing.assert_array_equal(out.route[:, row], route[:, row, n : n + STEPS])


def test_a_row_generates_the_same_alone_and_in_a_batch():
    model = make("gated")
    keys = jax.random.split(jax.random.key(7), BATCH)
    run = functools.partial(
        generation.generate, model, parameters(model), steps=6, hypers=HYPERS,
        sampler=generation.Sampler(temperature=1.5, top_k=9, top_p=0.95),
    )
    together = run(prompts(), keys=keys)
    row = 2
    alone = run(prompts()[row : row + 1], keys=keys[row : row + 1], capacity=40)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    np.testing.assert_array_equal(alone.route[:, 0], together.route[:, row])
    other = run(prompts(), keys=jax.random.split(jax.random.key(8), BATCH))
    assert np.any(np.asarray(other.tokens) != np.asarray(together.tokens))


def test_a_row_ends_and_the_loop_with_the_last_of_them():
    """Rows are those without ends as far as their own; nothing stands behind, and nothing is computed for it."""
    model, steps, calls = make(), STEPS, []

    def counting(logits, keys):
        jax.debug.callback(lambda: calls.append(0))
        return generation.greedy(logits)

    run = functools.partial(generation.generate, model, parameters(model), steps=steps, hypers=HYPERS)
    whole = jax.device_get(run(prompts()))
    np.testing.assert_array_equal(whole.lengths, [steps] * BATCH)
    first = [{t: list(row).index(t) + 1 for t in set(row.tolist())} for row in whole.tokens]
    # Two ends, so that rows stop apart, all of them early, and not all by the same.
    choices = [(a, b) for a in range(VOCAB) for b in range(a)]
    lengths = {ends: [min(row.get(t, steps) for t in ends) for row in first] for ends in choices}
    ends = min(choices, key=lambda ends: (max(lengths[ends]) == steps, -len(set(lengths[ends])), max(lengths[ends])))
    expected = lengths[ends]
    assert len(set(expected)) > 1 and max(expected) < steps
    keys = jax.random.split(jax.random.key(0), BATCH)
    out = jax.device_get(run(prompts(), ends=ends, sampler=counting, keys=keys))
    jax.effects_barrier()
    assert len(calls) == max(expected)
    np.testing.assert_array_equal(out.lengths, expected)
    drawn = np.arange(steps)[None] < np.array(expected)[:, None]
    np.testing.assert_array_equal(out.tokens, np.where(drawn, whole.tokens, ends[0]))
    for name in ("route", "hard", "uncertainty"):
        found = getattr(out, name)
        assert not found[:, ~drawn].any()
        assert_close(found[:, drawn], getattr(whole, name)[:, drawn])


@pytest.mark.slow
def test_tokens_that_a_tokenizer_does_not_know_are_never_drawn():
    model = make()
    draw = dict(sampler=generation.Sampler(temperature=50.0), keys=jax.random.split(jax.random.key(0), BATCH))
    run = functools.partial(generation.generate, model, parameters(model), prompts(), steps=STEPS, hypers=HYPERS)
    assert np.max(run(**draw).tokens) >= VOCAB // 2, "at this temperature all are drawn"
    for sampling in (draw, {}):
        assert np.max(run(**sampling, known=VOCAB // 2).tokens) < VOCAB // 2
    np.testing.assert_array_equal(run(known=VOCAB).tokens, run().tokens)
    with pytest.raises(ValueError, match=f"^known: expected 1 to {VOCAB} tokens, got 0.$"):
        run(known=0)


@pytest.mark.slow
def test_caches_of_padded_prompts_are_those_of_unpadded_ones():
    model = make()
    params, tokens = parameters(model), text()[:, :PROMPT]
    cache, *_ = generation.prefill(model, params, tokens, LENGTHS, HYPERS, capacity=TIME)
    row, n = 2, LENGTHS[2]
    alone, *_ = generation.prefill(
        model, params, tokens[row : row + 1, :n], LENGTHS[row : row + 1], HYPERS, capacity=TIME
    )
    for name in ("k", "v", "s", "z", "length"):
        ours, theirs = getattr(cache, name)[:, row], getattr(alone, name)[:, 0]
        assert_close(ours, theirs, what=name)


@pytest.mark.slow
def test_a_prompt_of_one_token_starts_anew_as_longer_ones_do():
    """Whatever the cache has held."""
    model = make()
    params, tokens = parameters(model), text()
    apply = jax.jit(functools.partial(model.apply, hypers=HYPERS, method="prefill"))
    fresh = model.init_cache(BATCH, TIME)
    used, _ = apply({"params": params}, fresh, tokens[:, :PROMPT], jnp.asarray(LENGTHS))
    one = jnp.ones(BATCH, jnp.int32)
    expected = apply({"params": params}, fresh, tokens[:, :1], one)
    assert_close(apply({"params": params}, used, tokens[:, :1], one), expected)
    assert (expected[0].length == 1).all()


def test_steps_fill_the_cache_as_prefill_does():
    model = make()
    params, tokens = parameters(model), text()
    fill = functools.partial(generation.prefill, model, params, capacity=TIME)
    cache, *_ = fill(tokens[:, :PROMPT], LENGTHS, HYPERS)
    for t in range(STEPS):
        cache, *_ = step(model, params, cache, tokens[ROWS, LENGTHS + t])
    whole, *_ = fill(tokens, LENGTHS + STEPS, HYPERS)
    assert_close(cache, whole)


@pytest.mark.parametrize("name", ["full", "linear", "local"])
@pytest.mark.parametrize("window, sinks, block", [(5, 0, 8), (64, 0, 8), (1, 3, 1024)])
def test_a_step_is_the_last_row_of_attend(monkeypatch, name, window, sinks, block):
    monkeypatch.setattr(caches, "BLOCK", block)
    batch, time, heads, kv_heads, dim = 3, 20, 4, 2, 8
    q, k, v = (
        jax.random.normal(jax.random.key(i), (batch, time, h, dim))
        for i, h in enumerate((heads, kv_heads, kv_heads))
    )
    lengths = jnp.array([1, 20, 9])
    ids = (jnp.arange(time)[None] < lengths[:, None]).astype(jnp.int32)
    whole = making.attended(name, q, k, v, segment_ids=ids, window=window, sinks=sinks)
    cache = caches.init_cache(
        layers=2, batch=batch, capacity=time, kv_heads=kv_heads, dim=dim
    )
    cache = caches.fill(cache, 1, k, k, v, ids)
    rows = jnp.arange(batch)
    needed = jnp.array([True, True, False])
    for need in (needed, jnp.ones(batch, bool)):
        out = get_mechanism(name).step(
            q[rows, lengths - 1], cache, jnp.int32(1), needed=need,
            spec=AttentionSpec(window=window, sinks=sinks),
        )
        expected = jnp.where(need[:, None, None], whole[rows, lengths - 1], 0.0)
        assert_close(out, expected)


def test_keys_behind_the_length_and_rows_not_needed_are_never_read(monkeypatch):
    """NaN spreads from whatever is read into a product, masked or not."""
    monkeypatch.setattr(caches, "BLOCK", 4)
    shape, window = (1, 3, 1, 16, 2), 3
    lengths = jnp.array([6, 11, 16])
    needed = jnp.array([True, True, False])
    k = jax.random.normal(jax.random.key(0), shape)
    read_full = jnp.arange(16)[None] < (-(-lengths // 4) * 4)[:, None]
    read_local = (jnp.arange(16)[None] < lengths[:, None]) & (
        jnp.arange(16)[None] >= lengths[:, None] - window
    )
    q = jnp.ones((3, 1, 2))
    sunk = read_local | (jnp.arange(16)[None] < 2)
    for name, sinks, read in (("full", 0, read_full), ("local", 0, read_local), ("local", 2, sunk)):
        poisoned = jnp.where((read & needed[:, None])[None, :, None, :, None], k, jnp.nan)
        cache = caches.init_cache(layers=1, batch=3, capacity=16, kv_heads=1, dim=2)
        cache = cache.replace(k=poisoned, v=poisoned, length=lengths[None])
        spec = AttentionSpec(window=window, sinks=sinks)
        out = get_mechanism(name).step(q, cache, 0, needed=needed, spec=spec)
        assert np.all(np.isfinite(out)) and np.all(out[2] == 0.0) and np.all(out[:2] != 0.0)


@pytest.mark.parametrize("scanned", [*making.slow(False), True])
def test_the_model_reads_only_what_the_routes_need(scanned):
    """A row that is routed to linear reads no key or value, one routed to local the last w; here all
    others are NaN, which no weight of 0 could hide."""
    model = make(scan_layers=scanned, window=4)
    params, tokens = parameters(model), text()[:, :PROMPT]
    cache, *_ = generation.prefill(model, params, tokens, LENGTHS, HYPERS, capacity=TIME)
    route = jnp.asarray([[LINEAR, FULL, LOCAL]] * LAYERS)
    place = np.arange(TIME)[None]
    within = (place < LENGTHS[:, None]) & (place > (LENGTHS - 4)[:, None])
    readable = np.stack([np.zeros(TIME, bool), np.ones(TIME, bool), within[2]])
    hidden = lambda x: jnp.where(readable[None, :, None, :, None], x, jnp.nan)  # noqa: E731
    poisoned = cache.replace(k=hidden(cache.k), v=hidden(cache.v))
    token = jnp.asarray(tokens[:, 0])
    expected = step(model, params, cache, token, route)[1]
    np.testing.assert_array_equal(step(model, params, poisoned, token, route)[1], expected)
    others = step(model, params, poisoned, token, jnp.roll(route, 1, axis=1))[1]
    assert np.any(np.isnan(others)), "the NaN can be seen"


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_prefill_and_decode_lower_for_accelerators(platform):
    model = make(dispatch="packed")
    shaped = lambda x: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), x)  # noqa: E731
    params, cache = shaped(parameters(model)), shaped(model.init_cache(BATCH, TIME))
    tokens = jax.ShapeDtypeStruct((BATCH, PROMPT), jnp.int32)
    lengths = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    prefill = generation.prefill.trace(model, params, tokens, lengths, HYPERS, capacity=TIME)
    logits = jax.ShapeDtypeStruct((BATCH, VOCAB), jnp.float32)
    keys = shaped(jax.random.split(jax.random.key(0), BATCH))
    decode_loop = generation.decode_loop.trace(
        model, params, cache, logits, keys, HYPERS, steps=3,
        sampler=generation.Sampler(top_k=5, top_p=0.9),
    )
    for traced in (prefill, decode_loop):
        assert "stablehlo.while" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_the_decode_loop_is_one_program_and_makes_no_copy_of_its_cache():
    for ends, fields in (((), dict(num_layers=1, scan_layers=False)), ((3,), dict(dtype=jnp.bfloat16))):
        model = make(window=8, **fields)
        params = parameters(model)
        cache = model.init_cache(BATCH, 8192)
        keys = jax.random.split(jax.random.key(0), BATCH)
        compiled = generation.decode_loop.lower(
            model, params, cache, jnp.zeros((BATCH, VOCAB), jnp.float32), keys, HYPERS, steps=5, ends=ends
        ).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < cache.k.nbytes / 4


@pytest.mark.slow
def test_the_model_is_traced_once_whatever_the_prompts_and_steps_of_equal_shape():
    traces = 0

    def counting(logits, keys):
        nonlocal traces
        traces += 1
        return generation.greedy(logits)

    model = make()
    run = functools.partial(
        generation.generate, model, parameters(model), hypers=HYPERS, steps=7, sampler=counting
    )
    keys = jax.random.split(jax.random.key(0), 2)
    run([[1, 2, 3], [4]], keys=keys)
    first = traces
    run([[5, 2, 3], [4, 7]], keys=keys)
    assert traces == first <= 2  # lax.scan may trace its body twice to settle types
    run([[5, 2, 3, 4, 5], [4, 7]], keys=keys)
    assert traces == first, "capacities are rounded up: a longer prompt shares the loop"


def softmax(x):
    x = np.exp(np.float64(x) - np.max(x, -1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def kept(logits):
    return np.isfinite(np.asarray(logits))


def test_top_p_keeps_the_smallest_set_that_has_the_mass():
    logits = 2 * jax.random.normal(jax.random.key(0), (20, 11))
    probabilities = softmax(np.asarray(logits))
    for p in (0.05, 0.5, 0.9, 0.999):
        chosen = kept(generation.keep_top_p(logits, p))
        for row, keep in zip(probabilities, chosen):
            assert row[keep].sum() >= p - 1e-6
            assert row[keep].sum() - row[keep].min() < p + 1e-6  # one fewer would not do
            assert keep.all() or row[keep].min() >= row[~keep].max()
    assert kept(generation.keep_top_p(logits, 1.0)).all()


def test_top_k_keeps_the_k_largest_and_one_is_greedy():
    logits = jax.random.normal(jax.random.key(0), (20, 11))
    keys = jax.random.split(jax.random.key(1), 20)
    for k in (1, 4, 11, 50):
        chosen = kept(generation.keep_top_k(logits, k))
        assert np.all(chosen.sum(-1) == min(k, 11))
        rank = np.argsort(np.argsort(-np.asarray(logits), -1), -1)
        np.testing.assert_array_equal(chosen, rank < k)
    greedy = np.argmax(logits, -1)
    np.testing.assert_array_equal(generation.greedy(logits), greedy)
    np.testing.assert_array_equal(generation.Sampler(2.0, top_k=1)(logits, keys), greedy)
    np.testing.assert_array_equal(generation.Sampler(1e-4)(logits, keys), greedy)
    np.testing.assert_array_equal(generation.Sampler(top_p=1e-6)(logits, keys), greedy)


@pytest.mark.parametrize(
    "sampler",
    [
        generation.Sampler(temperature=1e-37),
        generation.Sampler(temperature=1e-30, top_k=2, top_p=0.9),
        generation.Sampler(top_p=1e-46),
        generation.Sampler(top_k=1),
    ],
)
def test_extreme_samplers_are_greedy(sampler):
    """Also with all logits negative, with large ones, and with ties for the largest."""
    logits = jnp.array([[5.0, 6, 7, 1, -3], [-8, -7, -5, -6, -9], [1e30, 0, 9, -1e30, 2]])
    keys = jax.random.split(jax.random.key(1), 3)
    np.testing.assert_array_equal(sampler(logits, keys), [2, 2, 0])
    if sampler.top_k == 1:
        np.testing.assert_array_equal(sampler(jnp.zeros((3, 5)), keys), [0, 0, 0])


def test_samples_follow_the_tempered_and_cut_distribution():
    logits = jnp.array([0.3, -1.0, 1.2, 0.9, -0.2])
    sampler = generation.Sampler(temperature=0.7, top_k=4, top_p=0.9)
    draws = 20_000
    keys = jax.random.split(jax.random.key(2), draws)
    samples = sampler(jnp.broadcast_to(logits, (draws, 5)), keys)
    expected = softmax(np.asarray(logits) / 0.7)
    order = np.argsort(-expected)
    four = expected[order[:4]] / expected[order[:4]].sum()
    keep = order[: int(np.searchsorted(np.cumsum(four), 0.9)) + 1]
    wanted = np.zeros(5)
    wanted[keep] = expected[keep] / expected[keep].sum()
    found = np.bincount(np.asarray(samples), minlength=5) / draws
    np.testing.assert_allclose(found, wanted, atol=4 * 0.5 / np.sqrt(draws))


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(temperature=0.0), "temperature: expected"),
        (dict(temperature=1e-40), "temperature: expected"),
        (dict(temperature=float("nan")), "temperature: expected"),
        (dict(top_k=0), "top_k: expected"),
        (dict(top_p=0.0), "top_p: expected"),
        (dict(top_p=1.1), "top_p: expected"),
    ],
)
def test_bad_samplers_are_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        generation.Sampler(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(prompts=[]), "prompts: expected at least one"),
        (dict(prompts=[[1], []]), "prompt: expected at least one token"),
        (dict(prompts=[[1, VOCAB]]), r"prompt: expected tokens in \[0, 13\), got 13"),
        (dict(prompts=[[-1]]), "prompt: expected tokens in"),
        (dict(prompts=[[0.5]]), "prompt: expected integer tokens"),
        (dict(steps=0), "steps: expected at least 1"),
        (dict(ends=[VOCAB]), r"ends: expected tokens in \[0, 13\), got 13"),
        (dict(ends=[0.5]), "ends: expected an integer, got 0.5"),
        (dict(capacity=6), r"capacity: expected at least prompt \+ steps = 3 \+ 4 tokens, got 6"),
        (dict(mode="sof"), "mode: expected one of"),
        (dict(sampler=generation.Sampler()), "keys: expected one PRNG key per row"),
        (dict(keys=jax.random.split(jax.random.key(0), 2)), "keys: expected 1 PRNG keys"),
    ],
)
def test_bad_input_is_one_sentence(fields, sentence):
    model = make()
    call = {"prompts": [[1, 2, 3]], "steps": 4, "hypers": HYPERS, **fields}
    with pytest.raises(ValueError, match=sentence) as error:
        generation.generate(model, parameters(model), **call)
    assert "\n" not in str(error.value)


def test_names_of_mechanisms_may_be_a_list():
    model = make(mechanisms=["full", "linear", "local"])
    generation.generate(model, parameters(make()), prompts(), steps=STEPS, hypers=HYPERS)


def test_a_mechanism_without_decode_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    register_mechanism("mute", dataclasses.replace(get_mechanism("local"), step=None))
    model = make(mechanisms=("full", "linear", "mute"))
    params = parameters(make())
    with pytest.raises(ValueError, match="expected one with a `step` function .*, got 'mute'"):
        generation.generate(model, params, [[1]], steps=1, hypers=HYPERS)
