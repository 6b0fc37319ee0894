"""Run by test_modes.py in a process with 8 virtual devices and a run directory; prints one line of
JSON.

Every case runs on one device, and then where `jax.set_mesh` has set a mesh and the rows are split
over its axis "data".
"""

from __future__ import annotations

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from meta_attention_jax.analysis import hlo
from meta_attention_jax.generation import generate
from meta_attention_jax.runs import load_run
from meta_attention_jax.types import RoutingHypers
from tests import making
from tests.close import distance

ROWS, TIME, WIDTH, VOCAB = 8, 40, 16, 32
RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(ROWS, TIME, WIDTH)), jnp.float32)
TOKENS = RANDOM.integers(0, VOCAB, (ROWS, TIME)).astype(np.int32)
# Two texts and padding, of other lengths in every row.
ENDS = np.arange(ROWS)[:, None] + np.array([12, 30])
SEGMENTS = (np.arange(TIME) < ENDS[:, 1:]) * (1 + (np.arange(TIME) >= ENDS[:, :1])).astype(np.int32)
HYPERS = RoutingHypers(
    strength=jnp.float32(2.0), preference=jnp.float32(0.1),
    costs=jnp.array([1.0, 0.3, 0.6], jnp.float32), threshold=jnp.float32(0.5),
)


def parameters(init, *arguments):
    """Of the shapes that `init` gives, at random: the last matrix of a controller starts at 0."""
    shapes = jax.eval_shape(init, jax.random.key(0), *arguments)
    return jax.tree.map(lambda x: jnp.asarray(RANDOM.normal(0, 0.3, x.shape), x.dtype), shapes)


def of_layer(**fields):
    """function(what all rows share, rows) and its arguments."""
    module = making.layer(num_heads=4, num_kv_heads=2, window=8, rotary=True, **fields)

    def function(params, rows):
        out, routing, _ = module.apply(params, rows["x"], segment_ids=rows.get("ids"), method="routed")
        return out, routing.kl

    return function, parameters(module.init, X), {"x": X}


def of_model(**fields):
    module = making.model(vocab_size=VOCAB, model_dim=WIDTH, num_heads=2, window=8, **fields)

    def function(shared, rows):
        output = module.apply(
            shared["params"], rows["tokens"], segment_ids=rows["ids"], hypers=shared["hypers"],
            keys=rows.get("keys"),
        )
        return output.logits, output.routing.kl[0]

    start = functools.partial(module.init, hypers=HYPERS)
    shared = {"params": parameters(start, TOKENS), "hypers": HYPERS}
    return function, shared, {"tokens": TOKENS, "ids": SEGMENTS}


def cases():
    """{name: (function, what all rows share, rows)}."""
    found = {
        # Without the special functions of the Dirichlet, whose gradients are long to compile.
        "packed": of_layer(mode="hard", dispatch="packed", controller="softmax_kl"),
        "dense": of_layer(mode="hard", dispatch="dense", controller="softmax_kl"),
        "soft": of_layer(mode="soft", controller="softmax_kl"),
        "bayesian": of_layer(mode="hard", dispatch="packed", controller="bayesian"),
        "sampled": of_model(num_layers=2, scan_layers=True),
    }
    for name in ("packed", "dense", "soft", "bayesian"):
        found[name][2]["ids"] = SEGMENTS
    found["sampled"][2]["keys"] = jax.random.split(jax.random.key(0), ROWS)
    return found


def evaluated(function, shared, rows):
    """(outputs, gradients of all floats, text of their program)."""

    def loss(shared, rows, whole):
        outputs = function(shared, {**rows, **whole})
        return sum(jnp.square(x).sum() for x in outputs), outputs

    floats = {name: x for name, x in rows.items() if x.dtype == jnp.float32}
    others = {name: x for name, x in rows.items() if x.dtype != jnp.float32}
    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    program = gradient.lower(shared, floats, others).compile()
    gradients, outputs = program(shared, floats, others)
    return outputs, gradients, program.as_text()


def main():
    result, found = {}, cases()
    expected = {name: evaluated(*case) for name, case in found.items()}
    run = load_run(sys.argv[1])
    text = np.array([1, 2, 3])
    logits, ids = run.logits(text), run.generate(text, steps=3).ids
    of_layers = [name for name in found if name != "sampled"]
    for kind, names in ((AxisType.Explicit, found), (AxisType.Auto, of_layers)):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
        with jax.set_mesh(mesh):
            for name in names:
                function, shared, rows = found[name]
                outputs, gradients, text_of = evaluated(
                    function,
                    jax.device_put(shared, PartitionSpec()),
                    jax.device_put(rows, PartitionSpec("data")),
                )
                known = expected[name]
                whole = jax.device_get((outputs, gradients))
                result[f"{kind.name} {name}"] = {
                    "outputs": distance(whole[0], known[0]),
                    "gradients": distance(whole[1], known[1]),
                    "split": [str(x.sharding.spec[0]) for x in outputs],
                    # In loops whose trip counts follow the data.
                    "talks": sum(None in c.loops for c in hlo.collectives(text_of)),
                }
            continued = generate(run.model, run.params, [text], steps=3, hypers=run.hypers.routing,
                                 mode=run.mode)
            result[f"{kind.name} run"] = [
                float(np.abs(run.logits(text) - logits).max()),
                run.generate(text, steps=3).ids.tolist() == ids.tolist(),
                np.asarray(continued.tokens)[0].tolist() == ids[3:].tolist(),
                len(load_run(sys.argv[1]).routes(text).route),
            ]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
