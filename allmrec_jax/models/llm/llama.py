"""The Llama architecture (Touvron et al. 2023) as a Flax NNX module: SmolLM2 and its relatives.

Pre-norm blocks, RMS norm, rotary positions, grouped-query attention, SwiGLU, no biases, tied or untied output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from allmrec_jax.models import params
from allmrec_jax.models.llm import attention
from allmrec_jax.models.params import Parameter, constant, normal


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


def describe(c: LlamaConfig) -> dict[str, Any]:
    """Every parameter of the model, layers stacked on axis 0."""
    L, h, f = c.num_hidden_layers, c.hidden_size, c.intermediate_size
    n, g, k = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    init = normal(0.02)

    def heads(count: int, axis: str, name: str) -> Parameter:
        return Parameter(
            (L, h, count, k),
            ("layer", "embed", axis, None),
            init,
            f"model.layers.{{layer}}.self_attn.{name}.weight",
            "(n k) h -> h n k",
            {"n": count, "k": k},
        )

    def norm(name: str) -> Parameter:
        return Parameter((L, h), ("layer", "embed"), constant(1.0), f"model.layers.{{layer}}.{name}.weight")

    def dense(shape: tuple[int, int], axes: tuple[str, str], name: str) -> Parameter:
        return Parameter((L, *shape), ("layer", *axes), init, f"model.layers.{{layer}}.mlp.{name}.weight", "o i -> i o")

    description = {
        "embed": Parameter((c.vocab_size, h), ("vocab", "embed"), init, "model.embed_tokens.weight"),
        "layers": {
            "attention_norm": norm("input_layernorm"),
            "q": heads(n, "heads", "q_proj"),
            "k": heads(g, "kv_heads", "k_proj"),
            "v": heads(g, "kv_heads", "v_proj"),
            "o": Parameter(
                (L, n, k, h),
                ("layer", "heads", None, "embed"),
                init,
                "model.layers.{layer}.self_attn.o_proj.weight",
                "h (n k) -> n k h",
                {"n": n, "k": k},
            ),
            "mlp_norm": norm("post_attention_layernorm"),
            "gate": dense((h, f), ("embed", "mlp"), "gate_proj"),
            "up": dense((h, f), ("embed", "mlp"), "up_proj"),
            "down": dense((f, h), ("mlp", "embed"), "down_proj"),
        },
        "norm": Parameter((h,), ("embed",), constant(1.0), "model.norm.weight"),
    }
    if not c.tie_word_embeddings:
        description["output"] = Parameter((c.vocab_size, h), ("vocab", "embed"), init, "lm_head.weight")
    return description


def rms_norm(x: Float[Array, "*batch h"], scale: Float[Array, " h"], eps: float) -> Float[Array, "*batch h"]:
    """x / sqrt(mean(x^2) + eps) * scale, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return jnp.einsum("...h,h->...h", x32.astype(x.dtype), scale)


class Llama(nnx.Module):
    """A frozen Llama: token embedding, blocks and output are separate so that embeddings can be injected between."""

    def __init__(self, config: LlamaConfig, key: jax.Array, dtype: Any = jnp.float32):
        self.config = config
        self.weights = nnx.data(jax.tree.map(nnx.Param, params.init(key, describe(config), dtype)))

    def embed(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time h"]:
        """Token embeddings; ids outside the vocabulary are clipped, so injection slots may hold any id."""
        return jnp.take(nnx.as_pure(self.weights)["embed"], tokens, axis=0, mode="clip")

    def __call__(
        self,
        embeddings: Float[Array, "batch time h"],
        branch: Int[Array, "batch time"],
        *,
        remat: Callable | None = None,
    ) -> Float[Array, "batch time h"]:
        """Hidden states after the last norm.

        Args:
          embeddings: token embeddings with whatever was injected.
          branch: 0 prompt, 1.. branches, -1 padding (see `attention.branch_mask`).
          remat: a `jax.checkpoint` policy for the backward pass of each layer; None keeps all activations.
        """
        c, weights = self.config, nnx.as_pure(self.weights)
        mask, positions = attention.branch_mask(branch), attention.branch_positions(branch)

        def block(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            y = rms_norm(x, w["attention_norm"], c.rms_norm_eps)
            q = attention.rotary(jnp.einsum("bth,hnk->btnk", y, w["q"]), positions, c.rope_theta)
            k = attention.rotary(jnp.einsum("bth,hgk->btgk", y, w["k"]), positions, c.rope_theta)
            v = jnp.einsum("bth,hgk->btgk", y, w["v"])
            x = x + jnp.einsum("btnk,nkh->bth", attention.attend(q, k, v, mask), w["o"])
            y = rms_norm(x, w["mlp_norm"], c.rms_norm_eps)
            gated = jax.nn.silu(jnp.einsum("bth,hf->btf", y, w["gate"])) * jnp.einsum("bth,hf->btf", y, w["up"])
            return x + jnp.einsum("btf,fh->bth", gated, w["down"]), None

        if remat is not None:
            block = jax.checkpoint(block, policy=remat)
        with jax.named_scope("llm"):
            x, _ = jax.lax.scan(block, embeddings, weights["layers"])
        return rms_norm(x, weights["norm"], c.rms_norm_eps)

    def logits(self, hidden: Float[Array, "*batch h"], rows: int | None = None) -> Float[Array, "*batch vocab"]:
        """Logits in float32 over the first `rows` entries of the vocabulary (all of them by default)."""
        weights = nnx.as_pure(self.weights)
        table = weights["embed" if self.config.tie_word_embeddings else "output"][:rows]
        return jnp.einsum("...h,vh->...v", hidden, table, preferred_element_type=jnp.float32)
