"""A GGUF file: the config and the tensors of a model of the Llama family, dequantised one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from allmrec_jax.errors import UserError
from allmrec_jax.models.llm.llama import LlamaConfig
from allmrec_jax.models.llm.rotary import Scaling

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's files call themselves llama

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
DIVISORS = "rope_freqs.weight"  # how files of Llama 3.1 and later say by how much each frequency is slowed down


class GGUFTensors(Mapping):
    """The tensors of a GGUF file under their Hugging Face names, dequantised to float32 when asked for.

    Files of the architecture `llama` store the rows of q and k permuted for interleaved rotary pairs (0, 1), (2, 3),
    ...; here they are put back to the half-split order of the original weights.
    """

    def __init__(self, reader: Any, permuted: Mapping[str, int], source: str):
        self._tensors = {_name(tensor.name): tensor for tensor in reader.tensors}
        self._permuted, self._source = permuted, source

    def __getitem__(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            array = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise UserError(f"{self._source}: {name!r} is stored as {kind}, which is not supported") from error
        for part, heads in self._permuted.items():
            if part in name:
                array = array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _name(name: str) -> str:
    first, *rest = name.split(".")
    if first == "blk" and len(rest) == 3 and rest[1] in NAMES:
        return f"model.layers.{rest[0]}.{NAMES[rest[1]]}.{rest[2]}"
    if first in NAMES and len(rest) == 1:
        return f"{NAMES[first]}.{rest[0]}"
    return name  # reported as unknown by the loader


def read(path: Path) -> tuple[dict[str, Any], GGUFTensors, LlamaConfig]:
    """The fields, the tensors and the config in a file.

    Raises:
      UserError: if it is damaged, or of an architecture or a rotary scaling that is not known.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:
        raise UserError(f"{path} is not a readable GGUF file ({error}); delete it and fetch it again") from error
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {kind} is not supported (known: {', '.join(ARCHITECTURES)})")
    if fields.get("split.count", 1) > 1:
        raise UserError(f"{path} is one of {fields['split.count']} parts; merge them with gguf-split first")
    heads = fields[f"{kind}.attention.head_count"]
    kv_heads = fields.get(f"{kind}.attention.head_count_kv", heads)
    permuted = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads} if kind == "llama" else {}
    tensors = GGUFTensors(reader, permuted, str(path))
    return fields, tensors, _config(kind, fields, tensors, path)


def _config(kind: str, fields: dict[str, Any], tensors: GGUFTensors, path: Path) -> LlamaConfig:
    def field(name: str, default: Any = None) -> Any:
        return fields[f"{kind}.{name}"] if default is None else fields.get(f"{kind}.{name}", default)

    heads, hidden = field("attention.head_count"), field("embedding_length")
    width = field("attention.key_length", field("rope.dimension_count", hidden // heads))
    if field("rope.dimension_count", width) != width:
        raise UserError(f"{path}: rotary positions on a part of each head are not supported")
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=field("attention.head_count_kv", heads),
        head_dim=width,
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_theta=field("rope.freq_base", 10000.0),
        max_position_embeddings=field("context_length"),
        tie_word_embeddings="lm_head.weight" not in tensors,
        rope_scaling=_scaling(kind, fields, tensors, path),
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in tensors,
        o_bias="model.layers.0.self_attn.o_proj.bias" in tensors,
        mlp_bias="model.layers.0.mlp.up_proj.bias" in tensors,
        qk_norm="model.layers.0.self_attn.q_norm.weight" in tensors,
        sliding_window=fields.get(f"{kind}.attention.sliding_window") or None,
    )


def _scaling(kind: str, fields: dict[str, Any], tensors: GGUFTensors, path: Path) -> Scaling | None:
    if DIVISORS in tensors:
        return Scaling("given", divisors=tuple(tensors[DIVISORS].tolist()))
    how = fields.get(f"{kind}.rope.scaling.type", "none")
    # Files from before the field was introduced give the factor alone.
    factor = fields.get(f"{kind}.rope.scaling.factor", fields.get(f"{kind}.rope.scale_linear"))
    if how == "none" and factor in (None, 0.0, 1.0):
        return None
    if how in ("none", "linear") and factor:
        return Scaling("linear", float(factor))
    raise UserError(f"{path}: rotary scaling {how!r} is not supported (known: none, linear)")
