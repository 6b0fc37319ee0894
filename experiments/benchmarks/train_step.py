"""What does a training step of Bayesian routing cost against the prior-free router and full-only?

python -m experiments.benchmarks.train_step [--json=FILE] [--rounds=5]
    [--model_dim=256 --layers=4 --heads=4 --time=1024 --window=128 --batch=8]
"""

from __future__ import annotations

import functools

import jax
from absl import flags

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


def step_of(controller: str, size: dict[str, int]):
    """A call that runs one training step of the arm."""
    config = common.sized_config(**size)
    config.controller.name = controller
    build.check(config)
    dataset = build.build_dataset(config)
    spec, hypers = build.build_spec(config, dataset), build.build_hypers(config)
    parallel = build.build_parallel(config)
    state = init_state(spec, jax.random.key(0), dataset.train_batch(0), hypers)
    step = parallel.compile(functools.partial(train_step, spec), batch_argument=1)
    state, hypers = parallel.place((state, hypers))
    return functools.partial(step, state, parallel.shard(dataset.train_batch(0)), hypers)


def main() -> None:
    size = {name: flag.value for name, flag in SIZES.items()}
    with commands.user_mistakes():
        functions = {arm: step_of(controller, size) for arm, controller in ARMS.items()}
    seconds = common.interleave(functions, ROUNDS.value)
    rows = [common.ratio_row(f"train step, bayesian / {other}", seconds, "bayesian", other, **size)
            for other in ("prior-free", "full-only")]
    common.tell([rows], JSON.value)


if __name__ == "__main__":
    commands.run(main, prints=True)
