"""Loads a frozen LLM and its tokenizer from a folder: Hugging Face safetensors, or one GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from allmrec_jax.errors import UserError
from allmrec_jax.models import params
from allmrec_jax.models.llm.llama import Llama, LlamaConfig, describe
from allmrec_jax.models.llm.tokenizer import Tokenizer, from_folder, from_gguf
from allmrec_jax.models.tensor_files import SafeTensors


@dataclass(frozen=True)
class FrozenLLM:
    """A model taken apart: `nnx.merge(graph, weights)` inside a jitted function gives the module back.

    `weights` is an argument of every step, never part of a training state.
    """

    graph: Any
    weights: Any
    config: LlamaConfig
    tokenizer: Tokenizer | None

    @property
    def width(self) -> int:
        """h, the width of the token embedding."""
        return self.config.hidden_size


def build(
    config: LlamaConfig,
    weights: Any,
    tokenizer: Tokenizer | None,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> FrozenLLM:
    """The module built abstractly and `weights` placed on the mesh by the parameters' logical axes."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: Llama(config, jax.random.key(0))))
    if mesh is not None:
        weights = jax.tree.map(jax.device_put, weights, params.shardings(describe(config), mesh))
    else:
        weights = jax.tree.map(jnp.asarray, weights)
    return FrozenLLM(graph, {"weights": weights}, config, tokenizer)


def load_llm(folder: Path, *, dtype: Any = jnp.float32, mesh: jax.sharding.Mesh | None = None) -> FrozenLLM:
    """Reads `folder` (or a single `.gguf` file).

    Raises:
      UserError: if there is no model, its architecture is unknown, or its tensors do not fit.
    """
    folder = Path(folder)
    ggufs = [folder] if folder.suffix == ".gguf" else sorted(folder.glob("*.gguf"))
    try:
        if (folder / "config.json").is_file():
            raw = json.loads((folder / "config.json").read_text())
            config, tensors = _llama_config(raw, folder), SafeTensors(folder)
            tokenizer = from_folder(folder, raw)
        elif ggufs:
            fields, tensors = read_gguf(ggufs[0])
            config, tokenizer = _gguf_config(fields, tensors, ggufs[0]), from_gguf(fields)
        else:
            raise UserError(f"{folder} holds no model: neither config.json with safetensors nor a .gguf file")
    except (KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{folder}: the model's config is damaged or lacks {error}") from error

    def ignore(name: str) -> bool:
        return "rotary_emb" in name or (name == "lm_head.weight" and config.tie_word_embeddings)

    tree = params.from_torch(describe(config), tensors, dtype=dtype, ignore=ignore, source=str(folder))
    return build(config, tree, tokenizer, mesh=mesh)


def _llama_config(raw: dict[str, Any], folder: Path) -> LlamaConfig:
    known = ("LlamaForCausalLM",)
    architecture = (raw.get("architectures") or ["?"])[0]
    if architecture not in known:
        raise UserError(f"{folder}: architecture {architecture} is not supported (known: {', '.join(known)})")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{folder}: rotary scaling {rope} is not supported yet")
    heads = raw["num_attention_heads"]
    return LlamaConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads", heads),
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=raw.get("rope_theta") or rope.get("rope_theta", 10000.0),
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
    )


GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFTensors(Mapping):
    """The tensors of a llama GGUF file under their Hugging Face names, dequantised to float32 one at a time.

    GGUF stores the rows of q and k permuted for interleaved rotary pairs (0, 1), (2, 3), ...; here they are put back
    to the half-split order of the original weights.
    """

    def __init__(self, reader: Any, heads: int, kv_heads: int):
        self._tensors = {_gguf_name(tensor.name): tensor for tensor in reader.tensors}
        self._heads = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}

    def __getitem__(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        array = dequantize(tensor.data, tensor.tensor_type)
        for suffix, heads in self._heads.items():
            if suffix in name:
                array = array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _gguf_name(name: str) -> str:
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    try:
        block, layer, part, kind = name.split(".")
        if block == "blk":
            return f"model.layers.{layer}.{GGUF_NAMES[part]}.{kind}"
    except (ValueError, KeyError):
        pass
    return name  # reported as unknown by the loader


def read_gguf(path: Path) -> tuple[dict[str, Any], GGUFTensors]:
    """The fields (read when asked for: the vocabulary takes a second) and tensors of a GGUF file."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:
        raise UserError(f"{path} is not a readable GGUF file ({error}); delete it and fetch it again") from error
    if fields.get("general.architecture") != "llama":
        raise UserError(f"{path}: architecture {fields.get('general.architecture')} is not supported (known: llama)")
    heads = fields["llama.attention.head_count"]
    return fields, GGUFTensors(reader, heads, fields.get("llama.attention.head_count_kv", heads))


def _gguf_config(fields: dict[str, Any], tensors: Mapping, path: Path) -> LlamaConfig:
    if any(name.startswith("llama.rope.scaling") for name in fields):
        raise UserError(f"{path}: rotary scaling is not supported yet")
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=fields.get("llama.rope.dimension_count", hidden // heads),
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=fields.get("llama.rope.freq_base", 10000.0),
        max_position_embeddings=fields["llama.context_length"],
        tie_word_embeddings="lm_head.weight" not in tensors,
    )
