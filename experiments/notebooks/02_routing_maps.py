# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Routing maps
#
# Where do tokens go, by layer, by position, and by kind of token? And how did that come about?

# %% tags=["parameters"]
WORKDIR = "runs/notebooks/quick"
EXISTING = "runs/demo/recall-bayesian"
STEPS = 200

# %%
import pathlib
import sys

ROOT = next(p for p in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents) if (p / "configs").is_dir())
sys.path.insert(0, str(ROOT))

# %%
from experiments.studies.quick import quick_run
from meta_attention_jax import analysis
from meta_attention_jax.data import recall
from meta_attention_jax.training.logs import read_metrics

run = quick_run(ROOT / WORKDIR, ROOT / EXISTING, **{"train.steps": STEPS})

# %% [markdown]
# ## Over training
# On the left the shares of the mechanisms, on the right the cost of those routes. Look for two things:
# full attention appears when the model discovers that looking back pays (the loss in the middle falls at the
# same steps), and the loss must not jump when tokens turn hard.

# %%
analysis.dynamics_figure(read_metrics(run.path), run.mechanisms)

# %% [markdown]
# ## By layer and position
# One validation batch, hard. `kind` says which tokens are questions.

# %%
batch, routing = run.routed_batch("validation", mode="hard")
analysis.routing_by_position(routing.route, batch.segment_ids > 0, run.mechanisms)

# %% [markdown]
# ## By kind of token
# Questions need full attention in one layer; nothing else does. A perfect router has 100 % and 0 % in
# one row.

# %%
import pandas as pd

full = routing.route == run.mechanisms.index("full")
asked = batch.kind == recall.KIND_QUERY
pd.DataFrame({
    "questions on full": full[:, asked].mean(axis=1),
    "other tokens on full": full[:, ~asked].mean(axis=1),
}).rename_axis("layer").round(3)

# %% [markdown]
# ## As text
# One sequence, all layers. Deep colour is certain, pale is uncertain; hover for the numbers.

# %%
run.show(batch.tokens[0])
