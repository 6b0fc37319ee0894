"""Everything a comparison says about one run, on one split."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from meta_attention_jax.analysis import statistics
from meta_attention_jax.data import recall
from meta_attention_jax.objective import summarise
from meta_attention_jax.training.evaluation import Evaluator, token_arrays
from meta_attention_jax.training.parallel import Parallel
from meta_attention_jax.training.run import Run

SAMPLES = (1, 4, 16)
TOKEN_BATCHES = 8


def scores(
    run: Run, split: str, *, max_batches: int, samples: tuple[int, ...] = SAMPLES
) -> dict[str, Any]:
    """Soft and hard nats, cost, entropies, what routes know of the kinds, ELBO and predictive nats.

    Routes, cost and entropies are those of the hard run. `truth` (corpora that know it): of the layer
    that finds the recall tokens best by AUROC.
    """
    parallel = Parallel("jit", jax.devices()[:1])
    evaluator = Evaluator(run.model, run.dataset, parallel)
    params, hypers = parallel.replicate((run.params, run.hypers.routing))
    mechanisms = tuple(run.config.model.mechanisms)
    results = {}
    for mode in ("soft", "hard"):
        sums = evaluator.sums(params, hypers, split=split, mode=mode, max_batches=max_batches)
        results[mode] = summarise(sums, mechanisms=mechanisms, costs=run.hypers.routing.costs)
    soft, hard = results["soft"], results["hard"]
    fixed = run.config.controller.name == "fixed"
    out = {
        "split": split,
        "step": run.step,
        "tokens": hard["tokens"],
        "nll_soft": soft["nll"],
        "nll_hard": hard["nll"],
        "gap": hard["nll"] - soft["nll"],
        "bits_per_byte": hard["bits_per_byte"],
        "cost": hard["cost"],
        "kl": soft["kl"],
        "routing_entropy": hard["routing_entropy"],
        "usage_entropy": hard["usage_entropy"],
        "diversity": hard["diversity"],
        "collapsed_layers": hard["collapsed_layers"],
        "fractions": [hard[f"fraction/{name}"] for name in mechanisms],
    }
    if "kinds" in hard:
        kinds = hard["kinds"]
        counts = np.asarray(kinds["fractions"]) * np.asarray(kinds["tokens"])[None, :, None]
        out["information"] = [statistics.mutual_information(layer) for layer in counts]
        out["accuracy"] = dict(zip(recall.KINDS, kinds["accuracy"]))
        out["accuracy_soft"] = dict(zip(recall.KINDS, soft["kinds"]["accuracy"]))
        costs = dict(zip(mechanisms, np.asarray(run.hypers.routing.costs).tolist()))
        if set(recall.TRUE_MECHANISMS) <= set(mechanisms):
            out["oracle_cost"] = statistics.oracle_cost(
                kinds["tokens"],
                [costs[name] for name in recall.TRUE_MECHANISMS[: len(kinds["tokens"])]],
                cheapest=min(costs.values()),
                layers=run.config.model.num_layers,
            )
            out["truth"] = truth(run, split)
    if not fixed:
        for count in samples:
            sampled = evaluator.sampled(
                params, hypers, split=split, samples=count, max_batches=max_batches
            )
            out[f"predictive_{count}"], out["elbo"] = sampled["predictive"], sampled["elbo"]
    return out


def truth(run: Run, split: str) -> dict[str, Any]:
    """Precision, recall and AUROC of full attention for the recall tokens, in the layer whose AUROC
    is largest, and the number of that layer."""
    arrays = token_arrays(
        run.model.clone(mode="hard"), run.dataset, run.params, run.hypers.routing,
        split=split, max_batches=TOKEN_BATCHES,
    )
    rows = statistics.routing_truth(
        arrays["mean"], arrays["route"], arrays["kind"],
        mechanism=run.config.model.mechanisms.index("full"), needed=recall.KIND_QUERY,
    )
    layer = int(np.argmax([row["auroc"] for row in rows]))
    return {"layer": layer, **rows[layer]}
