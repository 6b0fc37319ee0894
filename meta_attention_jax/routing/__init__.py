"""Routing: from a controller's `Routing` to the output of every token."""

from meta_attention_jax.routing.gate import GateSchedule, GateState, hard_tokens
from meta_attention_jax.routing.mixture import MODES, soft, token_weights

__all__ = ["MODES", "GateSchedule", "GateState", "hard_tokens", "soft", "token_weights"]
