"""Meta-Attention in JAX/Flax: a Bayesian controller routes every token to the attention it needs."""

from meta_attention_jax.architecture import ModelConfig
from meta_attention_jax.controller.sampling import sample_dirichlet
from meta_attention_jax.generation import Sampler, generate, greedy
from meta_attention_jax.layer import MetaAttention
from meta_attention_jax.mechanisms.mechanism import Mechanism
from meta_attention_jax.mechanisms.registry import get_mechanism, register_mechanism
from meta_attention_jax.model import LanguageModel
from meta_attention_jax.types import AttentionSpec, Batch, Router, Routing, RoutingHypers


def __getattr__(name: str):
    """`load_run` on demand: it needs the libraries of training, the layer alone does not."""
    if name == "load_run":
        from meta_attention_jax.runs import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AttentionSpec",
    "Batch",
    "LanguageModel",
    "Mechanism",
    "MetaAttention",
    "ModelConfig",
    "Router",
    "Routing",
    "RoutingHypers",
    "Sampler",
    "generate",
    "get_mechanism",
    "greedy",
    "load_run",
    "register_mechanism",
    "sample_dirichlet",
]
