# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A sweep of the prior's strength
#
# kappa, the prior's pseudo-counts, says how much evidence it takes to leave the cheap mechanisms. It is an
# array input of the training step, so all values train together as one compiled program.

# %% tags=["parameters"]
WORKDIR = "runs/notebooks/sweep"
STEPS = 200
STRENGTHS = (0.5, 4.0, 32.0)
SEEDS = (0, 1, 2)

# %%
import pathlib
import sys

ROOT = next(p for p in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents) if (p / "configs").is_dir())
sys.path.insert(0, str(ROOT))

# %% [markdown]
# Points are dicts of dotted overrides; `product`, `zipped` and `chain` combine them. On the command line
# `python -m experiments.sweep` does all of this, resumes, and trains groups of points on a Ray cluster, or one of them in
# an array job.

# %%
from configs import quick
from experiments.studies import outcome, sweeps
from meta_attention_jax.sweeps.space import configured, labels, product, sweep

points = product(sweep("prior.strength", STRENGTHS), sweep("seed", SEEDS))
names = labels(points)
names

# %%
base = quick.get_config()
base.train.steps = STEPS
root = ROOT / WORKDIR
configs = {name: configured(base, point) for name, point in zip(names, points)}
datasets = sweeps.open_datasets(configs.values())
sweeps.train_points(root, sweeps.prepared(root, configs, datasets))

# %% [markdown]
# ## The result
# Means over seeds on the validation split. The front joins what nothing beats in both cost and nats; the ring
# is the cheapest setting within 0.005 nats of the best. With three seeds the intervals are wide.

# %%
import pandas as pd

found = outcome.result(root, points)
pd.DataFrame(found.done)[["setting", "seeds", "nll_hard", "gap", "cost", "routing_entropy", "chosen"]].round(3)

# %%
figures = outcome.figures(found, "strength on quick recall")
figures["pareto"]

# %% [markdown]
# What strength does: a strong prior should make routes cheaper, and pull the posterior towards itself.

# %%
figures["against"]

# %% [markdown]
# Every point is an ordinary run.

# %%
from meta_attention_jax import load_run

load_run(root / "points" / names[-1])
