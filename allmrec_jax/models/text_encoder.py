"""The sentence encoder (BERT family) as a Flax NNX module: Q = SBERT(text).

Post-norm blocks with exact GELU; the sentence embedding is the mean of the last hidden states over the attention mask,
L2-normalised if the model's own `modules.json` says so.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from allmrec_jax.errors import UserError
from allmrec_jax.models import params
from allmrec_jax.models.params import Parameter, constant, normal
from allmrec_jax.models.tensor_files import SafeTensors


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes by the names of `config.json`; `normalize` and `max_seq_length` as in the sentence-transformers files."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    normalize: bool = False
    max_seq_length: int = 256


def describe(c: EncoderConfig) -> dict[str, Any]:
    """Every parameter, layers stacked on axis 0."""
    L, h, f, n = c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.num_attention_heads
    k, init = h // n, normal(0.02)
    layer = "encoder.layer.{layer}"

    def norm(name: str, stacked: bool = True) -> dict[str, Parameter]:
        shape, axes = ((L, h), ("layer", "embed")) if stacked else ((h,), ("embed",))
        return {
            "scale": Parameter(shape, axes, constant(1.0), f"{name}.weight"),
            "bias": Parameter(shape, axes, constant(0.0), f"{name}.bias"),
        }

    def heads(name: str) -> dict[str, Parameter]:
        sizes = {"n": n}
        return {
            "kernel": Parameter(
                (L, h, n, k), ("layer", "embed", "heads", None), init, f"{name}.weight", "(n k) h -> h n k", sizes
            ),
            "bias": Parameter(
                (L, n, k), ("layer", "heads", None), constant(0.0), f"{name}.bias", "(n k) -> n k", sizes
            ),
        }

    def dense(name: str, i: int, o: int, axes: tuple[str, str]) -> dict[str, Parameter]:
        return {
            "kernel": Parameter((L, i, o), ("layer", *axes), init, f"{name}.weight", "o i -> i o"),
            "bias": Parameter((L, o), ("layer", axes[1]), constant(0.0), f"{name}.bias"),
        }

    return {
        "embeddings": {
            "word": Parameter((c.vocab_size, h), ("vocab", "embed"), init, "embeddings.word_embeddings.weight"),
            "position": Parameter(
                (c.max_position_embeddings, h), (None, "embed"), init, "embeddings.position_embeddings.weight"
            ),
            "type": Parameter((c.type_vocab_size, h), (None, "embed"), init, "embeddings.token_type_embeddings.weight"),
            "norm": norm("embeddings.LayerNorm", stacked=False),
        },
        "layers": {
            "q": heads(f"{layer}.attention.self.query"),
            "k": heads(f"{layer}.attention.self.key"),
            "v": heads(f"{layer}.attention.self.value"),
            "o": {
                "kernel": Parameter(
                    (L, n, k, h),
                    ("layer", "heads", None, "embed"),
                    init,
                    f"{layer}.attention.output.dense.weight",
                    "h (n k) -> n k h",
                    {"n": n},
                ),
                "bias": Parameter((L, h), ("layer", "embed"), constant(0.0), f"{layer}.attention.output.dense.bias"),
            },
            "attention_norm": norm(f"{layer}.attention.output.LayerNorm"),
            "up": dense(f"{layer}.intermediate.dense", h, f, ("embed", "mlp")),
            "down": dense(f"{layer}.output.dense", f, h, ("mlp", "embed")),
            "mlp_norm": norm(f"{layer}.output.LayerNorm"),
        },
    }


def _norm(x: jax.Array, w: dict[str, jax.Array], eps: float) -> jax.Array:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * w["scale"][None, None] + w["bias"][None, None]


class TextEncoder(nnx.Module):
    """Token ids to sentence embeddings."""

    def __init__(self, config: EncoderConfig, key: jax.Array, dtype: Any = jnp.float32):
        self.config = config
        self.weights = nnx.data(jax.tree.map(nnx.Param, params.init(key, describe(config), dtype)))

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        mask: Bool[Array, "batch time"],
        dropout_keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, "batch h"]:
        """Q for each text; `dropout_keys` (one a row) switch the encoder's own dropout on."""
        c, weights = self.config, nnx.as_pure(self.weights)
        dropped = dropout_keys is not None and c.dropout > 0

        def drop(x: jax.Array, site: jax.Array | int) -> jax.Array:
            if not dropped:
                return x
            keep = jax.vmap(
                lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1 - c.dropout, x.shape[1:])
            )(dropout_keys)
            return jnp.where(keep, x / (1 - c.dropout), 0)

        e = weights["embeddings"]
        x = jnp.take(e["word"], tokens, axis=0) + (e["position"][: tokens.shape[1]] + e["type"][:1])[None]
        x = drop(_norm(x, e["norm"], c.layer_norm_eps), 0)
        scale = 1 / math.sqrt(c.hidden_size // c.num_attention_heads)

        def block(x: jax.Array, layer: tuple[dict[str, Any], jax.Array]) -> tuple[jax.Array, None]:
            w, site = layer
            q, k, v = (
                jnp.einsum("bth,hnk->btnk", x, w[name]["kernel"]) + w[name]["bias"][None, None] for name in "qkv"
            )
            logits = jnp.einsum("btnk,bsnk->bnts", q, k) * scale
            logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(logits.dtype).min)
            attended = jnp.einsum("bnts,bsnk->btnk", drop(jax.nn.softmax(logits, axis=-1), 3 * site + 1), v)
            y = jnp.einsum("btnk,nkh->bth", attended, w["o"]["kernel"]) + w["o"]["bias"][None, None]
            x = _norm(x + drop(y, 3 * site + 2), w["attention_norm"], c.layer_norm_eps)
            y = jnp.einsum("bth,hf->btf", x, w["up"]["kernel"]) + w["up"]["bias"][None, None]
            y = jnp.einsum("btf,fh->bth", jax.nn.gelu(y, approximate=False), w["down"]["kernel"])
            y = drop(y + w["down"]["bias"][None, None], 3 * site + 3)
            return _norm(x + y, w["mlp_norm"], c.layer_norm_eps), None

        with jax.named_scope("text_encoder"):
            x, _ = jax.lax.scan(block, x, (weights["layers"], jnp.arange(c.num_hidden_layers)))
        weight = mask.astype(x.dtype)[..., None]
        Q = jnp.sum(x * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1e-9)
        return Q / jnp.maximum(jnp.linalg.norm(Q, axis=-1, keepdims=True), 1e-12) if c.normalize else Q


@dataclass(frozen=True)
class LoadedEncoder:
    """`nnx.merge(graph, weights)` gives the module back; `backend` is its `tokenizers.Tokenizer`."""

    graph: Any
    weights: Any
    config: EncoderConfig
    backend: Any


def build(config: EncoderConfig, weights: Any, backend: Any) -> LoadedEncoder:
    """The module built abstractly around the given weights."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: TextEncoder(config, jax.random.key(0))))
    return LoadedEncoder(graph, {"weights": weights}, config, backend)


CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "hidden_dropout_prob",
)


def load_encoder(folder: Path) -> LoadedEncoder:
    """Reads a sentence-transformers folder (safetensors).

    Raises:
      UserError: for a missing file, an unknown architecture or pooling, or tensors that do not fit.
    """
    from tokenizers import Tokenizer

    folder = Path(folder)

    def read(name: str, default: Any = None) -> Any:
        path = folder / name
        if path.is_file():
            return json.loads(path.read_text())
        if default is None:
            raise UserError(f"{path} is missing; {folder} is not a complete sentence encoder")
        return default

    raw = read("config.json")
    if raw.get("model_type") != "bert":
        raise UserError(f"{folder}: encoder type {raw.get('model_type')!r} is not supported (known: bert)")
    if not read("1_Pooling/config.json", {"pooling_mode_mean_tokens": True}).get("pooling_mode_mean_tokens"):
        raise UserError(f"{folder}: only mean pooling is supported")
    modules = read("modules.json", [{"type": "Transformer"}])
    limit = read("sentence_bert_config.json", {"max_seq_length": None}).get("max_seq_length") or 512
    missing = [name for name in CONFIG_KEYS if name not in raw]
    if missing:
        raise UserError(f"{folder / 'config.json'} has no {missing[0]!r}; is it the config of a BERT encoder?")
    config = EncoderConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"],
        max_position_embeddings=raw["max_position_embeddings"],
        type_vocab_size=raw["type_vocab_size"],
        layer_norm_eps=raw["layer_norm_eps"],
        dropout=raw["hidden_dropout_prob"],
        normalize=any("Normalize" in module["type"] for module in modules),
        max_seq_length=min(limit, raw["max_position_embeddings"], 512),
    )
    weights = params.from_torch(
        describe(config),
        SafeTensors(folder),
        ignore=lambda name: name.startswith("pooler.") or name.endswith("position_ids"),
        source=str(folder),
    )
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.no_padding()
    backend.no_truncation()
    return build(config, weights, backend)


def tokenize(
    backend: Any, texts: list[str], max_seq_length: int
) -> tuple[Int[np.ndarray, "texts longest"], Int[np.ndarray, " texts"]]:
    """Ids (texts, longest) int32 padded with 0, and lengths, of the stripped texts with [CLS] and [SEP]."""
    backend.enable_truncation(max_seq_length)
    ids = [encoding.ids for encoding in backend.encode_batch([text.strip() for text in texts])]
    backend.no_truncation()
    lengths = np.array([len(row) for row in ids], np.int32)
    tokens = np.zeros((len(ids), int(lengths.max())), np.int32)
    tokens[np.arange(tokens.shape[1])[None] < lengths[:, None]] = np.concatenate([np.asarray(r, np.int32) for r in ids])
    return tokens, lengths
