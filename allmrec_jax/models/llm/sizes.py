"""The sizes of well-known language models, as their `config.json` gives them: planned without any weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from allmrec_jax.errors import UserError
from allmrec_jax.models.llm.architectures import read_config

_OPT = {"vocab_size": 50272, "max_position_embeddings": 2048, "architectures": ["OPTForCausalLM"]}
_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip


def _opt(hidden: int, layers: int, heads: int, **more) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "ffn_dim": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return _OPT | sizes | {"word_embed_proj_dim": hidden} | more


def _llama(vocab: int, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, kind: str = "Llama", **more):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = dict(zip((*names, "num_key_value_heads"), (vocab, hidden, ffn, layers, heads, kv_heads), strict=True))
    return {"architectures": [f"{kind}ForCausalLM"], **sizes, **more}


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "opt-125m": (_opt(768, 12, 12), 125_239_296),
    "opt-350m": (_opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False), 331_196_416),
    "opt-1.3b": (_opt(2048, 24, 32), 1_315_758_080),
    "opt-2.7b": (_opt(2560, 32, 32), 2_651_596_800),
    "opt-6.7b": (_opt(4096, 32, 32), 6_658_473_984),
    "opt-13b": (_opt(5120, 40, 40), 12_853_473_280),
    "opt-30b": (_opt(7168, 48, 56), 29_974_540_288),
    "opt-66b": (_opt(9216, 64, 72), 65_719_701_504),
    "llama-2-7b": (_llama(32000, 4096, 11008, 32, 32, 32, max_position_embeddings=4096), 6_738_415_616),
    "llama-3-8b": (
        _llama(128256, 4096, 14336, 32, 32, 8, rope_theta=500000.0, max_position_embeddings=8192),
        8_030_261_248,
    ),
    "llama-3.1-8b": (
        _llama(128256, 4096, 14336, 32, 32, 8, rope_theta=5e5, rope_scaling=_SCALING, max_position_embeddings=131072),
        8_030_261_248,
    ),
    "tinyllama-1.1b": (_llama(32000, 2048, 5632, 22, 32, 4), 1_100_048_384),
    "smollm2-135m": (
        _llama(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True, max_position_embeddings=8192),
        134_515_008,
    ),
    "smollm2-360m": (
        _llama(49152, 960, 2560, 32, 15, 5, tie_word_embeddings=True, max_position_embeddings=8192),
        361_821_120,
    ),
    "smollm2-1.7b": (
        _llama(49152, 2048, 8192, 24, 32, 32, tie_word_embeddings=True, max_position_embeddings=8192),
        1_711_376_384,
    ),
    "mistral-7b": (
        _llama(32000, 4096, 14336, 32, 32, 8, "Mistral", sliding_window=4096, max_position_embeddings=32768),
        7_241_732_096,
    ),
    "mistral-7b-v0.3": (
        _llama(32768, 4096, 14336, 32, 32, 8, "Mistral", sliding_window=None, max_position_embeddings=32768),
        7_248_023_552,
    ),
    "qwen2.5-0.5b": (
        _llama(151936, 896, 4864, 24, 14, 2, "Qwen2", tie_word_embeddings=True, max_position_embeddings=32768),
        494_032_768,
    ),
    "qwen2.5-7b": (
        _llama(152064, 3584, 18944, 28, 28, 4, "Qwen2", max_position_embeddings=131072),
        7_615_616_512,
    ),
    "qwen3-0.6b": (
        _llama(151936, 1024, 3072, 28, 16, 8, "Qwen3", head_dim=128, tie_word_embeddings=True)
        | {"max_position_embeddings": 40960},
        596_049_920,
    ),
    "qwen3-8b": (
        _llama(151936, 4096, 12288, 36, 32, 8, "Qwen3", head_dim=128, max_position_embeddings=40960),
        8_190_735_360,
    ),
}
"""Name: (what matters of its `config.json`, its published number of parameters)."""


def known_as(name: str) -> str | None:
    """The entry of `PUBLISHED` that a repository's name is about, such as `meta-llama/Meta-Llama-3-8B-Instruct`."""
    last = name.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    parts = last.replace("-instruct-v0.3", "-v0.3").split("-")
    return next((found for n in range(len(parts), 0, -1) if (found := "-".join(parts[:n])) in PUBLISHED), None)


def place_of(name: str) -> Path | None:
    """Where a model's config is: its folder or `.gguf` file, or what the cache holds of it."""
    from allmrec_jax.data import sources

    places = [Path(name)]
    if name in sources.KNOWN or sources.REPOSITORY.fullmatch(name):
        places.append(sources.cache_dir() / sources.weights_named(name).name)
    for folder in places:
        if (folder / "config.json").is_file():
            return folder
        ggufs = [folder] if folder.suffix == ".gguf" and folder.is_file() else sorted(folder.glob("*.gguf"))
        if ggufs:
            return ggufs[0]
    return None


def config_of(name: str) -> Any:
    """The config of a model by what `place_of` finds of it, or else its well-known sizes.

    Raises:
      UserError: if nothing says how large it is.
    """
    place = place_of(name)
    if place is not None and place.suffix == ".gguf":
        from allmrec_jax.models.llm import gguf_file

        return gguf_file.read(place)[2]
    if place is not None:
        return read_config(json.loads((place / "config.json").read_text()), str(place))
    known = known_as(name)
    if known is None:
        raise UserError(
            f"llm.llm {name}: its sizes are not known; give the folder of its config.json, or one of "
            f"{', '.join(PUBLISHED)}"
        )
    return read_config(PUBLISHED[known][0], name)


def tokenizer_at(place: Path) -> Any:
    """The tokenizer beside the config that `place_of` has found.

    Raises:
      UserError: if there is none, or it cannot be read.
    """
    from allmrec_jax.models.llm import gguf_file, tokenizer

    if place.suffix == ".gguf":
        return tokenizer.from_gguf(gguf_file.read(place)[0])
    return tokenizer.from_folder(place, json.loads((place / "config.json").read_text()))
