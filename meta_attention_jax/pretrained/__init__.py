"""Published language models: read from safetensors or GGUF, routed, written back."""

from meta_attention_jax.pretrained.read import load
from meta_attention_jax.pretrained.write import save

__all__ = ["load", "save"]
