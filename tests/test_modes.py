"""What a host program may have set or hand over: a mesh, 64 bits, strict promotion, nothing at all,
a batch that is a symbol, numbers of NumPy and JAX, a platform that is not there."""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from configs import smoke
from meta_attention_jax import generation
from meta_attention_jax.routing.accounting import count_attention
from meta_attention_jax.runs import load_run
from meta_attention_jax.sweeps.space import chain, configured, labels, log_spaced, point, product, sweep
from meta_attention_jax.training import build
from meta_attention_jax.training.evaluation import eval_step, sampled_eval_step
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.loop import train
from meta_attention_jax.training.step import init_state, train_step
from meta_attention_jax.types import RoutingHypers
from tests import making
from tests import test_commands as commands
from tests.close import assert_close

ROOT = pathlib.Path(__file__).parent.parent
HYPERS = RoutingHypers(
    strength=np.float32(2.0), preference=np.float32(0.1),
    costs=np.array([1.0, 0.3, 0.6], np.float32), threshold=np.float32(0.5),
)
RANDOM = np.random.default_rng(0)
WAYS = {
    "soft": dict(),
    "gated": dict(mode="gated", threshold=0.5),
    "hard": dict(mode="hard", dispatch="dense"),
    "packed": dict(mode="hard", dispatch="packed"),
}


@contextlib.contextmanager
def strict():
    """Without x64, whatever the process has: the two together are not asked for."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("strict"):
        yield


MODES = {"x64": lambda: jax.enable_x64(True), "strict": strict}


def layer(**fields):
    return making.layer(num_heads=2, window=8, rotary=True, **fields)


def model(**fields):
    """Two layers where they are scanned, else one: as much to trace."""
    num_layers = 2 if fields.get("scan_layers") else 1
    return making.model(
        vocab_size=32, model_dim=16, num_layers=num_layers, num_heads=2, window=8, **fields
    )


def at_random(init, *arguments):
    """Parameters of the shapes that `init` gives."""
    shapes = jax.eval_shape(init, jax.random.key(0), *arguments)
    return jax.tree.map(lambda x: RANDOM.normal(0, 0.3, x.shape).astype(x.dtype), shapes)


def no_float64(program):
    """But for scalars: numbers of Python pass through as such."""
    return not re.search(r"f64\[\d", str(program))


def environment(**changes):
    return commands.environment() | changes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run of two steps."""
    config = smoke.get_config()
    config.update_from_flattened_dict({
        "train.steps": 2, "train.eval_every": 2, "train.checkpoint_every": 2,
        "train.eval_batches": 1, "model.num_layers": 1, "parallel.devices": 1,
        "controller.name": "softmax_kl",
    })
    path = tmp_path_factory.mktemp("modes") / "run"
    train(prepare(config, path), progress=False)
    return path


@pytest.mark.slow
def test_under_a_mesh_all_is_as_on_one_device(run):
    """Rows split over "data" of a mesh that `jax.set_mesh` has set: values, gradients, places."""
    flags = f"{environment()['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "meshes_check.py"), str(run)],
        env=environment(XLA_FLAGS=flags), capture_output=True, text=True, timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    layers = ("packed", "dense", "soft", "bayesian")
    assert set(result) == {
        *(f"{kind} {name}" for kind in ("Explicit", "Auto") for name in (*layers, "run")),
        "Explicit sampled",
    }
    for name, found in result.items():
        if name.endswith("run"):
            assert found == [0.0, True, True, 1], result
            continue
        assert found["outputs"] <= 1e-6 and found["gradients"] <= 1e-6, result
        # Types of auto axes do not say which rows are split: packed dispatch has them over all axes.
        place = "('data', 'model')" if name in ("Auto packed", "Auto bayesian") else "data"
        assert found["split"] == [place, place] and found["talks"] == 0, result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("controller", ["bayesian", *making.slow("switch", "gumbel")])
def test_the_layer_keeps_float32(mode, controller):
    x = jnp.asarray(RANDOM.normal(size=(2, 20, 16)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    with MODES[mode]():
        for fields, keys in ((WAYS["soft"], keys), (WAYS["packed"], None)):
            module = layer(controller=controller, **fields)

            def total(params, x):
                out, routing, _ = module.apply(params, x, keys=keys, method="routed")
                return out.sum(), (out, routing)

            params = at_random(module.init, x)
            program = jax.make_jaxpr(jax.grad(total, (0, 1), has_aux=True))(params, x)
            assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
            assert no_float64(program)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changes", [
    *making.slow({"controller.name": "gumbel", "gate.kind": "cosine", "model.num_layers": 1}),
    {"train.packed": True, "train.packed_dense_rows": 0.5, "model.dtype": "bfloat16",
     "model.scan_layers": True, "gate.kind": "settled", "optimizer.accumulate": 2},
])
def test_steps_take_and_give_the_same_types(mode, changes):
    config = smoke.get_config()
    config.update_from_flattened_dict(changes)
    with MODES[mode]():
        dataset = build.build_dataset(config)
        spec, hypers = build.build_spec(config, dataset), build.build_hypers(config)
        batch = dataset.train_batch(0)
        state = jax.eval_shape(lambda: init_state(spec, jax.random.key(0), batch, hypers))
        step = functools.partial(train_step, spec)
        new, metrics = jax.eval_shape(step, state, batch, hypers)
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, new)
        assert all(jax.tree.leaves(same))
        assert not {np.dtype(np.float64)} & {leaf.dtype for leaf in jax.tree.leaves(metrics)}
        for function, *arguments in (
            (functools.partial(eval_step, spec.model.clone(mode="gated"), spec.num_kinds),
             state.params, batch, hypers.routing),
            (functools.partial(sampled_eval_step, spec.model, 2),
             state.params, batch, hypers.routing, jax.random.key(0)),
        ):
            assert no_float64(jax.make_jaxpr(function)(*arguments))


@pytest.mark.parametrize("mode", MODES)
def test_counting_and_decoding_keep_float32(mode):
    route = RANDOM.integers(0, 3, (2, 20))
    mechanisms = ("full", "linear", "local")
    with MODES[mode]():
        config = making.config(vocab_size=1, model_dim=16, num_layers=1, num_heads=2,
                               num_kv_heads=1, window=8, mechanisms=mechanisms)
        found = jax.eval_shape(lambda: count_attention(route, config).per_token())
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}
        for fields in (dict(scan_layers=True), dict(dtype=jnp.bfloat16)):
            module = model(**fields)
            tokens = RANDOM.integers(0, 32, (2, 20)).astype(np.int32)
            params = at_random(functools.partial(module.init, hypers=HYPERS), tokens)["params"]

            def text(params, tokens, lengths, keys):
                cache, logits, _ = generation.prefill(
                    module, params, tokens, lengths, HYPERS, capacity=64
                )
                return generation.decode_loop(
                    module, params, cache, logits, keys, HYPERS, steps=3,
                    sampler=generation.Sampler(0.9, 5, 0.8),
                )

            lengths, keys = np.array([20, 3], np.int32), jax.random.split(jax.random.key(0), 2)
            assert no_float64(jax.make_jaxpr(text)(params, tokens, lengths, keys))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(0, 20), (2, 0), (0, 0)])
def test_nothing_in_is_nothing_out(way, shape):
    module = layer(**WAYS[way])
    params = at_random(module.init, jnp.zeros((1, 4, 16)))
    keys = jax.random.split(jax.random.key(0), shape[0]) if way == "soft" else None

    @jax.jit
    def step(params, x, ids):
        out, vjp = jax.vjp(lambda p, x: module.apply(p, x, segment_ids=ids, keys=keys), params, x)
        return out, vjp(out)

    out, gradients = step(params, jnp.zeros((*shape, 16)), jnp.ones(shape, jnp.int32))
    assert out.shape == (*shape, 16)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))
    q = jnp.zeros((*shape, 2, 8))
    for name in ("full", "linear", "local"):
        for causal in (True, False):
            out = making.attended(name, q, q, q, causal=causal, window=3, sinks=1)
            assert out.shape == q.shape
    assert making.hard(q, q, q, jnp.zeros(shape, jnp.int32), window=3).shape == q.shape
    lm = model(**{name: WAYS[way][name] for name in ("mode", "dispatch") if name in WAYS[way]})
    params = at_random(functools.partial(lm.init, hypers=HYPERS), jnp.zeros((1, 4), jnp.int32))
    output = jax.eval_shape(
        functools.partial(lm.apply, hypers=HYPERS), params, jnp.zeros(shape, jnp.int32)
    )
    assert output.logits.shape == (*shape, 32)


@pytest.mark.slow
def test_a_batch_can_be_a_symbol():
    scope = export.SymbolicScope()

    def rows(shape, dtype):
        return jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), dtype)

    x = jnp.asarray(RANDOM.normal(size=(3, 20, 16)), jnp.float32)
    route = RANDOM.integers(0, 3, (3, 20)).astype(np.int32)
    for fields in (dict(implementation="blockwise"), dict(dispatch="packed")):
        module = layer(**fields)
        params = at_random(module.init, x)
        forced = {} if "implementation" in fields else {"route": route}
        function = jax.jit(lambda p, x, named: module.apply(p, x, **named))
        shapes = {name: rows("b, 20", np.int32) for name in forced}
        exported = export.export(function)(params, rows("b, 20, 16", np.float32), shapes)
        assert_close(exported.call(params, x, forced), function(params, x, forced), 1e-6)
    tokens = RANDOM.integers(0, 32, (3, 20)).astype(np.int32)
    module = model(scan_layers=True, **WAYS["packed"])
    params = at_random(functools.partial(module.init, hypers=HYPERS), tokens)
    function = jax.jit(lambda p, tokens: module.apply(p, tokens, hypers=HYPERS).logits)
    exported = export.export(function)(params, rows("b, 20", np.int32))
    assert_close(exported.call(params, tokens), function(params, tokens), 1e-6)


@pytest.mark.slow
def test_numbers_of_numpy_and_jax_are_numbers(run):
    plain = generation.Sampler(0.5, 5, 0.25)
    for number in (np.float32, np.float64, jnp.float32, lambda n: np.array(n)):
        for whole in (np.int64, np.uint8, jnp.int32, lambda n: jnp.array(n)):
            same = generation.Sampler(number(0.5), whole(5), number(0.25))
            assert same == plain and hash(same) == hash(plain)
    opened = load_run(run, step=np.int64(2), sequence_length=np.int64(16), batch_size=jnp.int32(2))
    expected = opened.generate([1, 2], steps=3, temperature=0.5, top_k=5, seed=7)
    found = opened.generate(
        [1, 2], steps=np.int64(3), temperature=jnp.float32(0.5), top_k=jnp.int32(5),
        seed=np.uint32(7),
    )
    assert found.ids.tolist() == expected.ids.tolist()
    assert opened.routes([1, 2], mode="gated", threshold=jnp.float32(0.5)).hard.shape == (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("given, sentence", [
    (dict(steps=2.0), "steps: expected an integer, got 2.0."),
    (dict(steps=np.float32(2)), "steps: expected an integer, got 2.0."),
    (dict(steps="2"), "steps: expected an integer, got '2'."),
    (dict(steps=True), "steps: expected an integer, got True."),
    (dict(seed=1.5), "seed: expected an integer, got 1.5."),
    (dict(temperature="1"), "temperature: expected a number, got '1'."),
    (dict(top_k=5.0), "top_k: expected an integer, got 5.0."),
    (dict(top_p=np.array([0.5])), r"top_p: expected a number, got \(0.5,\)."),
    (dict(threshold="0"), "threshold: expected a number, got '0'."),
])
def test_what_is_no_number_is_one_sentence(run, given, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        load_run(run).generate([1, 2], **given)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["batch_size", "sequence_length"])
@pytest.mark.parametrize("value", [0, -1, np.int64(0)])
def test_nothing_is_no_size_of_a_batch(run, field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected a number > 0, got {value}.$"):
        load_run(run, **{field: value})


def test_points_of_a_sweep_are_plain():
    seeds = sweep("seed", np.arange(2))
    costs = sweep("prior.costs", [jnp.ones(3), (np.float32(1.0), 1)])
    points = product(seeds, chain(costs, point(**{"prior.strength": jnp.float32(2.0)})))
    json.dumps(points)
    assert labels(seeds) == ["seed=0", "seed=1"] and points[0]["prior.costs"] == (1.0, 1.0, 1.0)
    assert configured(smoke.get_config(), seeds[1]).seed == 1
    spaced = log_spaced(np.float32(0.5), jnp.float32(32.0), np.int64(7))
    assert spaced == log_spaced(0.5, 32, 7)
    with pytest.raises(ValueError, match="^log_spaced: expected an integer, got 7.0.$"):
        log_spaced(0.5, 32, 7.0)


@pytest.mark.slow
def test_a_platform_that_is_not_there_is_one_sentence(run, tmp_path):
    """Of every command that computes; each in a fork of one process."""
    commands = [
        ["train", "--config=configs/smoke.py", f"--workdir={tmp_path / 'new'}"],
        ["sweep", "--config=configs/sweep_timing.py", f"--workdir={tmp_path / 'new'}"],
        ["generate", f"--workdir={run}", "--prompt=k1"],
        ["report", f"--workdir={run}", f"--out={tmp_path / 'new.html'}"],
        ["benchmarks.mechanisms"],
    ]
    with subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "command_server.py")], cwd=ROOT, text=True,
        env=environment(JAX_PLATFORMS="nonsense"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as server:
        for name, *flags in commands:
            told = {stream: str(tmp_path / stream) for stream in ("stdout", "stderr")}
            argv = [f"experiments.{name}", *flags]
            server.stdin.write(json.dumps({"argv": argv, **told}) + "\n")
            server.stdin.flush()
            code, words = int(server.stdout.readline()), (tmp_path / "stderr").read_text()
            assert code == 2 and words.count("\n") == 1 and words.startswith(
                "error: JAX_PLATFORMS: expected platforms that this machine has, got 'nonsense' (Unable "
            ), (name, words)
    assert not list(tmp_path.glob("new*"))
