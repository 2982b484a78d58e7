"""The LLM's tokenizer behind one small class, from the files of a folder or out of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from allmrec_jax.errors import UserError
from allmrec_jax.models.llm import tokenizer_kinds as kinds

SPECIALS = ("[PAD]", "[UserRep]", "[HistoryEmb]", "[CandidateEmb]")
"""The four tokens that A-LLMRec appends to a vocabulary, in this order; their embeddings are never read."""


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids. `bos` is the id that the model's own tokenizer puts in front, None where it puts none."""

    backend: Any  # tokenizers.Tokenizer
    bos: int | None
    eos: int

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as it stands: nothing is put in front or behind."""
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids))

    @property
    def size(self) -> int:
        """One more than the greatest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def id_of(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def with_specials(self, names: Sequence[str] = SPECIALS) -> Tokenizer:
        """The same tokenizer knowing these tokens too, at the ids that follow its own (OPT: 50265 to 50268).

        A token that it knows already keeps its id. `self` is left as it is.
        """
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.backend.to_str())
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        return replace(self, backend=backend)

    def check_fits(self, vocab_size: int, source: str = "the LLM") -> None:
        """That the model has an embedding for every id but those of A-LLMRec's appended tokens.

        Raises:
          UserError: if it has not.
        """
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        beyond = sorted((i, token) for token, i in vocabulary.items() if i >= vocab_size and token not in SPECIALS)
        if beyond:
            raise UserError(
                f"{source}: the tokenizer knows {len(vocabulary)} tokens, but the model has {vocab_size} embeddings: "
                f"{beyond[0][1]!r} would be row {beyond[0][0]}; the tokenizer and the weights are not of one model"
            )
        for name, token in (("begins", self.bos), ("ends", self.eos)):
            if token is not None and not 0 <= token < vocab_size:
                raise UserError(f"{source}: a text {name} with id {token}, beyond the model's {vocab_size} embeddings")


def from_backend(backend: Any, eos: int) -> Tokenizer:
    """Wraps a `tokenizers.Tokenizer`, finding out by trial whether it puts a BOS in front."""
    backend.no_padding()
    backend.no_truncation()
    plain = backend.encode("a", add_special_tokens=False).ids
    special = backend.encode("a", add_special_tokens=True).ids
    bos = special[0] if len(special) > len(plain) and special[0] != plain[0] else None
    return Tokenizer(backend, bos, eos)


def from_folder(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; begin and end are the tokens that its `config.json` names.

    `tokenizer.json`, or `vocab.json` with `merges.txt` (OPT, Qwen), or `tokenizer.model` (Llama 2, Mistral).

    Raises:
      UserError: if none of them is there, or it is damaged or of a kind that is not known.
    """
    from tokenizers import Tokenizer as Backend

    end = config["eos_token_id"]
    eos = int(end[0] if isinstance(end, list) else end)
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            return from_backend(Backend.from_file(str(path)), eos)
        settings = _read(folder / "tokenizer_config.json")
        if (path := folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            backend, with_bos = _byte_pairs(folder, settings, config.get("model_type"))
        elif (path := folder / "tokenizer.model").is_file():
            backend, with_bos = kinds.sentence_pieces(*kinds.read_sentence_pieces(path.read_bytes())), True
        else:
            raise UserError(
                f"{folder} has no tokenizer: put tokenizer.json there, or vocab.json and merges.txt, or tokenizer.model"
            )
    except UserError:
        raise
    except Exception as error:  # `tokenizers` raises Exception itself
        raise UserError(f"{path} is damaged ({error}); fetch it again") from error
    with_bos = settings.get("add_bos_token", with_bos)
    return Tokenizer(backend, int(config["bos_token_id"]) if with_bos else None, eos)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _byte_pairs(folder: Path, settings: Mapping[str, Any], model: str | None) -> tuple[Any, bool]:
    """(backend, whether it puts a BOS in front if nothing else is said) from `vocab.json` and `merges.txt`."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    qwen = settings.get("tokenizer_class", "").startswith("Qwen") or (model or "").startswith("qwen")
    added = {content["content"]: int(i) for i, content in settings.get("added_tokens_decoder", {}).items()}
    if not added and not qwen:
        added = {token: vocabulary[token] for token in ("</s>", "<pad>") if token in vocabulary}
    backend = kinds.byte_pairs(vocabulary, merges, "qwen2" if qwen else "gpt-2", added)
    return backend, model == "opt"


def from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file carries.

    Raises:
      UserError: for a kind of tokenizer or a pre-tokeniser that is not known here.
    """
    kind, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "default")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    if kind == "llama":
        spaced = fields.get("tokenizer.ggml.add_space_prefix", True)
        backend = kinds.sentence_pieces(tokens, fields["tokenizer.ggml.scores"], types, spaced=spaced)
    elif kind == "gpt2" and pre in kinds.PRE_TOKENISERS:
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
        special = (kinds.CONTROL, kinds.USER_DEFINED)
        added = {token: i for i, (token, k) in enumerate(zip(tokens, types, strict=True)) if k in special}
        backend = kinds.byte_pairs({token: i for i, token in enumerate(tokens)}, merges, pre, added)
    else:
        known = ", ".join(["llama", *(f"gpt2/{name}" for name in kinds.PRE_TOKENISERS)])
        raise UserError(f"GGUF tokenizer {kind}/{pre} is not supported (known: {known})")
    with_bos = fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre == "llama-bpe")
    bos = int(fields["tokenizer.ggml.bos_token_id"]) if with_bos else None
    return Tokenizer(backend, bos, int(fields["tokenizer.ggml.eos_token_id"]))
