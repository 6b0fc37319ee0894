"""The authors' own test, and longer texts than the controllers were trained on: at T 1,024 and 4,096, at the prices
that were found at T 512, what do routes cost in nats, and what do they save of the attention FLOPs that are executed?

python -m experiments.studies.pretrained.compare --parts=long --length=4096 --window=256 --windows=20

Their goal: at least 30 % fewer executed at 4k tokens or more, at most 0.5 nats lost; ours: at most 0.05.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies.pretrained import arms, doubt, plan, routers
from experiments.studies.pretrained.arms import FULL, LOCAL, Read
from experiments.studies.pretrained.material import Window
from experiments.studies.pretrained.study import Job, Study
from meta_attention_jax.fields import expect
from meta_attention_jax.model import ModelConfig
from meta_attention_jax.routing.accounting import count_layers

SHARES = (0.3, 0.2)


def executed(config: ModelConfig, read: Read) -> dict[str, Any]:
    """What a row says besides: attention FLOPs that packed dispatch executes for these routes, over those of full
    attention everywhere."""
    expect(read.full.dtype == bool, "read", "whole layers, or tokens of them", "heads")
    flops = jax.device_get(_count(config, jnp.asarray(np.where(read.full, FULL, LOCAL)[:, None], jnp.int32)))
    return {"flops": round(float(flops.executed_packed / flops.full_only), 5)}


@functools.partial(jax.jit, static_argnums=0)
def _count(config: ModelConfig, routes: Any) -> Any:
    return count_layers(routes, config).flops


def check(study: Study) -> None:
    """Raises ValueError where there is nothing to go by yet."""
    there = {"grid", "layers"} <= study.base.record.choices.keys()
    expect(there, "parts", "routers and patterns before long", "long alone")


def read_all(study: Study, count: int) -> None:
    """Full attention, the window, the best layers and every router that is there, its seeds in turn."""
    check(study)
    choices = study.base.record.choices
    known = doubt.routed_arms(study.base)
    reader, order = study.reader, choices["layers"]

    def jobs(window: Window) -> list[Job]:
        time = len(window.tokens)
        every = np.ones((reader.layers, time), bool)
        found: list[Job] = [
            ("full", -1, 1.0, lambda w: reader.forced(w, every)),
            ("local", -1, 0.0, lambda w: reader.forced(w, ~every)),
        ]
        turn = window.turn(len(study.base.seeds))
        for share in SHARES:
            best = arms.layer_mask(reader.layers, order[window.kind][: round(share * reader.layers)], time)
            found.append((f"best layers@{share}", -1, share, lambda w, best=best: reader.forced(w, best)))
        for (arm, seed, share), one in known.items():
            if seed == turn:
                price = doubt.price(study.base, arm, seed, one, share)
                found.append((f"{arm}@{share}", seed, share, routers.reading(study, one, price)))
        return found

    study.read(plan.MAIN, count, jobs, functools.partial(executed, reader.model.config))
