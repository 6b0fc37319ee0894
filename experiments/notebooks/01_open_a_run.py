# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Open a run
#
# A run directory is all one needs: config, parameters, tokenizer and metrics come out of it, on any
# machine, whatever trained it. This notebook opens the recall run of `make demo` if there is one, else
# it trains a small one. In `recall` a sequence binds keys to values (`k1=v2`), goes on
# with filler, and asks for a key (`?k1`): the next token is its value.

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

run = quick_run(ROOT / WORKDIR, ROOT / EXISTING, **{"train.steps": STEPS})
run

# %% [markdown]
# From now on `load_run(path)` is enough. It takes `step="best"` (lowest validation nats) or any saved step.

# %%
from meta_attention_jax import load_run

run = load_run(run.path, step="latest")
run.steps

# %% [markdown]
# What training logged is a pandas frame with a row per record. Validation is measured soft (every token mixes all
# mechanisms) and hard (one mechanism per token); `cost` is what the hard routes would cost, full attention being 1.

# %%
metrics = run.metrics
metrics[metrics["event"] == "eval"][["step", "soft/nll", "hard/nll", "hard/cost"]].tail()

# %% [markdown]
# ## Ask the model
# Logits of the token after each token. The question at the end should be answered by `v2`.

# %%
import numpy as np

text = "k1=v2 k0=v1 k2=v0 c0 c5 c10 c1 c6 c11 c0 c5 c10 ?k1"
logits = run.logits(text)
answer = run.tokenizer.decode([int(np.argmax(logits[-1]))]).decode()
print(logits.shape, answer)

# %%
print(run.generate(text, steps=8))

# %% [markdown]
# ## Where the tokens went
# One row per layer and token: the posterior's concentration `alpha`, its mean, the uncertainty, and the
# mechanism that served the token.

# %%
routes = run.routes(text).frame()
routes.drop(columns="hard").tail(5).round(2)

# %% [markdown]
# The same as coloured text. Orange is full attention, blue linear, yellow local. What to see: the question
# needs a binding further back than any window reaches, so one layer should serve it with full attention.

# %%
run.show(text)
