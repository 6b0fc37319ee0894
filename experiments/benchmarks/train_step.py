"""What does a training step of Bayesian routing cost against the prior-free router and full-only?

python -m experiments.benchmarks.train_step [--json=FILE] [--rounds=5]
    [--model_dim=256 --layers=4 --heads=4 --time=1024 --window=128 --batch=8]
"""

from __future__ import annotations

import functools

import jax
from absl import flags

from configs import base
from experiments import common as commands
from experiments.benchmarks import common
from meta_attention_jax.training import build
from meta_attention_jax.training.step import init_state, train_step

JSON = commands.define_path("json", None, "Write the rows here.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved rounds.", 1)
SIZES = {
    name: flags.DEFINE_integer(name, default, "Size.", 1)
    for name, default in dict(model_dim=256, layers=4, heads=4, time=1024, window=128, batch=8).items()
}
ARMS = {"bayesian": "bayesian", "prior-free": "softmax", "full-only": "fixed"}


def step_of(controller: str):
    """A call that runs one training step of the arm."""
    size = {name: flag.value for name, flag in SIZES.items()}
    config = base.get_config()
    config.controller.name = controller
    config.data.sequence_length, config.data.batch_size = size["time"], size["batch"]
    config.model.model_dim, config.model.num_layers = size["model_dim"], size["layers"]
    config.model.num_heads = config.model.num_kv_heads = size["heads"]
    config.model.window = size["window"]
    config.parallel.devices = 1
    build.check(config)
    dataset = build.build_dataset(config)
    spec, hypers = build.build_spec(config, dataset), build.build_hypers(config)
    parallel = build.build_parallel(config)
    state = init_state(spec, jax.random.key(0), dataset.train_batch(0), hypers)
    step = parallel.compile(functools.partial(train_step, spec), batch_argument=1)
    return functools.partial(
        step, *parallel.place((state,)), parallel.shard(dataset.train_batch(0)),
        parallel.place(hypers),
    )


def main() -> None:
    with commands.user_mistakes():
        functions = {arm: step_of(controller) for arm, controller in ARMS.items()}
    seconds = common.interleave(functions, ROUNDS.value)
    size = {name: flag.value for name, flag in SIZES.items()}
    rows = [
        common.ratio_row("train step, bayesian / prior-free", seconds, "bayesian", "prior-free", **size),
        common.ratio_row("train step, bayesian / full-only", seconds, "bayesian", "full-only", **size),
    ]
    print(common.environment())
    print(common.markdown(rows))
    if JSON.value:
        common.write_json(JSON.value, rows)


if __name__ == "__main__":
    commands.run(main, prints=True)
