"""Everything a comparison says about one run, on one split."""

from __future__ import annotations

from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from meta_attention_jax import analysis
from meta_attention_jax.analysis import statistics
from meta_attention_jax.data import recall
from meta_attention_jax.files import Place
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run
from meta_attention_jax.training.evaluation import Evaluator, token_arrays
from meta_attention_jax.training.parallel import Parallel

SAMPLES = (1, 4, 16)
SAMPLED = ("bayesian", "gumbel")
"""Controllers whose training mixes by samples; the ELBO is that of the first alone."""

TOKEN_BATCHES = 8


def scores(run: Run, split: str, *, max_batches: int, samples: tuple[int, ...] = SAMPLES) -> dict[str, Any]:
    """Soft and hard nats, cost, entropies, what routes know of the kinds, ELBO and predictive nats.

    Routes, cost and entropies are those of the hard run. `truth` (corpora that know it): how full attention meets the
    recall tokens, by layer; `truth_layer` is the one that does the recall, by the validation split.
    """
    soft, hard = (run.evaluate(split, mode=mode, max_batches=max_batches) for mode in ("soft", "hard"))
    mechanisms, name = run.mechanisms, run.config.controller.name
    out = {
        "split": split, "step": run.step, "tokens": hard["tokens"],
        "nll_soft": soft["nll"], "nll_hard": hard["nll"], "gap": hard["nll"] - soft["nll"],
        "bits_per_byte": hard["bits_per_byte"], "cost": hard["cost"], "kl": soft["kl"],
        **{key: hard[key] for key in ("routing_entropy", "usage_entropy", "diversity", "collapsed_layers")},
        "fractions": [hard[f"fraction/{name}"] for name in mechanisms],
    }
    if "kinds" in hard:
        kinds = hard["kinds"]
        counts = np.asarray(kinds["fractions"]) * np.asarray(kinds["tokens"])[None, :, None]
        out["information"] = [statistics.mutual_information(layer) for layer in counts]
        out["accuracy"] = dict(zip(run.dataset.kinds, kinds["accuracy"]))
        out["accuracy_soft"] = dict(zip(run.dataset.kinds, soft["kinds"]["accuracy"]))
        costs = dict(zip(mechanisms, np.asarray(run.hypers.routing.costs).tolist()))
        least = min(costs.values())
        if run.dataset.kinds == recall.KINDS and {"full", "linear", "local"} <= set(costs):
            out["oracle_cost"] = statistics.oracle_cost(
                kinds["tokens"],
                [least if true is None else costs[true] for true in recall.TRUE_MECHANISMS],
                cheapest=least,
                layers=run.config.model.num_layers,
            )
        if "full" in costs and "recall" in run.dataset.kinds:
            out["truth"] = truth(run, split)
            before = truth(run, "validation")
            out["truth_layer"] = int(np.argmax([row["recall"] - row["other"] for row in before]))
    if name in SAMPLED:
        evaluator = Evaluator(run.model, run.dataset, Parallel("jit", jax.local_devices()[:1]))
        params, hypers = evaluator.parallel.place((run.params, run.hypers.routing))
        for count in samples:
            sampled = evaluator.sampled(params, hypers, split=split, samples=count, max_batches=max_batches)
            out[f"predictive_{count}"] = sampled["predictive"]
            if name == SAMPLED[0]:
                out["elbo"] = sampled["elbo"]
    return out


def measure(path: Place, config: ConfigDict, *, max_batches: int, step: str | int = "latest") -> None:
    """`test.json` of a finished run, once; its data are where `config` says."""
    if not (path / "test.json").exists():
        run = load_run(path, step=step, corpus=config.data.corpus, data_split=config.data.split)
        analysis.write_json(path / "test.json", scores(run, "test", max_batches=max_batches))


def truth(run: Run, split: str) -> list[dict[str, float]]:
    """`statistics.routing_truth` of full attention and the recall tokens, by layer."""
    found = per_token(run, split, mode="hard", max_batches=TOKEN_BATCHES)
    full = run.mechanisms.index("full")
    return statistics.routing_truth(
        found["mean"], found["route"], found["kind"], mechanism=full, needed=recall.KIND_QUERY
    )


def per_token(
    run: Run, split: str, *, mode: str, max_batches: int, measure: Optional[str] = None, theta: Optional[float] = None
) -> dict[str, np.ndarray]:
    """`token_arrays` of a run in a mode, with u by another measure or at another theta than its own."""
    model, hypers = run.model.clone(mode=mode), run.hypers.routing
    model = model if measure is None else model.routed_by(uncertainty=measure)
    hypers = hypers if theta is None else hypers.replace(threshold=jnp.float32(theta))
    return token_arrays(model, run.dataset, run.params, hypers, split=split, max_batches=max_batches)
