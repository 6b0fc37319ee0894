"""The house: imports run downward, and adding a thing touches what CONTRIBUTING.md says."""

from __future__ import annotations

import ast
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from meta_attention_jax import Mechanism, load_run
from meta_attention_jax.config import SCHEMA, check_fields
from meta_attention_jax.controller import uncertainty
from meta_attention_jax.mechanisms import registry
from meta_attention_jax.mechanisms.cache import init_cache
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.loop import train
from meta_attention_jax.training.rules import validate
from tests import making

PACKAGE = pathlib.Path(__file__).parent.parent / "meta_attention_jax"
FLOORS = (
    ("targets", "files", "fields", "console"),
    ("types",),
    ("architecture",),
    ("sharding",),
    ("mechanisms", "controller", "data"),
    ("cost", "kernels"),
    ("routing",),
    ("layer", "config"),
    ("model",),
    ("objective", "generation", "pretrained"),
    ("training",),
    ("sweeps", "analysis"),
    ("answers", "budgets"),
    ("run",),
    ("runs",),
    ("__init__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports(path):
    """Rooms of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            parts = node.module.split(".")[1:]
            yield from ([parts[0]] if parts else [name.name for name in node.names])
        elif isinstance(node, ast.Import):
            yield from (n.name.split(".")[1] for n in node.names if n.name.startswith(f"{PACKAGE.name}."))


def test_every_room_has_a_floor_and_imports_run_downward():
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        own = parts[0]
        for room in imports(path):
            assert own == room or FLOOR[room] < FLOOR[own], f"{'/'.join(parts)} imports {room}"


def test_nothing_outside_the_tests_imports_them():
    for folder in ("meta_attention_jax", "experiments", "configs"):
        for path in (PACKAGE.parent / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                module = getattr(node, "module", None) or ""
                assert not (isinstance(node, ast.ImportFrom) and module.split(".")[0] == "tests"), path


def uniform(q, k, v, *, spec, segment_ids):
    """The mean of all values so far of the segment: attention that looks at nothing."""
    assert spec.causal
    ids = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    seen = jnp.tril((ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, :, None]).astype(jnp.float32)
    total = jnp.einsum("bts,bsgd->btgd", seen, v) / jnp.maximum(seen.sum(-1), 1.0)[..., None, None]
    return jnp.repeat(total, q.shape[2] // k.shape[2], axis=2).astype(q.dtype)


def uniform_step(q, cache, layer, *, needed, spec):
    """The same of a row's newest token."""
    del spec
    seen = jnp.arange(cache.capacity)[None] < cache.length[layer][:, None]
    total = jnp.einsum("bgcd,bc->bgd", cache.v[layer], seen.astype(jnp.float32))
    mean = total / cache.length[layer][:, None, None]
    out = jnp.repeat(mean, q.shape[1] // mean.shape[1], axis=1)
    return jnp.where(needed[:, None, None], out, 0.0)


UNIFORM = Mechanism(uniform, lambda time, dim, spec: 2.0 * time * dim, cost=0.05, step=uniform_step)


@pytest.mark.slow
def test_a_toy_mechanism_is_one_file_and_one_line_and_then_trains_decodes_and_is_told(
    monkeypatch, tmp_path
):
    monkeypatch.setitem(registry.REGISTRY, "uniform", UNIFORM)
    config = smoke.get_config()
    config.update_from_flattened_dict({
        "model.mechanisms": ("full", "uniform"), "model.num_layers": 1, "train.steps": 4,
        "controller.name": "softmax_kl",  # The smallest program of those that read the costs.
        "train.eval_every": 4, "train.checkpoint_every": 4, "train.eval_batches": 1,
    })
    train(prepare(config, tmp_path / "run"), progress=False)
    run = load_run(tmp_path / "run")
    assert 0.0 <= run.evaluate(max_batches=1)["fraction/uniform"] <= 1.0
    ids = np.arange(9) % run.tokenizer.vocab_size
    params = jax.tree.map(lambda x: x, run.params)
    bias = params["layer_0"]["attention"]["controller"]["mlp"]["output"]["bias"]
    params["layer_0"]["attention"]["controller"]["mlp"]["output"]["bias"] = bias.at[1].add(50.0)
    object.__setattr__(run, "params", params)
    routes = run.routes(ids, mode="hard")
    assert (routes.route == 1).all() and "uniform" in str(run.show(ids))
    text = run.generate(ids, steps=3, mode="hard")
    assert np.argmax(run.logits(text.ids[:-1], mode="hard")[-1]) == text.ids[-1], "steps are attend"


def test_a_mechanism_that_is_not_rotary_never_sees_rotated_keys(monkeypatch):
    """Its steps would silently be another function than its `attend`."""
    seen = []

    def step(q, cache, layer, *, needed, spec):
        seen.append(cache.k is None)
        return uniform_step(q, cache, layer, needed=needed, spec=spec)

    monkeypatch.setitem(registry.REGISTRY, "uniform", dataclasses.replace(UNIFORM, step=step))
    x = jnp.ones((1, 1, 8))
    cache = init_cache(layers=1, batch=1, capacity=4, kv_heads=2, dim=4)
    for rotary in (True, False):
        layer = making.layer(num_heads=2, rotary=rotary, mechanisms=("full", "uniform"), window=2)
        # Traced, not run: what a step is given does not hang on numbers.
        jax.eval_shape(lambda key, layer=layer: layer.init_with_output(key, x, cache=cache, method="routed"),
                       jax.random.key(0))
    assert seen == [True, False]


def test_a_toy_measure_is_one_function_and_one_line(monkeypatch):
    doubt = uncertainty.Measure(lambda mean: 1.0 - jnp.max(mean, axis=-1), typical=0.7, of_posterior=False)
    monkeypatch.setitem(uncertainty.MEASURES, "doubt", doubt)
    config = smoke.get_config()
    config.controller.uncertainty = "doubt"
    check_fields(config)
    for controller in ("softmax", "bayesian"):
        config.controller.name = controller
        validate(config)
    assert "doubt" in SCHEMA["controller.uncertainty"].choices
    mean = jnp.asarray([0.2, 0.5, 0.3])
    assert float(uncertainty.measured("doubt", mean, None).uncertainty) == pytest.approx(0.5)
