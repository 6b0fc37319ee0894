"""Run by test_training.py in a process with 8 virtual devices; prints one line of JSON.

Leaves runs trained on all devices in the folder that is its argument, for one device to open.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from configs import smoke
from meta_attention_jax.analysis import hlo
from meta_attention_jax.sweeps.group import Group, point_of
from meta_attention_jax.sweeps.space import configured, sweep
from meta_attention_jax.training import build, loop
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.evaluation import eval_step
from meta_attention_jax.training.job import Job, prepare
from meta_attention_jax.training.parallel import Parallel
from meta_attention_jax.training.step import gradient_sums, in_controller, init_state, train_step
from tests.close import distance


def setting(accumulate=1, rows=16, scan=False, fsdp=1, clip=0.0):
    config = smoke.get_config()
    config.optimizer.name = "sgd"
    config.optimizer.clip = clip
    config.optimizer.warmup = 0.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.accumulate = accumulate
    config.data.batch_size = rows
    config.model.scan_layers = config.model.remat = scan
    config.parallel.fsdp = fsdp
    dataset = build.build_dataset(config)
    return config, dataset, build.build_spec(config, dataset), build.build_hypers(config)


def uneven(batch):
    """Rows of every length; some devices hold almost nothing."""
    lengths = np.minimum(np.arange(len(batch.tokens)) ** 2 // 6 + 1, batch.tokens.shape[1])
    real = np.arange(batch.tokens.shape[1])[None] < lengths[:, None]
    return batch.replace(loss_mask=real, segment_ids=real.astype(np.int32))



def train(mode, devices, accumulate=1, rows=16, steps=5, scan=False, fsdp=1, clip=0.0):
    """(gradient of the first step, parameters after 5 steps of SGD, compiled step)."""
    config, dataset, spec, hypers = setting(accumulate, rows, scan, fsdp, clip)
    parallel = Parallel(mode, jax.devices()[:devices], fsdp)
    batches = [parallel.shard(uneven(dataset.train_batch(s))) for s in range(steps)]
    start = functools.partial(init_state, spec, batch=dataset.train_batch(0), hypers=hypers)
    state = parallel.make(lambda: start(jax.random.key(0)))
    first = jax.device_get(parallel.unreplicate(state.params))
    step = parallel.compile(
        functools.partial(train_step, spec), batch_argument=1, state_argument=0
    )
    hypers = parallel.place(hypers)
    compiled = (step, (state, batches[0], hypers))
    for number, batch in enumerate(batches):
        state, metrics = step(state, batch, hypers)
        params = jax.device_get(parallel.unreplicate(state.params))
        if number == 0:
            rate = float(jax.device_get(parallel.unreplicate(metrics["learning_rate"])))
            gradient = jax.tree.map(lambda a, b: (a - b) / rate, first, params)
    return gradient, params, compiled


def collectives(text):
    """(all collectives of the HLO, those inside the body of a loop)."""
    found = hlo.collectives(text)
    return len(found), sum(bool(c.loops) for c in found)


def mean_of_means(devices):
    """The gradient of a step that would divide on every device by that device's own tokens."""
    _, dataset, spec, hypers = setting()
    batch = uneven(dataset.train_batch(0))
    state = init_state(spec, jax.random.key(0), batch, hypers)
    share = jax.jit(functools.partial(gradient_sums, spec))
    total = None
    for rows in np.split(np.arange(len(batch.tokens)), devices):
        gradient, sums = share(state, jax.tree.map(lambda leaf: leaf[rows], batch), hypers)
        mean = jax.tree.map(lambda g: g / sums.tokens / devices, gradient)
        total = mean if total is None else jax.tree.map(jnp.add, total, mean)
    return total


def packed_evaluation(devices):
    """(nats of an uneven batch by packed dispatch, tokens of each mechanism, compiled step)."""
    _, dataset, spec, hypers = setting()
    parallel = Parallel("jit", jax.devices()[:devices])
    batch = dataset.train_batch(0)
    state = init_state(spec, jax.random.key(0), batch, hypers)

    def moved(path, leaf):  # The initial controller routes all tokens alike.
        noise = jax.random.normal(jax.random.key(leaf.size), leaf.shape)
        return leaf + 0.5 * noise if in_controller(path) else leaf

    state = state.replace(params=jax.tree_util.tree_map_with_path(moved, state.params))
    model = spec.model.clone(mode="hard", dispatch="packed")
    step = parallel.compile(
        functools.partial(eval_step, model, spec.num_kinds), batch_argument=1
    )
    params, routing = parallel.place((state.params, hypers.routing))
    arguments = params, parallel.shard(uneven(batch)), routing
    sums = step(*arguments)
    return float(sums.nll), np.asarray(sums.routes).sum(axis=(0, 1)), (step, arguments)


TOKENS = np.arange(24)[None] % 20


def left_run(folder, mode):
    """Trains 2 steps on 8 devices; the logits of TOKENS stand beside the run."""
    config = smoke.get_config()
    config.model.num_layers = 1
    config.controller.name = "softmax"
    config.parallel.mode = mode
    config.train.steps = config.train.eval_every = config.train.checkpoint_every = 2
    job = prepare(config, folder / mode)
    loop.train(job, progress=False)
    checkpoints = Checkpoints(job.path / "checkpoints", read_only=True)
    template = init_state(job.spec, jax.random.key(1), job.dataset.train_batch(0), job.hypers)
    state = job.parallel.unreplicate(job.parallel.place(checkpoints.restore(template, 2)))
    checkpoints.close()
    output = job.spec.model.apply({"params": state.params}, TOKENS, hypers=job.hypers.routing)
    np.save(folder / f"{mode}.npy", output.logits[0])
    return len(job.parallel.devices)


def points_on_devices():
    """Three points on 2 devices, the last one twice, against 1."""
    config = smoke.get_config()
    config.controller.name = "softmax"
    config.model.num_layers = 1
    found = {}
    for devices in (1, 2):
        points = sweep("optimizer.learning_rate", (0.01, 0.02, 0.03))
        jobs = []
        for point in points:
            values = configured(config, point)
            dataset = build.build_dataset(values)
            jobs.append(Job(
                config=values, path=pathlib.Path(), dataset=dataset, parallel=Parallel("jit"),
                spec=build.build_spec(values, dataset), hypers=build.build_hypers(values),
            ))
        group = Group(jobs, jax.devices()[:devices], turns=False)
        states = group.states()
        for number in range(3):
            batch = group.replicate(dataset.train_batch(number))
            states, _ = group.step(states, batch, group.hypers, group.frozen)
        found[devices] = [jax.device_get(point_of(states.params, i)) for i in range(3)]
        text = group.step.as_text()
    return (
        max(distance(found[2][i], found[1][i]) for i in range(3)),
        collectives(text)[0],
    )


def main():
    folder = pathlib.Path(sys.argv[1])
    gradient, params, _ = train("jit", 1)
    result = {}
    for label, mode, devices, accumulate in (
        ("jit8", "jit", 8, 1), ("pmap8", "pmap", 8, 1), ("jit1_accumulated", "jit", 1, 4)
    ):
        other_gradient, other_params, _ = train(mode, devices, accumulate)
        result[label] = {"gradient": distance(other_gradient, gradient),
                         "sgd": distance(other_params, params)}
    result["mean_of_means"] = distance(mean_of_means(8), gradient)
    # Rows that accumulation and attention really loop over: XLA unrolls loops of one turn.
    _, _, (step, arguments) = train("jit", 8, 3, rows=24, steps=1, scan=True)
    text = step.lower(*arguments).compile().as_text()
    result["collectives"], result["collectives_in_loops"] = collectives(text)
    result["float_loops"] = len(re.findall(r" = \([^\n]*f32\[[^\n]* while\(", text))
    one, routes, _ = packed_evaluation(1)
    eight, _, (step, arguments) = packed_evaluation(8)
    result["packed_routes"] = routes.tolist()
    result["packed"] = abs(eight - one) / one
    text = step.lower(*arguments).compile().as_text()
    result["packed_collectives"], result["packed_collectives_in_loops"] = collectives(text)
    result["left"] = [left_run(folder, mode) for mode in ("jit", "pmap")]
    result["points"], result["points_collectives"] = points_on_devices()
    print(json.dumps(result))


if __name__ == "__main__":
    jnp.zeros(())  # start the backend before anything prints
    main()
