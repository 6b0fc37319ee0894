"""Meta-Attention in JAX/Flax: a Bayesian controller routes every token to the attention it needs."""

from meta_attention_jax.controller import sample_dirichlet
from meta_attention_jax.generation import Sampler, generate, greedy
from meta_attention_jax.layer import MetaAttention
from meta_attention_jax.mechanisms.registry import Mechanism, get_mechanism, register_mechanism
from meta_attention_jax.model import LanguageModel
from meta_attention_jax.types import Batch, Routing, RoutingHypers

__all__ = [
    "Batch",
    "LanguageModel",
    "Mechanism",
    "MetaAttention",
    "Routing",
    "RoutingHypers",
    "Sampler",
    "generate",
    "get_mechanism",
    "greedy",
    "register_mechanism",
    "sample_dirichlet",
]
