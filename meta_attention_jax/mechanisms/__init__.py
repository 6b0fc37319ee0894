"""Full, linear and local attention as pure functions, a registry, and thin modules."""

from meta_attention_jax.mechanisms.blocks import validate_qkv
from meta_attention_jax.mechanisms.modules import Attention, Projections
from meta_attention_jax.mechanisms.registry import (
    Mechanism,
    attend_with,
    get_mechanism,
    register_mechanism,
)
from meta_attention_jax.mechanisms.rotary import rotate

__all__ = [
    "Attention",
    "Mechanism",
    "Projections",
    "attend_with",
    "get_mechanism",
    "register_mechanism",
    "rotate",
    "validate_qkv",
]
