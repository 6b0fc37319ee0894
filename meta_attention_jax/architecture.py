"""What a language model is."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import jax.numpy as jnp

from meta_attention_jax.fields import expect, real, whole
from meta_attention_jax.types import AttentionSpec, Rope, Router, at_least, expect_record, positive

ACTIVATIONS = ("silu", "gelu")
BIASES = ("qkv", "out", "mlp")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a language model is; static, and handed on whole.

    Attributes:
      vocab_size, model_dim, num_layers, num_heads: V, D, L, H.
      num_kv_heads: G, a divisor of H; None for H.
      qkv_features: H d; None means D.
      mlp_dim: F of the gated MLP; None means 8 D / 3 rounded up to a multiple of 32.
      activation: of the MLP's gate; "gelu" by tanh.
      biases: which products have one, of BIASES.
      qk_norm: RMS norms of every query and key head, before they are turned.
      post_norms: RMS norms also of what attention and MLP add to the stream.
      attention_scale: of q . k; None means d^-1/2.
      windows: window of each layer that is a window by nature and is never routed, in tokens; None for the others. ()
        for all.
      window_rope: of those layers; None means `rope`.
      embedding_scale: of the input; None means D^1/2.
      tied: whether the embedding gives the logits too.
      logit_softcap: c: logits z become c tanh(z / c); None leaves them.
      context: tokens that the model was made for; None does not say.
      adapter_rank: r of low-rank adapters beside every projection of attention; 0: there are none.
      attention: who may attend to whom.
      router: who chooses.
      scan_layers: compile one layer and loop over L of them.
      remat: recompute each layer in the backward pass.
      dtype: of the computation; None infers it. Softmax, linear state and routing stay float32.
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: Optional[int] = None
    qkv_features: Optional[int] = None
    mlp_dim: Optional[int] = None
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    post_norms: bool = False
    norm_epsilon: float = 1e-6
    attention_scale: Optional[float] = None
    rope: Rope = Rope()
    windows: tuple[Optional[int], ...] = ()
    window_rope: Optional[Rope] = None
    embedding_scale: Optional[float] = None
    tied: bool = True
    logit_softcap: Optional[float] = None
    context: Optional[int] = None
    adapter_rank: int = 0
    attention: AttentionSpec = AttentionSpec(window=128)
    router: Router = Router()
    scan_layers: bool = False
    remat: bool = False
    dtype: Optional[Any] = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        expect_record("attention", self.attention, AttentionSpec)
        expect_record("router", self.router, Router)
        for name in ("vocab_size", "model_dim", "num_layers", "num_heads"):
            at_least(self, 1, name)
        for name in ("num_kv_heads", "qkv_features", "mlp_dim", "context"):
            at_least(self, 1, name, optional=True)
        at_least(self, 0, "adapter_rank")
        expect(self.activation in ACTIVATIONS, "activation", f"one of {ACTIVATIONS}", self.activation)
        for name in ("attention_scale", "embedding_scale", "logit_softcap"):
            positive(self, name)
        expect(real("norm_epsilon", self.norm_epsilon) >= 0, "norm_epsilon", "a number >= 0", self.norm_epsilon)
        expect_record("rope", self.rope, Rope)
        expect_record("window_rope", self.window_rope or self.rope, Rope)
        expect(set(self.biases) <= set(BIASES), "biases", f"some of {BIASES}", self.biases)
        expect(len(self.windows) in (0, self.num_layers), "windows", f"none or {self.num_layers}", self.windows)
        for window in self.windows:
            expect(window is None or whole("windows", window) > 0, "windows", "None or tokens > 0", window)
        expect(not self.windows or None in self.windows, "windows", "None for some layer", self.windows)

    @property
    def routed(self) -> tuple[int, ...]:
        """The layers that have a router: those that are no window by nature."""
        return tuple(i for i in range(self.num_layers) if not self.windows or self.windows[i] is None)

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        """d."""
        return (self.qkv_features or self.model_dim) // self.num_heads

    @property
    def mlp_width(self) -> int:
        """F."""
        return self.mlp_dim or -(-self.model_dim * 8 // 3 // 32) * 32
