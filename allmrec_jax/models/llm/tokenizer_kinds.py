"""The two kinds of tokenizer that our LLMs have, built from their parts: byte pairs (GPT-2's) and sentence pieces."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from allmrec_jax.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens in sentencepiece and GGUF

# How a text is cut into words before pairs are merged: contractions; a word and the mark before it; digits; marks;
# line ends; spaces, of which the last one goes with the next word.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENISERS: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": None,
    "qwen2": _WORDS.format(digits=r"\p{N}"),
    "llama-bpe": _WORDS.format(digits=r"\p{N}{1,3}"),
}
"""By the names that GGUF files use; None cuts as GPT-2 does (smollm: after taking each digit by itself)."""


def byte_pairs(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, ...]], pre: str, added: Mapping[str, int]
) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer`.

    Args:
      pre: one of `PRE_TOKENISERS`.
      added: tokens that are recognised in a text before anything else, with their ids.

    Raises:
      UserError: if the ids of `added` do not continue the vocabulary's.
    """
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    # Llama 3 takes a word that is in the vocabulary whole, whatever the merges make of it.
    backend = Backend(models.BPE(vocab=dict(vocabulary), merges=list(merges), ignore_merges=pre == "llama-bpe"))
    words = PRE_TOKENISERS[pre]
    if words is None:
        steps = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    else:
        steps = [pre_tokenizers.Split(Regex(words), behavior="isolated", invert=False)]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    tokens = sorted(added, key=added.__getitem__)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    for token in tokens:
        if backend.token_to_id(token) != added[token]:
            raise UserError(f"the tokenizer's token {token!r} should have id {added[token]}, but others are missing")
    return backend


def sentence_pieces(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], *, spaced: bool = True
) -> Any:
    """A BPE `tokenizers.Tokenizer` of sentencepiece (Llama 2, TinyLlama, Mistral): spaces are `▁`, what is not in the
    vocabulary falls back to bytes.

    Args:
      scores: the greater a piece's, the earlier it is merged.
      types: NORMAL, UNKNOWN, ...
      spaced: whether a text is given a space in front.
    """
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    merged = [token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL and len(token) > 1]
    # The earliest merge first; of one piece's several ways of being made, that of the earlier parts.
    ranked = []
    for token in merged:
        cuts = [(token[:k], token[k:]) for k in range(1, len(token))]
        ways = [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
        ranked += [
            (-scores[vocabulary[token]], vocabulary[left], vocabulary[right], left, right) for left, right in ways
        ]
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space] if spaced else [space])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if spaced else back)
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            own = AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            (backend.add_tokens if kind == USER_DEFINED else backend.add_special_tokens)([own])
    return backend


def read_sentence_pieces(data: bytes) -> tuple[list[str], list[float], list[int]]:
    """(tokens, scores, types) of a `tokenizer.model`, a protocol buffer: field 1, repeated, holds a piece each (1 text,
    2 score, 3 type), field 2 how it was trained (3: its kind, 2 is BPE).

    Raises:
      UserError: if it is not BPE.
      ValueError: if it is damaged.
    """
    pieces, trained = [], {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(dict(_fields(value)))
        elif number == 2:
            trained = dict(_fields(value))
    if not pieces:
        raise ValueError("no pieces in it")
    if trained.get(3, 1) != 2:
        raise UserError("a tokenizer.model that is not of the kind BPE is not supported; put tokenizer.json beside it")
    scores = [struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0] for piece in pieces]
    return [piece[1].decode() for piece in pieces], scores, [piece.get(3, NORMAL) for piece in pieces]


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protocol buffer; numbers as int, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if key & 7 not in (1, 2, 5):
            raise ValueError("it holds something else")
        size, at = _varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        if at + size > len(data):
            raise ValueError("it is cut")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, where the next thing begins): seven bits a byte, the lowest first; the last byte is below 128."""
    value = shift = 0
    while at < len(data):
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
    raise ValueError("it is cut")
