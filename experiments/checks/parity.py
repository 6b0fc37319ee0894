"""Are published families what `transformers` makes of them? Small random models, all layers full attention.

python -m experiments.checks.parity [--json=...] [--fixtures=tests/data/pretrained]

For every row a model is made by `transformers` (extra `parity`: torch, CPU), saved, and read by `pretrained.load`:
logits by norm, 50 greedy tokens of its `generate` against prefill and decode here, and the logits of what
`pretrained.save` wrote, opened by `transformers` again. `--fixtures` writes models of some 50 KB (bfloat16) with their
logits and greedy tokens, which the tests read without torch.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common as commands
from experiments.benchmarks import common
from meta_attention_jax import LanguageModel, RoutingHypers, pretrained
from meta_attention_jax.generation import generate

FIXTURES = commands.define_path("fixtures", None, "Folder for the small models and what they answer.")
JSON = commands.define_path("json", None, "Write the rows here.")
KEPT = ("config.json", "model.safetensors", "reference.npz")

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3, pad_token_id=0,
    bos_token_id=1, eos_token_id=None,
)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
PLAIN, FAR = dict(rope_type="default", rope_theta=1e4), dict(rope_type="linear", rope_theta=1e6, factor=8.0)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", dict(num_key_value_heads=4, tie_word_embeddings=False)),
    "llama3": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True, head_dim=16, rope_parameters=LLAMA3)),
    "llama_linear": ("LlamaConfig", dict(rope_parameters=FAR)),
    "smollm2": ("LlamaConfig", dict(tie_word_embeddings=True, rope_parameters=PLAIN | {"rope_theta": 1e5})),
    "mistral": ("MistralConfig", dict(sliding_window=None)),
    "qwen2": ("Qwen2Config", dict(tie_word_embeddings=True)),
    "qwen2_window": ("Qwen2Config", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen3": ("Qwen3Config", dict(head_dim=16, rope_parameters=YARN)),
    "gemma2": ("Gemma2Config", dict(sliding_window=8, query_pre_attn_scalar=24, final_logit_softcapping=30.0,
                                    attn_logit_softcapping=5.0)),
    "gemma3": ("Gemma3TextConfig", dict(
        sliding_window=8, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": PLAIN, "full_attention": FAR})),
}
UNROUTED = RoutingHypers(
    strength=np.float32(1), preference=np.float32(0.1), costs=np.ones(1, np.float32), threshold=np.float32(0)
)


def make(name: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Saves a random model, in bfloat16, and returns what it says in float32 of some tokens."""
    import torch
    import transformers

    kind, changes = MODELS[name]
    config = getattr(transformers, kind)(**{**SIZES, **changes})
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if value.ndim == 1:  # Norms and biases, which start alike.
                value.add_(0.2 * torch.randn_like(value))
    model.to(torch.bfloat16).save_pretrained(folder)
    model = opened(folder)  # Casts have rounded the frequencies of positions, which are no parameters.
    tokens = torch.randint(2, SIZES["vocab_size"], (2, 40))
    with torch.no_grad():
        logits = model(tokens).logits
        greedy = model.generate(tokens[:, :20], max_new_tokens=50, do_sample=False, pad_token_id=0)[:, 20:]
    return {"tokens": tokens.numpy(), "logits": logits.numpy(), "greedy": greedy.numpy()}


def opened(folder: pathlib.Path) -> Any:
    """The model of a folder in float32, by `transformers`."""
    import torch
    import transformers

    kinds = dict(dtype=torch.float32, attn_implementation="eager")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kinds).eval()


def reopened(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of a folder by `transformers`."""
    import torch

    with torch.no_grad():
        return opened(folder)(torch.as_tensor(tokens)).logits.numpy()


def answers(folder: pathlib.Path, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits and 50 greedy tokens behind the first 20 of a folder's model, by this package."""
    config, params, _ = pretrained.load(folder)
    model = LanguageModel(config)
    apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens, hypers=UNROUTED).logits)
    text = generate(model, params, [list(row[:20]) for row in tokens], steps=50, hypers=UNROUTED)
    return np.asarray(apply(params, jnp.asarray(tokens, jnp.int32))), np.asarray(text.tokens)


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """||ours - theirs|| / ||theirs||."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def measure(name: str, folder: pathlib.Path) -> dict[str, Any]:
    """One row of the table; the model and what it answers stay in `folder`."""
    reference = make(name, folder)
    logits, greedy = answers(folder, reference["tokens"])
    config, params, _ = pretrained.load(folder)
    again = folder.with_name(f"{folder.name}-again")
    pretrained.save(again, config, params, source=folder)
    np.savez_compressed(folder / "reference.npz", **reference)
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in ("transformers", "torch")}
    return versions | {
        "model": name,
        "logits": distance(logits, reference["logits"]),
        "greedy tokens": f"{int((greedy == reference['greedy']).sum())} of {greedy.size}",
        "logits, saved again": distance(reopened(again, reference["tokens"]), reference["logits"]),
    }


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as made:
        for name in MODELS:
            rows.append(measure(name, pathlib.Path(made) / name))
        if FIXTURES.value:
            for name in MODELS:
                (pathlib.Path(FIXTURES.value) / name).mkdir(parents=True, exist_ok=True)
                for file in KEPT:
                    shutil.copy(pathlib.Path(made) / name / file, pathlib.Path(FIXTURES.value) / name / file)
    common.tell([rows], JSON.value)


if __name__ == "__main__":
    commands.run(main, prints=True)
