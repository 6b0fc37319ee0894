# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Uncertainty
#
# The controller's answer is a distribution over routing weights, not a point. What does its spread mean, and
# does it find the tokens that suffer when they are limited to one mechanism?

# %% tags=["parameters"]
WORKDIR = "runs/notebooks/soft"
STEPS = 200

# %%
import pathlib
import sys

ROOT = next(p for p in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents) if (p / "configs").is_dir())
sys.path.insert(0, str(ROOT))

# %% [markdown]
# The question is about a model that was trained soft, so this run keeps its gate closed: no token is hardened
# in training.

# %%
from experiments.studies.quick import quick_run
from meta_attention_jax import analysis
from meta_attention_jax.analysis.statistics import risk_coverage
from meta_attention_jax.training.evaluation import token_arrays

run = quick_run(ROOT / WORKDIR, **{"train.steps": STEPS, "gate.kind": "none"})


# %%
def arrays(mode, measure="entropy"):
    model = run.model.clone(mode=mode).routed_by(uncertainty=measure)
    return token_arrays(model, run.dataset, run.params, run.hypers.routing, split="validation", max_batches=4)


soft, hard = arrays("soft"), arrays("hard")

# %% [markdown]
# ## The posterior of every token
# Each mark is the mean of a token's Dirichlet posterior. Tokens that share a place share a kind.

# %%
import numpy as np

from meta_attention_jax.controller.prior import make_prior

prior = np.asarray(make_prior(run.config.prior.family, run.hypers.routing).concentration)
analysis.simplex_figure(soft["mean"], run.mechanisms, prior=prior / prior.sum())

# %% [markdown]
# ## Two kinds of entropy
# *Aleatoric*: the posterior is sure that the token wants a mixture. *Epistemic*: the posterior itself is wide.
# With few pseudo-counts in the prior both are there; a larger `prior.strength` leaves the first.

# %%
analysis.entropy_split_figure(soft["concentration"], run.mechanisms)

# %% [markdown]
# ## Risk and coverage
# Harm of a token: its nats with all tokens hard less its nats with all tokens soft. Tokens are hardened in order
# of rising uncertainty; a measure that knows where it hurts keeps its line below the dotted one until the end.

# %%
harm = hard["nll"] - soft["nll"]
curves = {
    measure: risk_coverage(arrays("soft", measure)["uncertainty"].mean(0), harm)
    for measure in ("entropy", "mutual_information", "vacuity")
}
analysis.risk_coverage_figure(curves)

# %%
{measure: round(curve["gain"], 3) for measure, curve in curves.items()}
