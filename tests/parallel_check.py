"""Run by test_training.py in a process with 8 virtual devices; prints one line of JSON."""

from __future__ import annotations

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np

from configs import smoke
from meta_attention_jax.training import build
from meta_attention_jax.training.parallel import Parallel
from meta_attention_jax.training.state import in_controller
from meta_attention_jax.training.step import eval_step, gradient_sums, init_state, train_step


def setting(accumulate=1, rows=16, scan=False):
    config = smoke.get_config()
    config.optimizer.name = "sgd"
    config.optimizer.clip = 0.0
    config.optimizer.warmup = 0.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.accumulate = accumulate
    config.data.batch_size = rows
    config.model.scan_layers = scan
    dataset = build.build_dataset(config)
    return config, dataset, build.build_spec(config, dataset), build.build_hypers(config)


def uneven(batch):
    """Rows of every length; some devices hold almost nothing."""
    lengths = np.minimum(np.arange(len(batch.tokens)) ** 2 // 6 + 1, batch.tokens.shape[1])
    real = np.arange(batch.tokens.shape[1])[None] < lengths[:, None]
    return batch.replace(loss_mask=real, segment_ids=real.astype(np.int32))


def distance(a, b):
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    a, b = flat(a), flat(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def train(mode, devices, accumulate=1, rows=16, steps=5, scan=False):
    """(gradient of the first step, parameters after 5 steps of SGD, compiled step)."""
    config, dataset, spec, hypers = setting(accumulate, rows, scan)
    parallel = Parallel(mode, jax.devices()[:devices])
    batches = [parallel.shard(uneven(dataset.train_batch(s))) for s in range(steps)]
    state = init_state(spec, jax.random.key(0), dataset.train_batch(0), hypers)
    first = jax.device_get(state.params)
    step = parallel.compile(functools.partial(train_step, spec), batch_argument=1)
    state, hypers = parallel.replicate(state), parallel.replicate(hypers)
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
    computations, name = {}, None
    for line in text.splitlines():
        header = re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header:
            name = header.group(1)
            computations[name] = []
        elif name is not None:
            computations[name].append(line)
    inside, queue = set(), re.findall(r"(?:body|condition)=%?([\w.\-]+)", text)
    while queue:
        name = queue.pop()
        if name in inside:
            continue
        inside.add(name)
        for line in computations.get(name, []):
            queue += re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line)
    kinds = r"= .*\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\("
    count = lambda lines: sum(bool(re.search(kinds, line)) for line in lines)  # noqa: E731
    return (sum(map(count, computations.values())),
            sum(count(computations.get(name, [])) for name in inside))


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
    params, routing = parallel.replicate((state.params, hypers.routing))
    arguments = params, parallel.shard(uneven(batch)), routing
    sums = step(*arguments)
    return float(sums.nll), np.asarray(sums.routes).sum(axis=(0, 1)), (step, arguments)


def main():
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
    print(json.dumps(result))


if __name__ == "__main__":
    jnp.zeros(())  # start the backend before anything prints
    main()
