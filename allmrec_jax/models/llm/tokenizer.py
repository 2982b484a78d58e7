"""The LLM's tokenizer behind one small class, from a `tokenizer.json` or out of a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allmrec_jax.errors import UserError


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids. `bos` is the id that the model's own tokenizer puts in front, None where it puts none."""

    backend: Any  # tokenizers.Tokenizer
    bos: int | None
    eos: int

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as it stands: no special token is added."""
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids))


def from_backend(backend: Any, eos: int) -> Tokenizer:
    """Wraps a `tokenizers.Tokenizer`, finding out by trial whether it puts a BOS in front."""
    backend.no_padding()
    backend.no_truncation()
    plain = backend.encode("a", add_special_tokens=False).ids
    special = backend.encode("a", add_special_tokens=True).ids
    bos = special[0] if len(special) > len(plain) and special[0] != plain[0] else None
    return Tokenizer(backend, bos, eos)


def from_folder(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """The `tokenizer.json` of a Hugging Face folder; the end token is the one its `config.json` names."""
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json; put the model's tokenizer file there")
    eos = config["eos_token_id"]
    return from_backend(Backend.from_file(str(path)), eos[0] if isinstance(eos, list) else eos)


def from_gguf(fields: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that a GGUF file carries.

    Raises:
      UserError: for a kind of tokenizer or a pre-tokeniser that is not known here.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    kind, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "default")
    if (kind, pre) not in {("gpt2", "smollm"), ("gpt2", "gpt-2")}:
        raise UserError(f"GGUF tokenizer {kind}/{pre} is not supported (known: gpt2/smollm, gpt2/gpt-2)")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    control = 3  # the GGUF token type of special tokens
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types, strict=True) if k == control]
    )
    tokenizer = from_backend(backend, int(fields["tokenizer.ggml.eos_token_id"]))
    if fields.get("tokenizer.ggml.add_bos_token", False):
        return Tokenizer(backend, int(fields["tokenizer.ggml.bos_token_id"]), tokenizer.eos)
    return tokenizer
