"""SBERT, the sentence encoder: read from its folder, and its tokenizer. The network itself is `bert.TextEncoder`.

A folder of sentence-transformers says in `modules.json` (and in the files that it names) how token states become an
embedding: which pooling, whether normalised, at how many tokens texts are cut, whether they are lower-cased first.
A plain Hugging Face folder says nothing of the kind: there it is the mean over the mask, not normalised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from allmrec_jax.errors import UserError
from allmrec_jax.models import params
from allmrec_jax.models.bert import ARCHITECTURES, EncoderConfig, TextEncoder, describe
from allmrec_jax.models.tensor_files import Renamed, tensors


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


# Our field -> its key in config.json. An optional one may be absent.
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)
_KEYS: dict[str, dict[str, str]] = {
    "bert": {name: name for name in (*_SIZES, "type_vocab_size", "layer_norm_eps")},
    "mpnet": {name: name for name in (*_SIZES, "layer_norm_eps")},
    "distilbert": dict(
        zip(_SIZES, ("vocab_size", "dim", "hidden_dim", "n_layers", "n_heads", "max_position_embeddings"), strict=True)
    ),
}
_DROPOUTS = {
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "mpnet": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "distilbert": ("dropout", "attention_dropout"),
}
# What the config must say if it says anything: the key, and the only value known here.
_FIXED = {
    "hidden_act": "gelu",
    "activation": "gelu",
    "position_embedding_type": "absolute",
    "relative_attention_num_buckets": 32,
    "is_decoder": False,
}
# Parts of larger models around the encoder, by the first part of their names.
_HEADS = ("pooler", "cls", "lm_head", "vocab_transform", "vocab_layer_norm", "vocab_projector", "qa_outputs")
_WRAPPERS = ("0.", "auto_model.", "model.", *(f"{name}." for name in ARCHITECTURES))


def load_encoder(folder: Path) -> LoadedEncoder:
    """Reads the folder of a sentence encoder: of sentence-transformers, or (mean pooling) of Hugging Face alone.

    Weights are `.safetensors`, or else PyTorch's `pytorch_model.bin`, which is read without running anything in it.

    Raises:
      UserError: for a missing file, an unknown architecture, pooling or module, or tensors that do not fit.
    """
    folder = Path(folder)
    try:
        inner, how = _modules(folder)
        raw = _read(inner / "config.json")
        config = replace(_config(raw, inner), **how)
        config = replace(config, max_seq_length=_limit(inner, config))
        backend = _tokenizer(inner, config)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder}: the encoder's settings are damaged ({error!r}); fetch them again") from error
    return build(config, read_weights(config, tensors(inner), str(inner)), backend)


def read_weights(config: EncoderConfig, found: Mapping[str, Any], source: str) -> Any:
    """The parameters among a file's tensors, whatever is wrapped around the encoder there.

    Raises:
      UserError: for tensors that do not fit, naming the first.
    """
    return params.from_torch(
        describe(config),
        Renamed(found, _plain_name, source),
        ignore=lambda name: name.split(".")[0] in _HEADS or name.endswith("position_ids"),
        source=source,
    )


def _read(path: Path, default: Any = None) -> Any:
    if not path.is_file():
        if default is None:
            raise UserError(f"{path} is missing; {path.parent} is not a complete sentence encoder")
        return default
    return json.loads(path.read_text())


def _modules(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the transformer itself, and the fields of the config that the other modules decide."""
    modules = _read(folder / "modules.json", [])
    if not modules:
        return folder, {}
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(
            f"{folder}: the encoder is made of {', '.join(kinds)} (known: Transformer, Pooling, and Normalize "
            "or not); choose another encoder"
        )
    transformer, pool = (module.get("path", "") for module in modules[:2])
    pooling = _read(folder / (pool or "1_Pooling") / "config.json")
    named = pooling.get("pooling_mode")
    modes = [named] if isinstance(named, str) else list(named or [])
    modes += [key.removeprefix("pooling_mode_") for key, on in pooling.items() if key[:13] == "pooling_mode_" and on]
    known = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise UserError(f"{folder}: pooling by {' and '.join(map(str, modes)) or 'nothing'} (known: mean, cls)")
    prompts = _read(folder / "config_sentence_transformers.json", {})
    if name := prompts.get("default_prompt_name"):
        raise UserError(f"{folder}: puts the prompt {name!r} before every text, which is not supported; set it to null")
    return folder / transformer, {"pooling": known[modes[0]], "normalize": "Normalize" in kinds}


def _config(raw: dict[str, Any], folder: Path) -> EncoderConfig:
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"{folder}: encoder type {kind!r} is not supported (known: {', '.join(ARCHITECTURES)})")
    path = folder / "config.json"
    missing = [key for key in _KEYS[kind].values() if key not in raw]
    if missing:
        raise UserError(f"{path} has no {missing[0]!r}; is it the config of a {kind} encoder?")
    for key, value in _FIXED.items():
        if raw.get(key, value) != value:
            raise UserError(f"{path}: {key} is {raw[key]!r}, but only {value!r} is supported; choose another encoder")
    dropout, attention_dropout = (raw.get(key, 0.1) for key in _DROPOUTS[kind])
    fields = {field: raw[key] for field, key in _KEYS[kind].items()}
    if fields["hidden_size"] % fields["num_attention_heads"]:
        raise UserError(f"{path}: {fields['hidden_size']} is no multiple of {fields['num_attention_heads']} heads")
    return EncoderConfig(**fields, architecture=kind, dropout=dropout, attention_dropout=attention_dropout)


def _limit(folder: Path, config: EncoderConfig) -> int:
    """Tokens at which a text is cut, [CLS] and [SEP] counted: what the files say, or as many as there are positions."""
    said = [_read(path).get("max_seq_length") for path in sorted(folder.glob("sentence_*_config.json"))][:1]
    said.append(_read(folder / "tokenizer_config.json", {}).get("model_max_length"))
    limit = int(min(next((n for n in said if n is not None), config.longest), config.longest))
    if limit < 2:
        raise ValueError(f"texts cut at {limit} tokens")
    return limit


def _plain_name(name: str) -> str:
    """The name within the bare encoder, whatever was wrapped around it, in the spelling of today."""
    while wrapper := next((w for w in _WRAPPERS if name.startswith(w)), None):
        name = name.removeprefix(wrapper)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _tokenizer(folder: Path, config: EncoderConfig) -> Any:
    """`tokenizer.json`, or WordPiece over `vocab.txt`."""
    from tokenizers import Tokenizer, normalizers

    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again") from error
    elif (folder / "vocab.txt").is_file():
        backend = _word_pieces(folder, config.architecture)
    else:
        raise UserError(f"{folder} has no tokenizer.json (nor vocab.txt); put the encoder's tokenizer file there")
    if backend.get_vocab_size() > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer knows {backend.get_vocab_size()} tokens, but the encoder {config.vocab_size}; "
            "they are not of one model"
        )
    if any(_read(path).get("do_lower_case") for path in folder.glob("sentence_*_config.json")):
        lower = normalizers.Lowercase()
        backend.normalizer = normalizers.Sequence([lower, backend.normalizer] if backend.normalizer else [lower])
    backend.no_padding()
    backend.no_truncation()
    return backend


def _word_pieces(folder: Path, architecture: str) -> Any:
    """BERT's tokenizer from its list of words, as the older folders have it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    raw = _read(folder / "tokenizer_config.json", {})
    first, last = ("<s>", "</s>") if architecture == "mpnet" else ("[CLS]", "[SEP]")
    model = models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=raw.get("tokenize_chinese_chars", True),
        strip_accents=raw.get("strip_accents"),
        lowercase=raw.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    marks = [(token, backend.token_to_id(token)) for token in (first, last)]
    for token, index in marks:
        if index is None:
            raise UserError(f"{folder / 'vocab.txt'} has no {token}; is it the vocabulary of a {architecture} encoder?")
    backend.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=marks)
    return backend


def tokenize(
    backend: Any, texts: list[str], max_seq_length: int
) -> tuple[Int[np.ndarray, "texts longest"], Int[np.ndarray, " texts"]]:
    """Ids (texts, longest) int32 padded with 0, and lengths, of the stripped texts with [CLS] and [SEP].

    A longer text is cut at `max_seq_length`, its [SEP] kept; an empty one is [CLS] [SEP].
    """
    backend.enable_truncation(max_seq_length)
    ids = [encoding.ids for encoding in backend.encode_batch([text.strip() for text in texts])]
    backend.no_truncation()
    lengths = np.array([len(row) for row in ids], np.int32)
    tokens = np.zeros((len(ids), int(lengths.max())), np.int32)
    tokens[np.arange(tokens.shape[1])[None] < lengths[:, None]] = np.concatenate([np.asarray(r, np.int32) for r in ids])
    return tokens, lengths
