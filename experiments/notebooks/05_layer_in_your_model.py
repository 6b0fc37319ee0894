# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # The layer in your own model
#
# `MetaAttention` is a Linen module like any other: it takes the residual stream and returns the same shape.
# What it decided is sown as `("intermediates", "routing")`; the KL to the prior is yours to add to the loss.

# %% tags=["parameters"]
STEPS = 60

# %%
import pathlib
import sys

ROOT = next(p for p in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents) if (p / "configs").is_dir())
sys.path.insert(0, str(ROOT))

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from meta_attention_jax import AttentionSpec, MetaAttention


class TinyModel(nn.Module):
    vocab: int = 16

    @nn.compact
    def __call__(self, tokens, deterministic=True):
        x = nn.Embed(self.vocab, 32)(tokens)
        for _ in range(2):
            attention = MetaAttention(num_heads=2, spec=AttentionSpec(window=4), rotary=True)
            x = x + attention(nn.LayerNorm()(x), deterministic=deterministic)
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(self.vocab)(nn.LayerNorm()(x))


# %% [markdown]
# A copying task: the second half of a sequence repeats the first, so every token of it has to look back eight
# places, further than the window of four.

# %%
def batch(key):
    half = jax.random.randint(key, (32, 8), 0, 16)
    return jnp.concatenate([half, half], axis=1)


model = TinyModel()
tokens = batch(jax.random.key(0))
params = model.init(jax.random.key(1), tokens)["params"]
optimizer = optax.adam(1e-2)
BETA = 1e-3  # weight of the KL, per nat


def loss(params, tokens, key):
    logits, seen = model.apply(
        {"params": params}, tokens, deterministic=False, rngs={"routing": key}, mutable="intermediates"
    )
    nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, 7:-1], tokens[:, 8:]).mean()
    routings = jax.tree.leaves(seen, is_leaf=lambda x: hasattr(x, "kl"))
    return nll + BETA * sum(routing.kl.mean() for routing in routings), nll


@jax.jit
def step(params, state, key):
    data_key, routing_key = jax.random.split(key)
    gradient, nll = jax.grad(loss, has_aux=True)(params, batch(data_key), routing_key)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, nll


# %%
state = optimizer.init(params)
history = []
for number in range(STEPS):
    params, state, nll = step(params, state, jax.random.fold_in(jax.random.key(2), number))
    history.append(float(nll))
print(f"{history[0]:.2f} -> {history[-1]:.2f} nats; guessing is {float(jnp.log(16)):.2f}")

# %% [markdown]
# Where the trained layers send the second half. The mean weight on full and linear attention should have
# grown over the window's, which cannot reach the answer.

# %%
_, seen = model.apply({"params": params}, tokens, mutable="intermediates")
for routing in jax.tree.leaves(seen, is_leaf=lambda x: hasattr(x, "mean")):
    weights = routing.mean[:, 8:].mean(axis=(0, 1))
    print({name: f"{weight:.2f}" for name, weight in zip(("full", "linear", "local"), weights)})
