"""Executed FLOPs and bytes against enumerated tiles; measured costs, timed once and then frozen."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from meta_attention_jax import cost
from meta_attention_jax.kernels import portable
from meta_attention_jax.mechanisms import full, linear, local, registry
from meta_attention_jax.mechanisms.mechanism import Reach
from meta_attention_jax.objective import summarise
from meta_attention_jax.routing.accounting import count_attention
from meta_attention_jax.routing.gate import GateSchedule
from meta_attention_jax.runs import load_run
from meta_attention_jax.training import build
from meta_attention_jax.training import costs as frozen
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.evaluation import accounted_eval_step
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.step import Hypers, Schedule, StepSpec, init_state, make_optimizer, train_step
from meta_attention_jax.types import AttentionSpec, Batch, RoutingHypers
from tests import making, oracles

NAMES = ("full", "linear", "local")
FULL, LINEAR, LOCAL = range(3)
BATCH, TIME, HEADS, KV_HEADS, DIM, WINDOW = 3, 200, 4, 2, 8, 20
SHAPE = dict(
    vocab_size=1, num_layers=1, model_dim=HEADS * DIM, mechanisms=NAMES, num_heads=HEADS,
    num_kv_heads=KV_HEADS, window=WINDOW,
)
SPEC = AttentionSpec(window=WINDOW)


def count(route, segment_ids=None, **fields):
    return count_attention(jnp.asarray(route), making.config(**SHAPE | fields), segment_ids=segment_ids)


counted = jax.jit(count)
bidirectional = jax.jit(functools.partial(count, causal=False))
SINKS = 5
with_sinks = jax.jit(functools.partial(count, sinks=SINKS))


def abstract(time=TIME, heads=HEADS, batch=BATCH):
    return jax.ShapeDtypeStruct((batch, time, heads, DIM), jnp.float32)


def random_segments(rng):
    """Contiguous segments of random lengths; padding before, after, or nowhere."""
    rows = np.zeros((BATCH, TIME), np.int32)
    for row in rows:
        row[:] = np.sort(rng.integers(1, 2 + rng.integers(4), TIME))
        row[: rng.choice([0, 37])] = 0
        row[TIME - rng.choice([0, 70]) :] = 0
    return rows


def random_route(rng):
    return rng.choice(3, (BATCH, TIME), p=rng.dirichlet([0.5] * 3)).astype(np.int32)


def enumerate_tiles(chosen, segments, *, causal, window, block, tile, sinks=0):
    """(blocks, tiles, rows), one query and one key at a time: a block of packed queries meets all
    tiles between the first and the last that hold a key of one of its queries' windows, and so for sinks."""
    allowed = oracles.allowed_pairs(segments, causal=causal, window=window)
    first = oracles.allowed_pairs(segments, causal=causal, window=0, sinks=sinks)
    blocks = tiles = rows = 0
    for b in range(len(chosen)):
        queries = [t for t in range(TIME) if chosen[b, t] and segments[b, t] != 0]
        rows += len(queries)
        for start in range(0, len(queries), block):
            met = set()
            for table in (allowed, first):
                seen = [s // tile for t in queries[start : start + block]
                        for s in range(TIME) if table[b, t, s]]
                met |= set(range(min(seen), max(seen) + 1)) if seen else set()
            blocks += 1
            tiles += len(met)
    return blocks, tiles, rows


def enumerated(route, segments, causal, sinks=0):
    """(FLOPs, bytes) of packed dispatch, totals."""
    flops = traffic = 0
    for index, window, first in ((FULL, None, 0), (LOCAL, WINDOW, sinks)):
        block, tile = portable.sizes_for(TIME, Reach(window))
        blocks, tiles, rows = enumerate_tiles(
            route == index, segments, causal=causal, window=window, block=block, tile=tile, sinks=first
        )
        flops += 4 * DIM * HEADS * tiles * block * tile
        traffic += 4 * DIM * (tiles * tile * 2 * KV_HEADS + (blocks * block + rows) * HEADS)
    if (route == LINEAR).any():
        whole = linear.count_work(abstract(), abstract(heads=KV_HEADS), AttentionSpec(causal=causal))
        flops, traffic = flops + whole.flops, traffic + whole.bytes
    return flops, traffic


@pytest.mark.smoke
@pytest.mark.parametrize("causal, sinks", [(True, 0), (False, 0), (True, SINKS)])
def test_packed_counts_are_those_of_enumerated_tiles(causal, sinks):
    counts = with_sinks if sinks else counted if causal else bidirectional
    for seed in range(5):
        rng = np.random.default_rng(seed)
        route, segments = random_route(rng), random_segments(rng)
        got = counts(route, segment_ids=segments)
        flops, traffic = enumerated(route, segments, causal, sinks)
        assert float(got.flops.executed_packed) == pytest.approx(flops, rel=1e-5)
        assert float(got.bytes.executed_packed) == pytest.approx(traffic, rel=1e-5)
        assert float(got.tokens) == (segments != 0).sum()


def products(jaxpr, times=1):
    """2 per multiply-add of every dot_general; the body of a scan as often as it runs."""
    total = 0
    for eqn in jaxpr.eqns:
        assert eqn.primitive.name != "while"
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = np.prod([eqn.invars[0].aval.shape[a] for a in contracted], dtype=np.int64)
            total += times * 2 * inner * np.prod(eqn.outvars[0].aval.shape, dtype=np.int64)
        repeat = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            total += products(inner, repeat)
    return total


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("time, heads", [(200, 4), (64, 2), (10, 2), (1000, 6)])
def test_linear_work_is_that_of_the_traced_program(time, heads, causal):
    q, k = abstract(time, heads), abstract(time, 2)
    spec = AttentionSpec(causal=causal)
    traced = jax.make_jaxpr(functools.partial(linear.attend, spec=spec))(q, k, k)
    assert linear.count_work(q, k, spec).flops == products(traced.jaxpr)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("time", [1, 60, 300, 1000])
def test_dense_tiles_are_those_of_a_walk_over_blocks(time, causal):
    """Edge e = ceil(T / ceil(T / block)); a tile is visited unless all its pairs are too far."""
    q, k = abstract(time), abstract(time, KV_HEADS)
    spec = AttentionSpec(causal=causal, window=WINDOW)
    spans = [(local.BLOCK, WINDOW, local.count_work(q, k, spec))]
    if time >= full.BLOCKWISE_TIME:
        spans.append((256, time, full.count_work(q, k, spec)))
    sinks = min(SINKS, time)
    sunk = local.count_work(q, k, dataclasses.replace(spec, sinks=SINKS))
    pairs = BATCH * time * sinks
    assert sunk.flops - spans[0][2].flops == 4 * DIM * HEADS * pairs
    assert sunk.bytes - spans[0][2].bytes == 4 * DIM * (2 * KV_HEADS * pairs + HEADS * BATCH * time)
    for block, window, got in spans:
        count = -(-time // block)
        edge = -(-time // count)
        tiles = 0
        for i in range(count):
            for j in range(count):
                near = i == j or (abs(i - j) - 1) * edge + 1 < window
                tiles += near and (j <= i or not causal)
        assert got.flops == 4 * DIM * HEADS * BATCH * tiles * edge * edge
        assert got.bytes == 4 * DIM * BATCH * (2 * KV_HEADS * tiles + 2 * HEADS * count) * edge


@pytest.mark.parametrize("shape", [(0, 16), (2, 0)])
def test_nothing_costs_nothing(shape):
    found = count(jnp.zeros(shape, jnp.int32))
    assert all(float(leaf) == 0.0 for leaf in jax.tree.leaves(found))


def test_a_square_is_all_pairs():
    q, k = abstract(60), abstract(60, KV_HEADS)
    assert full.count_work(q, k, SPEC).flops == 4 * DIM * HEADS * BATCH * 60 * 60
    assert full.count_work(q, k, SPEC).bytes == 4 * DIM * BATCH * 60 * 2 * (HEADS + KV_HEADS)


@pytest.mark.smoke
def test_what_nobody_asks_for_costs_nothing():
    ones = np.ones((BATCH, TIME), np.int32)
    q, k = abstract(), abstract(heads=KV_HEADS)
    for route in (LINEAR, LOCAL, FULL):
        got = counted(ones * route)
        own = registry.get_mechanism(NAMES[route]).flops(TIME, DIM, SPEC)
        assert float(got.flops.projected) == pytest.approx(BATCH * HEADS * own)
        whole = [m.count_work(q, k, SPEC) for m in (full, linear, local)]
        for kind, side in enumerate((got.flops, got.bytes)):
            assert float(side.full_only) == pytest.approx(whole[FULL][kind])
            assert float(side.executed_dense) == pytest.approx(sum(w[kind] for w in whole))
        if route == LINEAR:
            assert tuple(whole[LINEAR]) == (got.flops.executed_packed, got.bytes.executed_packed)
    padded = counted(ones * FULL, segment_ids=0 * ones)
    assert padded.flops.executed_packed == padded.bytes.executed_packed == 0.0
    one = ones * LINEAR
    one[1, 150] = FULL
    block, tile = portable.sizes_for(TIME, Reach())
    tiles = -(-151 // tile)
    more = counted(one).flops.executed_packed - counted(ones * LINEAR).flops.executed_packed
    assert float(more) == 4 * DIM * HEADS * block * tile * tiles


@pytest.mark.parametrize("time", [64, 1000])
def test_all_full_is_between_the_causal_floor_and_a_tile_and_a_block_more(time):
    got = counted(jnp.zeros((2, time), jnp.int32)).per_token().flops
    unit = 4 * DIM * HEADS
    floor = unit * (time + 1) / 2
    block, tile = portable.sizes_for(time, Reach())
    rim, filled = block + tile, -(-time // block) * block
    assert floor * (1 - 1e-6) <= got.executed_packed <= (floor + unit * rim) * filled / time
    assert float(got.projected) == pytest.approx(floor)


def test_work_grows_with_the_tokens_that_ask_for_it():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        segments, route = random_segments(rng), np.full((BATCH, TIME), LINEAR, np.int32)
        before = counted(route, segment_ids=segments)
        # In order of time: an early token more would shift the blocks behind it, and may so save a
        # tile. Some linear tokens stay.
        asking = rng.random((BATCH, TIME)) < 0.7
        for end in (20, 64, 65, 100, 150, 190):
            route = np.where(asking & (np.arange(TIME) < end), FULL, LINEAR).astype(np.int32)
            after = counted(route, segment_ids=segments)
            assert after.flops.executed_packed >= before.flops.executed_packed
            assert after.bytes.executed_packed >= before.bytes.executed_packed
            assert after.flops.executed_dense == before.flops.executed_dense
            before = after


def test_a_mechanism_without_a_packed_form_runs_on_all_tokens_or_not_at_all(monkeypatch):
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    flops = lambda time, dim, spec: 6.0 * time * dim  # noqa: E731
    registry.register_mechanism("mine", registry.Mechanism(full.attend, flops))
    counts = jax.jit(functools.partial(count, mechanisms=("local", "mine")))
    route = np.zeros((BATCH, TIME), np.int32)
    without = counts(route)
    one = route.copy()
    one[0, -1] = 1
    used = counts(one)
    whole = 6 * DIM * HEADS * BATCH * TIME
    # The last token but one reaches as far back and into the same tile: no packed work less.
    more = used.flops.executed_packed - without.flops.executed_packed
    assert float(more) == pytest.approx(whole, rel=1e-4)
    assert without.flops.executed_dense == used.flops.executed_dense > whole
    assert without.flops.full_only > 0, "the yardstick, although no token may use it"


def test_a_fixed_layer_pays_for_its_own_mechanism_only():
    route = jnp.full((BATCH, TIME), LOCAL)
    got = jax.jit(functools.partial(count, controller="fixed", fixed="local"))(route).flops
    own = local.count_work(abstract(), abstract(heads=KV_HEADS), SPEC).flops
    assert got.executed_packed == got.executed_dense == own


@pytest.mark.slow
def test_layers_that_are_windows_by_nature_stand_in_no_share_and_cost_what_they_do():
    """An evaluation with its accounting, what it reports, and the shapes of a training step."""
    own = 5
    model = making.model(**SHAPE | dict(vocab_size=11, num_layers=3, windows=(None, own, None), hidden=4), mode="hard")
    rng, hypers = np.random.default_rng(0), RoutingHypers(  # At this price, every token takes local attention.
        strength=np.float32(2), preference=np.float32(0.1), costs=np.float32([1, 0.3, 0.15]), threshold=np.float32(1),
        price=np.float32(100),
    )
    tokens, segments = rng.integers(0, 11, (BATCH, TIME)).astype(np.int32), np.ones((BATCH, TIME), np.int32)
    segments[0, 150:] = 0
    batch = Batch(
        tokens=tokens, targets=tokens, segment_ids=segments, positions=0 * tokens + np.arange(TIME, dtype=np.int32),
        loss_mask=segments != 0, kind=0 * tokens, num_bytes=0 * tokens, row=np.arange(BATCH, dtype=np.int32),
    )
    schedule = Schedule(10, 1, 0.1, 1, GateSchedule(kind="linear", start=2, end=8))
    step = StepSpec(model.clone(mode="soft"), make_optimizer("sgd", weight_decay=0.0, clip=1.0), schedule)
    whole = Hypers(learning_rate=np.float32(0.1), beta=np.float32(0.1), routing=hypers)
    state = jax.eval_shape(lambda: init_state(step, jax.random.key(0), batch, whole))
    params = jax.tree.map(lambda x: np.float32(0.3 * rng.normal(size=x.shape)), state.params)
    sums, got = jax.device_get(jax.jit(functools.partial(accounted_eval_step, model, 1))(params, batch, hypers))
    layer = counted(np.full((BATCH, TIME), LOCAL, np.int32), segment_ids=segments)
    assert got.tokens == layer.tokens == (segments != 0).sum()
    spec = AttentionSpec(window=own)
    work = local.count_work(abstract(), abstract(heads=KV_HEADS), spec)
    projected = HEADS * local.flops(TIME, DIM, spec) / TIME * got.tokens, work.bytes / (BATCH * TIME) * got.tokens
    for kind, name in enumerate(("flops", "bytes")):
        for side in ("projected", "executed_packed", "executed_dense", "full_only"):
            window = projected[kind] if side == "projected" else work[kind]
            expected = 2 * float(getattr(getattr(layer, name), side)) + window
            assert getattr(getattr(got, name), side) == pytest.approx(expected, rel=1e-5)
    metrics = summarise(sums, mechanisms=NAMES, costs=hypers.costs)
    assert metrics["layers"]["fractions"] == [[0, 0, 1]] * 2 and metrics["cost"] == pytest.approx(0.15)

    logged = jax.eval_shape(functools.partial(train_step, step), state, batch, whole)[1]
    assert logged["sums"].mean.shape == (2, 3) and logged["finite"]["routing"].shape == (2,)


@pytest.mark.parametrize(
    "route, changes, sentence",
    [
        ((TIME,), {}, "^route: expected shape"),
        ((2, TIME), {"segment_ids": jnp.ones((2, 9), jnp.int32)}, "^segment_ids: expected shape"),
        ((2, TIME), {"window": None}, "^window: expected"),
        ((2, TIME), {"mechanisms": ("full", "lokal")}, "did you mean 'local'"),
    ],
)
def test_arguments_that_do_not_fit_are_one_sentence(route, changes, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        count(jnp.zeros(route, jnp.int32), **changes)
    assert "\n" not in str(error.value)


# Measured costs.


def config(**changes):
    values = smoke.get_config()
    values.update_from_flattened_dict(
        {"prior.costs": "measured", "parallel.devices": 1, "model.num_layers": 1,
         "train.steps": 4, "train.log_every": 2, "train.eval_every": 4, "train.checkpoint_every": 2,
         "train.eval_batches": 1} | changes
    )
    return values


@pytest.fixture
def timer(monkeypatch):
    """Seconds by name instead of a clock, and how often they were asked for."""
    calls = []

    def taken(functions, rounds):
        calls.append(tuple(functions))
        assert all(jax.eval_shape(f).shape == (8, 32, 2, 16) for f in functions.values())
        return {"full": 3e-3, "linear": 1e-3, "local": 0.7e-3}

    monkeypatch.setattr(cost, "time_in_turns", taken)
    return calls


@pytest.mark.smoke
def test_measured_costs_are_timed_once_and_frozen(timer, tmp_path):
    run = tmp_path / "run"
    job = prepare(config(), run)
    written = (run / "costs.json").read_bytes()
    expected = np.array([1.0, 1 / 3, 0.7 / 3]).astype(np.float32)
    np.testing.assert_array_equal(job.hypers.routing.costs, expected)
    assert timer == [NAMES]
    stored = json.loads(written)
    assert stored["seconds"]["linear"] == 1e-3 and stored["setting"]["time"] == 32
    assert stored["device"] and set(stored["versions"]) == {"python", "jax", "jaxlib"}
    checkpoints = Checkpoints(run / "checkpoints")
    batch = job.dataset.train_batch(0)
    state = jax.jit(lambda: init_state(job.spec, jax.random.key(0), batch, job.hypers))()
    checkpoints.save(2, {"params": state.params}, config={}, nll=1.0)
    checkpoints.close()

    def refuse(*_):
        raise AssertionError("measured twice")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "time_in_turns", refuse)
        again = prepare(config(), run)
        opened, shorter = load_run(run), load_run(run, sequence_length=16)
    for other in (again, opened, shorter):
        np.testing.assert_array_equal(other.hypers.routing.costs, expected)
    assert (run / "costs.json").read_bytes() == written and not list(run.glob("*.tmp"))

    (run / "costs.json").unlink()
    for attempt in (lambda: prepare(config(), run), lambda: load_run(run)):
        with pytest.raises(ValueError, match="^costs.json: expected .* costs in .* got none"):
            attempt()
    assert len(timer) == 1


def test_costs_from_before_a_field_of_their_setting_are_those_of_the_run(timer, tmp_path):
    setting = build.build_cost_setting(config())
    before = frozen.freeze_costs(tmp_path, setting, batch=8)
    stored = json.loads((tmp_path / "costs.json").read_text())
    known = stored["setting"]
    assert (known.pop("segments"), known.pop("sinks"), known.pop("kernel")) == ("padded", 0, "auto")
    (tmp_path / "costs.json").write_text(json.dumps(stored))
    np.testing.assert_array_equal(frozen.read_costs(tmp_path, setting), before)
    for field, value, message in (
        ("sinks", 2, "costs for sinks 2, .* got 0"), ("kernel", "portable", "costs for kernel 'portable', .* got 'auto'"),
    ):
        other = build.build_cost_setting(config(**{f"model.{field}": value}))
        with pytest.raises(ValueError, match=f"^costs.json: expected {message}.$"):
            frozen.read_costs(tmp_path, other)


def test_a_run_that_was_cut_off_before_its_costs_measures_them_later(timer, tmp_path):
    prepare(config(), tmp_path / "run")
    (tmp_path / "run" / "costs.json").unlink()
    prepare(config(), tmp_path / "run")
    assert len(timer) == 2 and (tmp_path / "run" / "costs.json").exists()


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda s: None, "got something else"),
        (lambda s: {}, "got something else"),
        (lambda s: s | {"costs": {"full": 0.5, "linear": 1.0, "local": 0.1}}, "got something else"),
        (lambda s: s | {"seconds": s["seconds"] | {"full": -1.0}}, "got something else"),
        (lambda s: s | {"seconds": s["seconds"] | {"full": "x"}}, "got something else"),
        (lambda s: s | {"setting": s["setting"] | {"time": 64}}, "time 32, .* got 64"),
        (lambda s: s | {"setting": s["setting"] | {"window": 9}}, "window 4, .* got 9"),
        (lambda s: s | {"setting": s["setting"] | {"num_heads": 4}}, "num_heads 2, .* got 4"),
        (lambda s: s | {"setting": s["setting"] | {"mechanisms": ["local", "linear", "full"]}},
         "mechanisms"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_sentence_and_stays(timer, tmp_path, damage, sentence):
    setting = build.build_cost_setting(config())
    frozen.freeze_costs(tmp_path, setting, batch=8)
    path = tmp_path / "costs.json"
    stored = damage(json.loads(path.read_text()))
    path.write_text("{not json" if stored is None else json.dumps(stored))
    before = path.read_bytes()
    for call in (functools.partial(frozen.freeze_costs, batch=8), frozen.read_costs):
        with pytest.raises(ValueError, match="^costs.json: expected .*" + sentence) as error:
            call(tmp_path, setting)
        assert "\n" not in str(error.value)
    assert path.read_bytes() == before and len(timer) == 1


def test_measured_costs_need_a_run_directory_and_a_config_that_holds(timer, tmp_path):
    for call in (build.build_costs, build.build_hypers):
        with pytest.raises(ValueError, match="^prior.costs: expected .* without a run directory"):
            call(config())
    with pytest.raises(ValueError, match="^costs: expected .* without a run directory"):
        cost.resolve_costs("measured", NAMES, time=8, dim=8, spec=SPEC)
    for change in ({"prior.strength": 0.0}, {"model.window": 0}, {"data.batch_size": 0}):
        with pytest.raises(ValueError):
            prepare(config(**change), tmp_path / "run")
    assert not (tmp_path / "run").exists() and timer == []


def test_a_failure_of_the_first_process_reaches_the_others(monkeypatch, tmp_path):
    """Process 1 of two: nothing is timed or written; it gets the numbers of process 0."""
    monkeypatch.setattr(frozen.jax, "process_count", lambda: 2)
    monkeypatch.setattr(frozen.jax, "process_index", lambda: 1)
    monkeypatch.setattr(cost, "time_in_turns", lambda *_: pytest.fail("timed"))
    setting = build.build_cost_setting(config())
    theirs = np.array([1.0, 0.5, 0.25], np.float32)
    send = frozen.multihost_utils
    monkeypatch.setattr(send, "broadcast_one_to_all", lambda mine: theirs)
    np.testing.assert_array_equal(frozen.freeze_costs(tmp_path, setting, batch=8), theirs)
    monkeypatch.setattr(send, "broadcast_one_to_all", lambda mine: mine)
    with pytest.raises(ValueError, match="^costs.json: expected the costs of process 0"):
        frozen.freeze_costs(tmp_path, setting, batch=8)
    assert not list(tmp_path.iterdir())


def test_the_clock_gives_costs():
    setting = build.build_cost_setting(config())
    measured = cost.measure_costs(setting, batch=2, rounds=2)
    assert len(measured.seconds) == 3 and min(measured.seconds) > 0
    assert measured.costs.dtype == np.float32 and measured.costs.max() == 1.0
    assert measured.costs.min() > 0 and measured.batch == 2
