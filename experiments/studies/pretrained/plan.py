"""The protocol of the comparison, fixed before it was run, and what it costs.

Time on two cores, budget 12 hours: a reading of one window of 512 tokens takes about 1.05 s (0.68 s of it products with
the model's weights, at the speed of these), a training step through the whole model 3.5 s.

| part | what | readings or steps | hours |
|---|---|---|---|
| streams | 100 training windows, twice | 200 | 0.1 |
| local | 5 arms x 4 settings x 3 seeds, one program per kind of controller | 300 steps | 0.3 |
| end to end | 2 arms x 2 settings (seed 0), then 2 more seeds of the better one, 250 steps each | 2,000 steps | 2.0 |
| thresholds | three readings of six validation windows each | 600 | 0.2 |
| readings, three main kinds | 47 of each of 300 windows | 14,100 | 4.1 |
| readings, code and 4 needles | 16 of each of 200 windows | 3,200 | 0.9 |
| uncertainty, shift, scarce data | | | 1.0 |
| T 1,024 and 4,096 | the three best, 50 and 20 windows | | 1.5 |
| a second model | | | 1.5 |

Cut to fit, in the order asked for: shares of 10 and 50 % but for the fixed patterns (50 % is what they are compared
at), 16 needles, code and 4 needles but for the arms that matter there. The seeds of routers trained by the local ELBO
take turns over the windows (every window is read by one seed of each); those trained end to end read them all.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from configs import retrofit_smollm2
from experiments.studies.pretrained.local import Point

COSTS = (1.0, 0.15)  # Of full attention and of a window, the paper's.
SEEDS = (0, 1, 2)
MAIN = ("prose", "repeat", "lookup1")
FURTHER = ("code", "lookup4")
KINDS = MAIN + FURTHER
AT_FURTHER = (
    "full", "local", "oracle@0.3", "best layers@0.3", "best layers@0.5", "KV heads@0.3", "KV heads@0.5",
    "local cost_penalty@0.3", "local bayesian@0.3", "cost_penalty@0.3", "bayesian@0.3", "bayesian shuffled@0.3",
)
"""Arms that read code and 4 needles."""
CALIBRATED_ON = MAIN  # In equal parts: one threshold for all kinds of text.

LOCAL_STEPS = 300
TRAINING_WINDOWS, VALIDATION_WINDOWS = 100, 20
CHOSEN_AT = (0.2, 0.3)  # Shares at which a setting is judged, by the harm that is left on validation.

PATTERN_SHARES = (0.2, 0.3, 0.5)
SCORED_SHARES = (0.2, 0.3)
SHARES_OF = {"bayesian": (0.3, 0.2), "cost_penalty": (0.3, 0.2)}  # Of routers trained locally; others (0.3,).
ARMS = ("softmax", "cost_penalty", "bayesian_mean", "bayesian_beta0", "bayesian")
ROUTER = {"bayesian_beta0": "bayesian"}  # The controller of an arm, where it has another name.


LENGTH, WINDOW = 512, 64


def config(backbone: str, length: int = LENGTH, window: int = WINDOW) -> ConfigDict:
    """What is routed, and how; 4 sinks."""
    made = retrofit_smollm2.get_config()
    made.retrofit.backbone = backbone
    made.data.sequence_length, made.model.window = length, window
    made.prior.costs = ",".join(f"{cost:g}" for cost in COSTS)
    return made


def grid() -> list[Point]:
    """Every setting of every arm, with every seed: four settings each."""
    settings = {
        "softmax": [dict(learning_rate=rate) for rate in (3e-4, 1e-3, 3e-3, 1e-2)],
        "cost_penalty": [dict(beta=beta) for beta in (0.1, 0.3, 1.0, 3.0)],
        "bayesian_mean": [dict(beta=0.03), dict(beta=0.1), dict(beta=0.3), dict(beta=0.1, strength=8.0)],
        "bayesian_beta0": [*(dict(learning_rate=rate) for rate in (1e-3, 3e-3, 1e-2)), dict(strength=8.0)],
        "bayesian": [dict(beta=0.03), dict(beta=0.1), dict(beta=0.3), dict(beta=0.1, strength=8.0)],
    }
    return [
        Point(arm, ROUTER.get(arm, arm), seed=seed, **setting)
        for arm in ARMS for setting in settings[arm] for seed in SEEDS
    ]


END_TO_END = {"bayesian": (0.001, 0.003), "cost_penalty": (0.003, 0.008)}
"""Arms that go on through the whole model, with two weights of KL or penalty each, from the local solution of their
seed. The weights are of the size that worked in the first trials of each."""
END_TO_END_STEPS, END_TO_END_RATE, EVERY = 250, 1e-3, 50
CHOOSING_WINDOWS = 8  # Of every main kind, on validation.


def wanted(kind: str, arm: str) -> bool:
    """Whether an arm reads a kind of text."""
    return kind in MAIN or arm in AT_FURTHER or " of prose " in arm


def setting(point: Point) -> dict[str, object]:
    """What a point is but for its seed."""
    return {key: value for key, value in dataclasses.asdict(point).items() if key != "seed"}
