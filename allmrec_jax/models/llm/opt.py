"""OPT (Zhang et al. 2022), 125m to 66b, as a Flax NNX module: the paper's LLM is opt-6.7b.

Learned positions, biases everywhere, ReLU, tied output. The norms stand before attention and MLP, and once at the end;
in opt-350m alone they stand after each, there is none at the end, and its token embeddings (512 wide) are projected to
the width of the blocks (1,024) and back.
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
from allmrec_jax.models.llm.module import INIT, Block, LanguageModel, See, Stack, bias
from allmrec_jax.models.llm.quantize import einsum
from allmrec_jax.models.params import Parameter, constant

OFFSET = 2  # the first two rows of the table of positions are not used
EPS = 1e-5


@dataclass(frozen=True)
class OPTConfig:
    """Sizes of an OPT model, by the names of its `config.json`."""

    vocab_size: int
    hidden_size: int
    ffn_dim: int
    num_hidden_layers: int
    num_attention_heads: int
    word_embed_proj_dim: int
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    final_norm: bool = True
    tie_word_embeddings: bool = True

    @property
    def width(self) -> int:
        """h, the width of the token embedding."""
        return self.word_embed_proj_dim

    @property
    def context(self) -> int:
        return self.max_position_embeddings


def describe(c: OPTConfig) -> dict[str, Any]:
    """Every parameter of the model, layers stacked on axis 0."""
    h, f, n, p = c.hidden_size, c.ffn_dim, c.num_attention_heads, c.word_embed_proj_dim
    k, stack, root = h // n, Stack(c.num_hidden_layers, "model.decoder.layers"), "model.decoder"

    def norm(name: str) -> dict[str, Parameter]:
        return {"scale": stack.vector(f"{name}.weight", h, value=1.0), "bias": stack.vector(f"{name}.bias", h)}

    def heads(name: str) -> dict[str, Parameter]:
        return {
            "kernel": stack.to_heads(f"self_attn.{name}", h, n, k, "heads"),
            "bias": stack.head_bias(f"self_attn.{name}", n, k, "heads"),
        }

    positions = (c.max_position_embeddings + OFFSET, h)
    description = {
        "embed": Parameter((c.vocab_size, p), ("vocab", "embed"), INIT, f"{root}.embed_tokens.weight"),
        "positions": Parameter(positions, (None, "embed"), INIT, f"{root}.embed_positions.weight"),
        "layers": {
            "attention_norm": norm("self_attn_layer_norm"),
            "q": heads("q_proj"),
            "k": heads("k_proj"),
            "v": heads("v_proj"),
            "o": {
                "kernel": stack.from_heads("self_attn.out_proj", h, n, k),
                "bias": stack.vector("self_attn.out_proj.bias", h),
            },
            "mlp_norm": norm("final_layer_norm"),
            "up": {"kernel": stack.matrix("fc1", (h, f), ("embed", "mlp")), "bias": stack.vector("fc1.bias", f, "mlp")},
            "down": {"kernel": stack.matrix("fc2", (f, h), ("mlp", "embed")), "bias": stack.vector("fc2.bias", h)},
        },
    }
    if c.do_layer_norm_before and c.final_norm:
        description["norm"] = {
            "scale": Parameter((h,), ("embed",), constant(1.0), f"{root}.final_layer_norm.weight"),
            "bias": Parameter((h,), ("embed",), constant(0.0), f"{root}.final_layer_norm.bias"),
        }
    if p != h:
        axes = ("embed", "embed")
        description["project_in"] = Parameter((p, h), axes, INIT, f"{root}.project_in.weight", "o i -> i o")
        description["project_out"] = Parameter((h, p), axes, INIT, f"{root}.project_out.weight", "o i -> i o")
    if not c.tie_word_embeddings:
        description["output"] = Parameter((c.vocab_size, p), ("vocab", "embed"), INIT, "lm_head.weight")
    return description


def layer_norm(x: Float[Array, "*batch h"], w: Mapping[str, Array]) -> Float[Array, "*batch h"]:
    """(x - mean) / sqrt(variance + eps) * scale + bias, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + EPS)
    return bias(jnp.einsum("...h,h->...h", x32, w["scale"].astype(jnp.float32)), w, "bias").astype(x.dtype)


class OPT(LanguageModel):
    """A frozen OPT. `embed` gives the embeddings before `project_in`: h is `word_embed_proj_dim`."""

    describe = staticmethod(describe)

    def enter(self, x: jax.Array, positions: Int[Array, "batch time"]) -> jax.Array:
        weights = nnx.as_pure(self.weights)
        if "project_in" in weights:
            x = jnp.einsum("btp,ph->bth", x, weights["project_in"])
        return x + jnp.take(weights["positions"], positions + OFFSET, axis=0, mode="clip")

    def block(self, positions: Int[Array, "batch time"]) -> Block:
        def dense(pattern: str, x: jax.Array, w: dict[str, Any]) -> jax.Array:
            return bias(einsum(pattern, x, w["kernel"]), w, "bias")

        def attend(y: jax.Array, w: dict[str, Any], see: See) -> jax.Array:
            q, k, v = (dense("bth,hnk->btnk", y, w[name]) for name in "qkv")
            return dense("btnk,nkh->bth", see(q, k, v), w["o"])

        def mlp(y: jax.Array, w: dict[str, Any]) -> jax.Array:
            return dense("btf,fh->bth", jax.nn.relu(dense("bth,hf->btf", y, w["up"])), w["down"])

        def block(x: jax.Array, w: dict[str, Any], see: See) -> jax.Array:
            if self.config.do_layer_norm_before:
                x = x + attend(layer_norm(x, w["attention_norm"]), w, see)
                return x + mlp(layer_norm(x, w["mlp_norm"]), w)
            x = layer_norm(x + attend(x, w, see), w["attention_norm"])
            return layer_norm(x + mlp(x, w), w["mlp_norm"])

        return block

    def leave(self, x: jax.Array) -> jax.Array:
        weights = nnx.as_pure(self.weights)
        if "norm" in weights:
            x = layer_norm(x, weights["norm"])
        return jnp.einsum("bth,hp->btp", x, weights["project_out"]) if "project_out" in weights else x


def read_config(raw: Mapping[str, Any], source: str) -> OPTConfig:
    """From a `config.json`.

    Raises:
      UserError: for a variant that is not known (Galactica and others that share the architecture).
      KeyError: for a size that is missing.
    """
    known = {"activation_function": "relu", "enable_bias": True, "layer_norm_elementwise_affine": True}
    for key, value in known.items():
        if raw.get(key, value) != value:
            raise UserError(f"{source}: {key} is {raw[key]!r}, but only {value!r} is supported; choose another LLM")
    if raw["hidden_size"] % raw["num_attention_heads"]:
        raise UserError(f"{source}: {raw['hidden_size']} is no multiple of {raw['num_attention_heads']} heads")
    return OPTConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        ffn_dim=raw["ffn_dim"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"],
        word_embed_proj_dim=raw.get("word_embed_proj_dim") or raw["hidden_size"],
        max_position_embeddings=raw["max_position_embeddings"],
        do_layer_norm_before=raw.get("do_layer_norm_before", True),
        final_norm=not raw.get("_remove_final_layer_norm", False),
        tie_word_embeddings=raw.get("tie_word_embeddings", True),
    )


def plain_name(name: str) -> str:
    """The name of a tensor as today's transformers writes it; the files of 2022 leave the first part out."""
    return f"model.{name}" if name.startswith("decoder.") else name
