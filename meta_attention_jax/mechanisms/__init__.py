"""Full, linear and local attention as pure functions, a file each, and their registry."""

from meta_attention_jax.mechanisms.blocks import validate_qkv
from meta_attention_jax.mechanisms.mechanism import Mechanism
from meta_attention_jax.mechanisms.registry import attend, get_mechanism, register_mechanism
from meta_attention_jax.mechanisms.rotary import rotate

__all__ = [
    "Mechanism",
    "attend",
    "get_mechanism",
    "register_mechanism",
    "rotate",
    "validate_qkv",
]
