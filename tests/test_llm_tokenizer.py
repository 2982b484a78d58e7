"""Tokenizers from every kind of file give the ids of the model's own, with and without BOS; the appended tokens."""

import json
import shutil

import numpy as np
import pytest
import tiny

from allmrec_jax.errors import UserError
from allmrec_jax.models.llm import tokenizer_kinds as kinds
from allmrec_jax.models.llm.tokenizer import SPECIALS, from_folder, from_gguf

TEXTS = [
    " is a user representation.This user has watched ",
    '","',
    '"12 Monkeys (1995)"',
    "1234567890 3.14 1,000,000 2nd 007",
    "'Til There Was You: it's he'll WE'VE i'm'd",
    "Misérables, Les; Ölprinz; ¿Qué?",
    "“curly” ‘quotes’ — and … dots",
    "日本語 한국어 עברית Ελληνικά",
    "🎬🍿 emoji 👩‍🚀",
    "  two  spaces   three\ttab\n\nlines \r\n end ",
    "",
    " ",
    "e\u0301 combining \u00a0 no-break \u200b zero",
    "The recommendation is ",
    *("".join(np.random.default_rng(k).choice(list("aZé 019\"'.,:;!?()[]-_&/\n\t ßñ漢🎬the"), 30)) for k in range(300)),
]
OPT = {"model_type": "opt", "bos_token_id": 2, "eos_token_id": 2}
QWEN = {"model_type": "qwen3", "bos_token_id": 151643, "eos_token_id": 151645}
LLAMA = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def opt(test_data):
    return from_folder(test_data("tokenizers/opt"), OPT)


def test_opt_reads_as_its_own_tokenizer_does(opt, test_data):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = test_data("tokenizers/opt")
    theirs = transformers.GPT2Tokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        **{f"{name}_token": "</s>" for name in ("bos", "eos", "unk")},
        pad_token="<pad>",
    )
    assert opt(TEXTS) == theirs(TEXTS, add_special_tokens=False)["input_ids"]
    assert opt(["Hello world"]) == [[31414, 232]]
    assert [opt.decode(ids) for ids in opt(TEXTS)] == TEXTS


def test_opt_begins_and_ends_with_one_token_and_has_four_appended(opt):
    """`</s>` is BOS and EOS; the ids that A-LLMRec's tokens get in the public code."""
    assert (opt.bos, opt.eos, opt.size) == (2, 2, 50265)
    more = opt.with_specials()
    assert [more.id_of(name) for name in SPECIALS] == [50265, 50266, 50267, 50268]
    assert [opt.id_of(name) for name in SPECIALS] == [None] * 4
    assert more.size == 50269
    assert more(TEXTS) == opt(TEXTS)
    pieces = opt(['"Heat"', ',"Alien"'])
    assert more(['"Heat"[HistoryEmb],"Alien"[CandidateEmb]']) == [[*pieces[0], 50267, *pieces[1], 50268]]
    assert more.with_specials().size == more.size  # known already
    more.check_fits(50265)
    opt.check_fits(50272)


def test_qwen_reads_as_its_own_tokenizer_does(test_data):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = test_data("tokenizers/qwen3")
    ours, theirs = from_folder(folder, QWEN), transformers.AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, "<|im_start|>user\nHi<|im_end|>"]
    assert ours(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
    assert (ours.bos, ours.eos, ours.size) == (None, 151645, 151669)
    assert theirs("Heat")["input_ids"] == ours(["Heat"])[0]


# What sentencepiece itself makes of Llama 2's file.
SENTENCES = {
    "Hello world": [15043, 3186],
    '"12 Monkeys (1995)"': [376, 29896, 29906, 2598, 8149, 313, 29896, 29929, 29929, 29945, 5513],
    "  two  spaces": [259, 1023, 29871, 8162],
    "Misérables": [341, 11728, 4201, 793],
    "漢🎬\n": [29871, 31652, 243, 162, 145, 175, 13],
}


def test_llama_2_reads_as_sentencepiece_does(test_data):
    tokenizer = from_folder(test_data("tokenizers/llama2"), LLAMA)
    assert dict(zip(SENTENCES, tokenizer(list(SENTENCES)), strict=True)) == SENTENCES
    assert (tokenizer.bos, tokenizer.eos, tokenizer.size) == (1, 2, 32000)
    assert [tokenizer.decode(ids) for ids in tokenizer(TEXTS)] == TEXTS


def test_a_gguf_file_carries_the_same_sentence_pieces(test_data):
    path = test_data("tokenizers/llama2") / "tokenizer.model"
    tokens, scores, types = kinds.read_sentence_pieces(path.read_bytes())
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = from_gguf(fields)
    assert dict(zip(SENTENCES, tokenizer(list(SENTENCES)), strict=True)) == SENTENCES
    assert tokenizer.bos == 1
    assert from_gguf(fields | {"tokenizer.ggml.add_bos_token": False}).bos is None
    with pytest.raises(UserError, match=r"t5/default is not supported \(known: llama, gpt2/gpt-2"):
        from_gguf(fields | {"tokenizer.ggml.model": "t5"})


# ------------------------------------------------------------------------------------------------------ tiny tokenizers


@pytest.mark.parametrize("bos", [False, True])
def test_whether_a_bos_comes_first_is_read_from_the_tokenizer(bos, tmp_path):
    tiny.byte_tokenizer(bos=bos).backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = from_folder(tmp_path, {"eos_token_id": [1, 0]})
    assert tokenizer.bos == (0 if bos else None)
    assert tokenizer.eos == 1
    assert tokenizer(["ab"]) == tiny.byte_tokenizer()(["ab"])  # nothing is put in front


@pytest.mark.parametrize("said", [True, False, None])
def test_files_that_say_nothing_of_a_bos_have_their_models_own(said, test_data, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(test_data("tokenizers/opt") / name, tmp_path / name)
    if said is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": said}))
    assert from_folder(tmp_path, OPT).bos == (None if said is False else 2)


def test_a_tokenizer_of_another_model_is_refused():
    tokenizer = tiny.byte_tokenizer()
    tokenizer.check_fits(tokenizer.size, "llm")
    with pytest.raises(
        UserError, match=rf"llm: .* but the model has {tokenizer.size - 1} embeddings: .*not of one model"
    ):
        tokenizer.check_fits(tokenizer.size - 1, "llm")
    tokenizer.with_specials().check_fits(tokenizer.size, "llm")  # appended tokens need no row
    with pytest.raises(UserError, match="not of one model"):
        tokenizer.with_specials(["[Another]"]).check_fits(tokenizer.size, "llm")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_a_damaged_file_is_named(name, tmp_path):
    (tmp_path / name).write_text("{")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=f"{name} is damaged"):
        from_folder(tmp_path, OPT)


def test_a_sentencepiece_file_of_another_kind_is_refused(tmp_path):
    piece = b"\x0a\x03\x0a\x01a"  # one piece, and nothing on how it was trained: a unigram model
    (tmp_path / "tokenizer.model").write_bytes(piece)
    with pytest.raises(UserError, match=r"not of the kind BPE.*tokenizer\.json"):
        from_folder(tmp_path, LLAMA)
