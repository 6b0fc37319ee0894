"""Run by test_sharding.py in a process with 8 virtual devices; prints one line of JSON."""

from __future__ import annotations

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from configs import smoke
from meta_attention_jax.analysis import hlo
from meta_attention_jax.training import build
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.evaluation import Evaluator
from meta_attention_jax.training.parallel import Parallel
from meta_attention_jax.training.step import init_state, train_step
from tests.close import distance
from tests.parallel_check import setting, train, uneven


def bytes_per_device(state):
    """Of parameters and moments: (in all, on the device that holds most)."""
    held = {}
    leaves = jax.tree.leaves((state.params, state.opt_state))
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return sum(leaf.nbytes for leaf in leaves), max(held.values())


def adam_state(parallel):
    """Two steps with moments; whole, on the host."""
    _, dataset, spec, hypers = setting(fsdp=8)
    config = smoke.get_config()
    config.parallel.fsdp = 8
    spec = build.build_spec(config, dataset)
    batch = dataset.train_batch(0)
    state = parallel.make(lambda: init_state(spec, jax.random.key(0), batch, hypers))
    step = parallel.compile(
        functools.partial(train_step, spec), batch_argument=1, state_argument=0
    )
    for number in range(2):
        state, metrics = step(
            state, parallel.shard(uneven(dataset.train_batch(number))), parallel.place(hypers)
        )
    finite = all(bool(jnp.all(ok)) for ok in jax.tree.leaves(metrics["finite"]))
    return spec, batch, hypers, state, finite


def plain(state):
    """Leaves on the host; keys as their words."""
    key = jax.random.key_data(state.key)
    return [np.asarray(x) for x in jax.tree.leaves(jax.device_get(state.replace(key=key)))]


def restores(folder, ways, spec, batch, hypers, state):
    """{"fsdp8 -> one": whether all leaves came back as they were, ...}."""
    original = plain(state)
    host = jax.tree.map(
        lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jax.device_get(x), state
    )
    # A key on the host does not exist.
    host = host.replace(key=jax.random.wrap_key_data(jax.random.key_data(state.key)))
    templates, found = {}, {}
    for name, parallel in ways.items():
        fresh = parallel.make(lambda: init_state(spec, jax.random.key(9), batch, hypers))
        templates[name] = parallel.unreplicate(fresh)
        checkpoints = Checkpoints(folder / name)
        checkpoints.save(1, parallel.unreplicate(parallel.place(host)), config={}, nll=1.0)
        checkpoints.close()
    for saved in ways:
        for name, parallel in ways.items():
            checkpoints = Checkpoints(folder / saved, read_only=True)
            restored = parallel.place(checkpoints.restore(templates[name], 1))
            checkpoints.close()
            back = plain(parallel.unreplicate(restored))
            found[f"{saved} -> {name}"] = all(
                np.array_equal(a, b) for a, b in zip(original, back, strict=True)
            )
    return found


def evaluated(devices, fsdp):
    """Nats of the same parameters, by the mode "soft" and by packed dispatch."""
    _, dataset, spec, hypers = setting(fsdp=fsdp)
    parallel = Parallel("jit", jax.devices()[:devices], fsdp)
    batch = dataset.train_batch(0)
    state = parallel.make(lambda: init_state(spec, jax.random.key(0), batch, hypers))
    routing = parallel.place(hypers.routing)
    found = []
    for model, mode in ((spec.model, "soft"), (spec.model.clone(dispatch="packed"), "hard")):
        evaluator = Evaluator(model, dataset, parallel)
        sums = evaluator.sums(
            state.params, routing, split="validation", mode=mode, max_batches=1
        )
        found.append(float(sums.nll))
    return found


def main():
    folder = pathlib.Path(sys.argv[1])
    gradient, params, _ = train("jit", 1, clip=0.5)
    result = {}
    for label, fsdp, accumulate in (("fsdp8", 8, 1), ("data2_fsdp4", 4, 1), ("fsdp2_acc2", 2, 2)):
        other_gradient, other_params, _ = train("jit", 8, accumulate, fsdp=fsdp, clip=0.5)
        result[label] = {"gradient": distance(other_gradient, gradient),
                         "sgd": distance(other_params, params)}
    gradient, params, _ = train("jit", 1, scan=True)
    other_gradient, other_params, (step, arguments) = train("jit", 8, scan=True, fsdp=8)
    result["scanned"] = {"gradient": distance(other_gradient, gradient),
                         "sgd": distance(other_params, params)}
    found = hlo.collectives(step.lower(*arguments).compile().as_text())
    layers = len(jax.tree.leaves(params["layers"])[0])
    result["loops"] = sorted({c.loops for c in found}, key=str)
    result["layers"] = layers
    split = [x for x in jax.tree.leaves(arguments[0].params)
             if any(axis is not None for axis in x.sharding.spec)]
    result["split"] = len(split)
    result["gathers"] = {
        str(c.loops): sum(d.kind == "all-gather" and d.loops == c.loops for d in found)
        for c in found
    }
    one, eight = evaluated(1, 1), evaluated(8, 8)
    result["evaluated"] = [abs(a - b) / abs(b) for a, b in zip(eight, one)]
    ways = {
        "one": Parallel("jit", jax.devices()[:1]),
        "data8": Parallel("jit"),
        "pmap8": Parallel("pmap"),
        "fsdp8": Parallel("jit", fsdp=8),
        "data4_fsdp2": Parallel("jit", fsdp=2),
    }
    spec, batch, hypers, state, result["finite"] = adam_state(ways["fsdp8"])
    result["bytes"] = bytes_per_device(state)
    result["restores"] = restores(folder, ways, spec, batch, hypers, state)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
