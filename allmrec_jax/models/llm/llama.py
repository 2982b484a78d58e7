"""The Llama family (Touvron et al. 2023) as a Flax NNX module: Llama, SmolLM2, TinyLlama, Mistral, Qwen2 and Qwen3.

Pre-norm blocks, RMS norm, rotary positions, grouped-query attention, SwiGLU, tied or untied output. Qwen2 adds biases
to q, k and v; Qwen3 a norm of each head's q and k; Mistral's first version a window that attention looks back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from allmrec_jax.errors import UserError
from allmrec_jax.models.llm import rotary
from allmrec_jax.models.llm.module import INIT, Block, LanguageModel, See, Stack, bias
from allmrec_jax.models.llm.quantize import einsum
from allmrec_jax.models.params import Parameter, constant


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama model, by the names of its `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    rope_scaling: rotary.Scaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    """Tokens that attention looks back, itself counted; None sees all."""

    @property
    def width(self) -> int:
        """h, the width of the token embedding."""
        return self.hidden_size

    @property
    def context(self) -> int:
        return self.max_position_embeddings


def describe(c: LlamaConfig) -> dict[str, Any]:
    """Every parameter of the model, layers stacked on axis 0."""
    h, f = c.hidden_size, c.intermediate_size
    n, g, k = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    stack = Stack(c.num_hidden_layers, "model.layers")
    layers = {
        "attention_norm": stack.vector("input_layernorm.weight", h, value=1.0),
        "q": stack.to_heads("self_attn.q_proj", h, n, k, "heads"),
        "k": stack.to_heads("self_attn.k_proj", h, g, k, "kv_heads"),
        "v": stack.to_heads("self_attn.v_proj", h, g, k, "kv_heads"),
        "o": stack.from_heads("self_attn.o_proj", h, n, k),
        "mlp_norm": stack.vector("post_attention_layernorm.weight", h, value=1.0),
        "gate": stack.matrix("mlp.gate_proj", (h, f), ("embed", "mlp")),
        "up": stack.matrix("mlp.up_proj", (h, f), ("embed", "mlp")),
        "down": stack.matrix("mlp.down_proj", (f, h), ("mlp", "embed")),
    }
    if c.qkv_bias:
        layers["q_bias"] = stack.head_bias("self_attn.q_proj", n, k, "heads")
        layers["k_bias"] = stack.head_bias("self_attn.k_proj", g, k, "kv_heads")
        layers["v_bias"] = stack.head_bias("self_attn.v_proj", g, k, "kv_heads")
    if c.o_bias:
        layers["o_bias"] = stack.vector("self_attn.o_proj.bias", h)
    if c.mlp_bias:
        layers["gate_bias"] = stack.vector("mlp.gate_proj.bias", f, "mlp")
        layers["up_bias"] = stack.vector("mlp.up_proj.bias", f, "mlp")
        layers["down_bias"] = stack.vector("mlp.down_proj.bias", h)
    if c.qk_norm:
        layers["q_norm"] = stack.vector("self_attn.q_norm.weight", k, axis="head_dim", value=1.0)
        layers["k_norm"] = stack.vector("self_attn.k_norm.weight", k, axis="head_dim", value=1.0)
    description = {
        "embed": Parameter((c.vocab_size, h), ("vocab", "embed"), INIT, "model.embed_tokens.weight"),
        "layers": layers,
        "norm": Parameter((h,), ("embed",), constant(1.0), "model.norm.weight"),
    }
    if not c.tie_word_embeddings:
        description["output"] = Parameter((c.vocab_size, h), ("vocab", "embed"), INIT, "lm_head.weight")
    return description


def rms_norm(x: Float[Array, "*batch h"], scale: Float[Array, " h"], eps: float) -> Float[Array, "*batch h"]:
    """x / sqrt(mean(x^2) + eps) * scale, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return jnp.einsum("...h,h->...h", x32.astype(x.dtype), scale)


class Llama(LanguageModel):
    """A frozen Llama."""

    describe = staticmethod(describe)

    @property
    def window(self) -> int | None:
        return self.config.sliding_window

    def block(self, positions: Int[Array, "batch time"]) -> Block:
        c = self.config
        frequency = rotary.frequencies(c.head_dim, c.rope_theta, c.rope_scaling)

        def dense(pattern: str, x: jax.Array, w: dict[str, Any], name: str) -> jax.Array:
            return bias(einsum(pattern, x, w[name]), w, f"{name}_bias")

        def turned(y: jax.Array, w: dict[str, Any], name: str) -> jax.Array:
            x = dense("bth,hnk->btnk", y, w, name)
            if c.qk_norm:
                x = rms_norm(x, w[f"{name}_norm"], c.rms_norm_eps)
            return rotary.rotate(x, positions, frequency)

        def block(x: jax.Array, w: dict[str, Any], see: See) -> jax.Array:
            y = rms_norm(x, w["attention_norm"], c.rms_norm_eps)
            q, k, v = turned(y, w, "q"), turned(y, w, "k"), dense("bth,hnk->btnk", y, w, "v")
            x = x + dense("btnk,nkh->bth", see(q, k, v), w, "o")
            y = rms_norm(x, w["mlp_norm"], c.rms_norm_eps)
            gated = jax.nn.silu(dense("bth,hf->btf", y, w, "gate")) * dense("bth,hf->btf", y, w, "up")
            return x + dense("btf,fh->bth", gated, w, "down")

        return block

    def leave(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, nnx.as_pure(self.weights)["norm"], self.config.rms_norm_eps)


def read_config(raw: Mapping[str, Any], source: str) -> LlamaConfig:
    """From the `config.json` of any of the family; what it leaves out has the default of its own architecture.

    Raises:
      UserError: for a variant that is not known.
      KeyError: for a size that is missing.
    """
    kind, heads, hidden = raw["architectures"][0], raw["num_attention_heads"], raw["hidden_size"]
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{source}: hidden_act is {raw['hidden_act']!r}, but only 'silu' is supported")
    kv_heads = raw.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UserError(f"{source}: {heads} heads cannot share {kv_heads} key-value heads evenly")
    base, scaling = rotary.read_scaling(raw, source)
    biased = bool(raw.get("attention_bias", False))
    context = raw.get("max_position_embeddings", 2048)
    window = raw.get("sliding_window", 4096 if kind == "MistralForCausalLM" else None)
    if kind in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        # A window in some layers only: without it the model is the same up to the window's length.
        if raw.get("use_sliding_window", False) and window:
            context = min(context, window)
        window = None
    elif kind == "LlamaForCausalLM":
        window = None
    return LlamaConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=hidden,
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=base,
        max_position_embeddings=context,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        rope_scaling=scaling,
        qkv_bias=kind == "Qwen2ForCausalLM" or biased,
        o_bias=biased,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=kind == "Qwen3ForCausalLM",
        sliding_window=window,
    )
