"""Training with packed dispatch: the gradients of hard routing, and a controller that stays or learns."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from meta_attention_jax.objective import apply_sums
from meta_attention_jax.training import build
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.loop import dense_row_share, train
from meta_attention_jax.training.step import gradient_sums, in_controller, init_state, train_step
from tests.close import assert_close, distance


@pytest.fixture(scope="module")
def setting():
    """(spec, state past the gate, batch, hypers); the controller away from its zero initialisation."""
    config = smoke.get_config()
    config.model.num_layers = 1
    config.objective.beta_warmup = 0.0
    dataset = build.build_dataset(config)
    spec, hypers = build.build_spec(config, dataset), build.build_hypers(config)
    batch = jax.tree.map(jnp.asarray, dataset.train_batch(0))
    state = jax.jit(lambda key: init_state(spec, key, batch, hypers))(jax.random.key(0))

    def moved(path, leaf):
        noise = np.float32(np.random.default_rng(leaf.size).normal(size=leaf.shape))
        return leaf + 0.5 * noise if in_controller(path) else leaf

    params = jax.tree_util.tree_map_with_path(moved, jax.device_get(state.params))
    state = state.replace(params=params, step=jnp.int32(spec.schedule.gate.end))
    return dataclasses.replace(spec, packed=True), state, batch, hypers


@pytest.fixture(scope="module")
def packed_gradients(setting):
    """batch -> (gradients, sums) where all rows are packed."""
    spec, state, _, hypers = setting
    return functools.partial(gradients_of(spec), state, hypers)


def gradients_of(spec):
    # The state is an argument: as constants, the compiler would compute with it.
    return jax.jit(lambda state, hypers, batch: gradient_sums(spec, state, batch, hypers))


def split(tree):
    """(leaves of the controller, the others), flat vectors."""
    parts = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts[not in_controller(path)].append(np.ravel(leaf))
    return tuple(np.concatenate(p) for p in parts)



def test_gradients_are_those_of_dense_hard_routing(setting, packed_gradients):
    spec, state, batch, hypers = setting
    gradients, sums = packed_gradients(batch)
    controller, others = split(gradients)
    model = spec.model.clone(mode="hard", dispatch="dense")

    def loss(params):
        sums = apply_sums(model, params, batch, hypers.routing, num_kinds=spec.num_kinds)
        return sums.nll, sums

    expected, expected_sums = jax.jit(jax.grad(loss, has_aux=True))(state.params)
    assert np.all(controller == 0.0)
    assert_close(others, split(expected)[1], 2e-5)
    assert (np.asarray(sums.routes).sum(axis=(0, 1)) > 0).sum() >= 2, "routes must differ"
    np.testing.assert_array_equal(sums.routes, expected_sums.routes)


def test_a_frozen_controller_does_not_move(setting):
    """Also with momentum from before, and with weight decay."""
    spec, state, batch, hypers = setting

    def moving(leaf):
        return leaf + leaf.dtype.type(0.1) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    warm = state.replace(opt_state=jax.tree.map(moving, jax.device_get(state.opt_state)))
    after = jax.jit(lambda s: train_step(spec, s, batch, hypers)[0])(warm)
    before_, after_ = split(warm.params), split(after.params)
    np.testing.assert_array_equal(after_[0], before_[0])
    assert distance(after_[1], before_[1]) > 1e-6


@pytest.mark.slow
def test_the_controller_learns_from_the_dense_rows_alone(setting, packed_gradients):
    spec, state, batch, hypers = setting
    mixed = dataclasses.replace(spec, dense_rows=0.3)  # 3 of 8 rows
    whole = split(gradients_of(mixed)(state, hypers, batch)[0])
    dense = dataclasses.replace(mixed, packed=False)
    rows = jax.tree.map(lambda leaf: np.asarray(leaf)[:3], batch)
    alone = split(gradients_of(dense)(state, hypers, rows)[0])
    assert np.linalg.norm(alone[0]) > 0
    assert_close(whole[0], alone[0], 2e-5)
    counts = np.asarray(batch.loss_mask) & (np.arange(len(batch.loss_mask)) >= 3)[:, None]
    rest = split(packed_gradients(batch.replace(loss_mask=counts))[0])
    assert_close(whole[1], alone[1] + rest[1], 2e-5, "what learns from all rows: everything else")


@pytest.mark.slow
def test_a_run_switches_says_so_and_resumes(tmp_path, capsys):
    config = smoke.get_config()
    config.parallel.devices = 1
    config.model.num_layers = 1
    config.model.mechanisms = ("full", "local")  # Of all three the gradients are compared above.
    config.update_from_flattened_dict(
        {"train.steps": 8, "train.eval_every": 8, "train.checkpoint_every": 2,
         "train.keep_latest": 4, "train.eval_batches": 1, "train.log_every": 1,
         "train.packed": True, "gate.start": 0.25, "gate.end": 0.5}
    )
    train(prepare(config, tmp_path / "run"), stop_after=6)
    train(prepare(config, tmp_path / "run"))
    said = capsys.readouterr().out
    assert "step 4: packed dispatch by the portable kernel from here on; the controller is frozen" in said
    assert "step 6: packed dispatch by the portable kernel from here on" in said
    records = read_metrics(tmp_path / "run")
    assert [r["step"] for r in records if r["event"] == "packed"] == [4, 6]
    hard = {r["step"]: r["hard_fraction"] for r in records if r["event"] == "train"}
    assert all(hard[step] == 1.0 for step in range(5, 9))
    beta = {r["step"]: r["beta"] for r in records if r["event"] == "train"}
    assert beta[4] > 0 and all(beta[step] == 0 for step in range(5, 9)), "no KL is trained"
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    try:
        at = {step: split(checkpoints.restore_params(step)) for step in (2, 4, 8)}
    finally:
        checkpoints.close()
    assert distance(at[4][0], at[2][0]) > 0
    np.testing.assert_array_equal(at[8][0], at[4][0])
    assert distance(at[8][1], at[4][1]) > 0


@pytest.mark.slow
def test_the_log_says_how_many_rows_teach_the_controller(tmp_path, capsys):
    """A share is rounded up to rows: here 1 of 8, however small it is."""
    config = smoke.get_config()
    config.parallel.devices = 1
    config.model.num_layers = 1
    config.update_from_flattened_dict(
        {"train.steps": 3, "train.eval_every": 3, "train.checkpoint_every": 3,
         "train.eval_batches": 1, "train.packed": True, "train.packed_dense_rows": 0.01,
         "gate.start": 0.1, "gate.end": 0.4}
    )
    train(prepare(config, tmp_path / "run"))
    assert "the controller learns from 12% of the rows" in capsys.readouterr().out
    records = read_metrics(tmp_path / "run")
    assert [r["controller_rows"] for r in records if r["event"] == "packed"] == [1 / 8]
    assert dense_row_share(config, 8) == 1.0


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"gate.kind": "none"}, "train.packed: expected False unless gate.kind"),
        ({"gate.threshold": 0.9}, "train.packed: expected False unless gate.kind"),
        ({"controller.name": "fixed"}, "train.packed: expected False with a fixed controller"),
        ({"gate.end": 1.0}, "train.packed: expected False unless gate.end leaves steps after it"),
        ({"train.packed_dense_rows": 1.5}, "train.packed_dense_rows: expected a share"),
    ],
)
def test_what_cannot_be_packed_is_refused(tmp_path, changes, sentence):
    config = smoke.get_config()
    config.parallel.devices = 1
    config.update_from_flattened_dict({"train.packed": True, **changes})
    with pytest.raises(ValueError, match=sentence):
        prepare(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
