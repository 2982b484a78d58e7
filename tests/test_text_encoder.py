"""Sentence encoders from their folders: settings, weights old and new, tokenizers, sizes, and what is not supported."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jaxtyping import TypeCheckError
from safetensors.numpy import save_file

from allmrec_jax.errors import UserError
from allmrec_jax.files import digest, model_files
from allmrec_jax.models import bert, params
from allmrec_jax.models.bert import EncoderConfig, TextEncoder
from allmrec_jax.models.text_encoder import build, load_encoder, tokenize

TEXTS = ["Heat", "", "  \n", "A longer text, with more in it.", "x" * 200]
WORDS = ["[PAD]", "<s>", "</s>", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz,.", "##a", "##e", "##at", "he"]


def sizes(architecture: str, c: EncoderConfig) -> dict:
    """`config.json` of a tiny encoder."""
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    if architecture == "distilbert":
        keys = dict(zip(names, ["vocab_size", "dim", "hidden_dim", "n_layers", "n_heads"], strict=True))
        more = {"dropout": 0.1, "attention_dropout": 0.2, "activation": "gelu"}
    else:
        keys = {name: name for name in [*names, "layer_norm_eps"]}
        more = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2, "hidden_act": "gelu"}
        more |= {"type_vocab_size": 2} if architecture == "bert" else {"relative_attention_num_buckets": 32}
    raw = {"model_type": architecture, "max_position_embeddings": c.max_position_embeddings, **more}
    return raw | {key: getattr(c, name) for name, key in keys.items()}


def write(folder: Path, architecture: str = "bert", *, inner: str = "", **files) -> EncoderConfig:
    """A tiny random encoder of sentence-transformers: mean pooling, texts cut at 20. `files` replaces some."""
    c = replace(tiny.ENCODER, architecture=architecture)
    pooling = {"word_embedding_dimension": c.hidden_size, "pooling_mode_cls_token": False}
    prefix = "sentence_transformers.models."
    content = {
        f"{inner}config.json": sizes(architecture, c),
        f"{inner}sentence_bert_config.json": {"max_seq_length": 20, "do_lower_case": False},
        "modules.json": [
            {"idx": 0, "name": "0", "path": inner.rstrip("/"), "type": f"{prefix}Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{prefix}Pooling"},
        ],
        "1_Pooling/config.json": pooling | {"pooling_mode_mean_tokens": True},
        **{f"{name.replace('__', '/')}.json": value for name, value in files.items()},
    }
    for name, value in content.items():
        if value is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value))
    save_file(named_weights(c), folder / inner / "model.safetensors")
    tiny.encoder().backend.save(str(folder / inner / "tokenizer.json"))
    return c


@functools.cache
def weights_of(c: EncoderConfig):
    """Random, drawn on the host: nothing to compile."""
    random = np.random.default_rng(4)
    draw = lambda x: random.normal(scale=0.3, size=x.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, params.shapes(bert.describe(c)))


def named_weights(c: EncoderConfig) -> dict[str, np.ndarray]:
    """By their PyTorch names; contiguous, because safetensors writes the memory as it lies."""
    return {
        name: np.ascontiguousarray(array) for name, array in params.to_torch(bert.describe(c), weights_of(c)).items()
    }


def encode(encoder, texts):
    tokens, lengths = tokenize(encoder.backend, texts, encoder.config.max_seq_length)
    mask = np.arange(tokens.shape[1])[None] < lengths[:, None]
    return np.asarray(jax.jit(lambda w, t, m: nnx.merge(encoder.graph, w)(t, m))(encoder.weights, tokens, mask))


def module(kind: str, path: str = "") -> dict:
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


BASE = [module("Transformer"), module("Pooling", "1_Pooling")]


# ---------------------------------------------------------------------------------------------- what the folder says


@pytest.mark.parametrize("architecture", bert.ARCHITECTURES)
def test_a_folder_gives_the_config_and_the_weights_that_are_in_it(tmp_path, architecture):
    c = write(tmp_path, architecture)
    encoder = load_encoder(tmp_path)
    assert encoder.config == replace(c, max_seq_length=20, attention_dropout=0.2)
    jax.tree.map(np.testing.assert_array_equal, encoder.weights["weights"], weights_of(c))
    assert c.longest == (62 if architecture == "mpnet" else 64)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ("mean", False, 20)),
        ({"modules": [*BASE, module("Normalize", "2_Normalize")]}, ("mean", True, 20)),
        (
            {"1_Pooling__config": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}},
            ("cls", False, 20),
        ),
        ({"1_Pooling__config": {"pooling_mode": "cls", "embedding_dimension": 8}}, ("cls", False, 20)),
        ({"sentence_bert_config": {"max_seq_length": None}}, ("mean", False, 62)),
        ({"sentence_bert_config": {"max_seq_length": 9999}}, ("mean", False, 62)),
        ({"sentence_bert_config": None, "tokenizer_config": {"model_max_length": 31}}, ("mean", False, 31)),
        ({"sentence_bert_config": None, "tokenizer_config": {"model_max_length": None}}, ("mean", False, 62)),
        ({"sentence_bert_config": None, "tokenizer_config": {"model_max_length": 10**30}}, ("mean", False, 62)),
        (
            {"sentence_bert_config": {"max_seq_length": None}, "tokenizer_config": {"model_max_length": 31}},
            ("mean", False, 31),
        ),
        ({"sentence_bert_config": None, "sentence_mpnet_config": {"max_seq_length": 11}}, ("mean", False, 11)),
        # a plain Hugging Face folder
        ({"modules": None, "1_Pooling__config": None, "sentence_bert_config": None}, ("mean", False, 62)),
    ],
)
def test_pooling_normalisation_and_limit_are_read(tmp_path, files, expected):
    write(tmp_path, "mpnet", **files)
    c = load_encoder(tmp_path).config
    assert (c.pooling, c.normalize, c.max_seq_length) == expected


@pytest.mark.parametrize(
    ("said", "limit"), [({"max_seq_length": 1024}, 1024), ({"max_seq_length": None}, 2048), (None, 2048)]
)
def test_texts_are_cut_where_the_folder_says_even_beyond_512(tmp_path, said, limit):
    large = replace(tiny.ENCODER, max_position_embeddings=2048)
    write(tmp_path, config=sizes("bert", large), sentence_bert_config=said)
    save_file(named_weights(large), tmp_path / "model.safetensors")
    assert load_encoder(tmp_path).config.max_seq_length == limit


def test_the_transformer_may_lie_in_a_folder_of_its_own(tmp_path):
    write(tmp_path, "distilbert", inner="0_Transformer/")
    assert load_encoder(tmp_path).config.max_seq_length == 20


def test_texts_are_lower_cased_first_where_the_folder_says_so(tmp_path):
    write(tmp_path)
    as_is = load_encoder(tmp_path)
    write(tmp_path, sentence_bert_config={"max_seq_length": 20, "do_lower_case": True})
    lowered = load_encoder(tmp_path)
    rows = [tokenize(e.backend, ["HEAT", "heat"], 20)[0].tolist() for e in (as_is, lowered)]
    assert rows[0][0] != rows[0][1]
    assert rows[1][0] == rows[1][1] == rows[0][1]


@pytest.mark.parametrize("architecture", bert.ARCHITECTURES)
def test_a_vocabulary_alone_gives_the_tokenizer_that_transformers_makes_of_it(tmp_path, architecture):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    write(tmp_path, architecture, tokenizer_config={"do_lower_case": True})
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    first, last = ("<s>", "</s>") if architecture == "mpnet" else ("[CLS]", "[SEP]")
    backend = load_encoder(tmp_path).backend
    theirs = transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), cls_token=first, sep_token=last)
    for text in ("Heat", "he, hé. hat", "", "Ω heat"):
        assert backend.encode(text).ids == theirs(text)["input_ids"], text


# ----------------------------------------------------------------------------------------------- weights old and new


@pytest.mark.parametrize("architecture", bert.ARCHITECTURES)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_the_bin_and_the_safetensors_of_one_model_are_equal(tmp_path, architecture, legacy):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    c = write(tmp_path, architecture)
    encoder = load_encoder(tmp_path)
    names = named_weights(c)
    (tmp_path / "model.safetensors").unlink()
    table = {name: torch.tensor(array) for name, array in names.items()}
    torch.save(table, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    again = load_encoder(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, encoder.weights, again.weights)
    if not legacy:
        np.testing.assert_array_equal(encode(encoder, TEXTS), encode(again, TEXTS))


def test_a_work_directory_knows_the_model_that_it_was_made_with(tmp_path):
    write(tmp_path, inner="0_Transformer/")
    weights = tmp_path / "0_Transformer" / "model.safetensors"
    before = model_files(tmp_path)
    assert {"0_Transformer/model.safetensors", "0_Transformer/config.json", "modules.json"} <= set(before)
    assert model_files(weights) == {weights.name: before["0_Transformer/model.safetensors"]}
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1  # one bit of one weight, in a file of the same size
    weights.write_bytes(content)
    after = model_files(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"0_Transformer/model.safetensors"}
    large = tmp_path / "large.bin"
    with open(large, "wb") as file:
        file.truncate(40 << 20)
    hole = digest(large)
    with open(large, "r+b") as file:
        file.seek(40 << 19)
        file.write(b"x" * (1 << 20))
    assert digest(large) != hole


@pytest.mark.parametrize("architecture", bert.ARCHITECTURES)
def test_a_file_that_transformers_saved_with_its_pooler_and_task(tmp_path, architecture):
    """Names with the model's prefix, LayerNorm's old names, a head, position ids; half precision."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    c = write(tmp_path, architecture)
    names = named_weights(c)
    (tmp_path / "model.safetensors").unlink()
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
           for name, array in names.items()}  # fmt: skip
    table = {f"{architecture}.{name}": torch.tensor(array).half() for name, array in old.items()}
    table |= {"cls.predictions.bias": torch.zeros(3), f"{architecture}.pooler.dense.bias": torch.zeros(8)}
    table |= {f"{architecture}.embeddings.position_ids": torch.arange(64).expand((1, -1))}
    torch.save(table, tmp_path / "pytorch_model.bin")
    found = load_encoder(tmp_path).weights["weights"]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float16)), found, weights_of(c))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("prefix", ["0.auto_model.", "0.model."])
def test_a_file_of_a_whole_sentence_transformer(tmp_path, prefix):
    """As the public code saves its fine-tuned encoder."""
    c = write(tmp_path, "distilbert")
    names = named_weights(c)
    save_file({prefix + name: array for name, array in names.items()}, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_encoder(tmp_path).weights["weights"], weights_of(c))


# ------------------------------------------------------------------------------------------------------------ texts


def test_texts_without_end_or_without_anything(tmp_path):
    write(tmp_path)
    encoder = load_encoder(tmp_path)
    tokens, lengths = tokenize(encoder.backend, TEXTS, encoder.config.max_seq_length)
    assert lengths.tolist() == [6, 2, 2, 20, 20]
    assert tokens[1, :2].tolist() == tokens[2, :2].tolist() == [0, 1]  # the marks alone
    assert tokens[4, -1] == 1  # cut, but closed
    np.testing.assert_array_equal(tokens[4, :-1], tokenize(encoder.backend, ["x" * 19], 64)[0][0, :19])
    Q = encode(encoder, TEXTS)
    assert np.isfinite(Q).all()
    np.testing.assert_allclose(Q[1], Q[2], rtol=1e-6)
    assert np.abs(Q[0] - Q[1]).max() > 1e-3


@pytest.mark.parametrize("architecture", bert.ARCHITECTURES)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_texts_embedding_does_not_depend_on_its_padding(architecture, pooling):
    """Padded even beyond the last position, with rubbish."""
    c = replace(tiny.ENCODER, architecture=architecture, pooling=pooling, max_position_embeddings=16)
    encoder = build(c, weights_of(c), None)
    forward = jax.jit(lambda w, t, m: nnx.merge(encoder.graph, w)(t, m))
    tokens = np.random.default_rng(0).integers(1, 50, (1, 16)).astype(np.int32)
    short = forward(encoder.weights, tokens[:, :5], np.ones((1, 5), bool))
    np.testing.assert_allclose(forward(encoder.weights, tokens, np.arange(16)[None] < 5), short, rtol=1e-5, atol=1e-6)
    with pytest.raises((ValueError, TypeCheckError), match="17 tokens"):
        forward(encoder.weights, np.zeros((1, 17), np.int32), np.ones((1, 17), bool))


@pytest.mark.parametrize("architecture", bert.ARCHITECTURES)
def test_dropout_is_on_with_keys_alone_and_a_row_depends_on_its_own(architecture):
    c = replace(tiny.ENCODER, architecture=architecture)
    encoder = build(c, weights_of(c), None)
    tokens, mask = np.full((3, 6), 7, np.int32), np.ones((3, 6), bool)
    run = jax.jit(lambda w, k: nnx.merge(encoder.graph, w)(jnp.asarray(tokens), jnp.asarray(mask), k))
    keys = jax.random.split(jax.random.key(1), 2)
    first, second, again = np.asarray(run(encoder.weights, keys[jnp.array([0, 1, 0])]))
    np.testing.assert_allclose(first, again, rtol=1e-6)
    assert np.abs(first - second).max() > 1e-3
    none = np.asarray(run(encoder.weights, None))
    np.testing.assert_allclose(none[0], none[1], rtol=1e-6)
    assert np.abs(first - none[0]).max() > 1e-3


def test_in_bfloat16_the_embedding_points_the_same_way():
    c = replace(tiny.ENCODER, normalize=True)
    encoder = build(c, weights_of(c), None)
    tokens = np.random.default_rng(0).integers(1, 50, (4, 20)).astype(np.int32)
    run = jax.jit(lambda w: nnx.merge(encoder.graph, w)(jnp.asarray(tokens), jnp.ones((4, 20), bool)))
    whole, half = run(encoder.weights), run(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), encoder.weights))
    assert half.dtype == jnp.float32
    assert np.sum(np.asarray(whole) * np.asarray(half), axis=1).min() > 0.999


def test_a_row_without_tokens_gives_no_nan():
    """It may fill up a batch."""
    c = replace(tiny.ENCODER, normalize=True)
    encoder = build(c, weights_of(c), None)
    tokens, mask = jnp.full((2, 4), 7), jnp.array([[True] * 4, [False] * 4])
    loss = jax.jit(jax.grad(lambda w: jnp.sum(nnx.merge(encoder.graph, w)(tokens, mask) ** 3)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loss(encoder.weights)))


# ------------------------------------------------------------------------------------------------------- full size

MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
FULL = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
# Published are the numbers with BERT's and MPNet's pooler (h h + h), which no sentence embedding goes through.
PUBLISHED = {
    "all-minilm-l6-v2": ({**MINILM, "num_hidden_layers": 6}, 22_713_216),
    "all-minilm-l12-v2": ({**MINILM, "num_hidden_layers": 12}, 33_360_000),
    "bge-small-en-v1.5": ({**MINILM, "num_hidden_layers": 12, "pooling": "cls", "normalize": True}, 33_360_000),
    "bge-base-en-v1.5": ({**FULL, "num_hidden_layers": 12, "pooling": "cls", "normalize": True}, 109_482_240),
    "bert-base-uncased": ({**FULL, "num_hidden_layers": 12}, 109_482_240),
    "nq-distilbert-base-v1": ({**FULL, "num_hidden_layers": 6, "architecture": "distilbert"}, 66_362_880),
    "all-mpnet-base-v2": (
        {**FULL, "num_hidden_layers": 12, "architecture": "mpnet", "vocab_size": 30527, "max_position_embeddings": 514},
        109_486_464,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_by_its_shapes(name):
    fields, published = PUBLISHED[name]
    c = EncoderConfig(**{"vocab_size": 30522, **fields})
    pooler = 0 if c.architecture == "distilbert" else c.hidden_size**2 + c.hidden_size
    assert params.count(bert.describe(c)) + pooler == published
    encoder = nnx.eval_shape(lambda: TextEncoder(c, jax.random.key(0)))
    graph, weights = nnx.split(encoder)
    assert sum(leaf.size for leaf in jax.tree.leaves(weights)) + pooler == published
    tokens, mask = (jax.ShapeDtypeStruct((32, c.longest), dtype) for dtype in (jnp.int32, jnp.bool_))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 32))
    Q = jax.eval_shape(lambda w, t, m, k: nnx.merge(graph, w)(t, m, k), weights, tokens, mask, keys)
    assert (Q.shape, Q.dtype) == ((32, c.hidden_size), jnp.float32)
    assert c.longest == 512


# --------------------------------------------------------------------------------------------------- not supported


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, r"'roberta' is not supported \(known: bert, distilbert, mpnet\)"),
        ({"model_type": None}, r"None is not supported \(known: bert, distilbert, mpnet\)"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', but only 'gelu' is supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_size": 7}, "7 is no multiple of 2 heads"),
        ({"hidden_size": "8"}, "settings are damaged"),
        ({"hidden_size": 16}, r"'embeddings\.LayerNorm\.bias' has shape \(8,\), which does not fit \(16,\)"),
        ({"num_hidden_layers": 3}, r"'encoder\.layer\.2\..*' is missing"),
        ({"num_hidden_layers": 1}, r"unknown tensor 'encoder\.layer\.1\."),
        ({"vocab_size": 100}, "the tokenizer knows 263 tokens, but the encoder 100"),
    ],
)
def test_an_encoder_that_is_another_than_its_config_says(tmp_path, change, message):
    write(tmp_path, config=sizes("bert", tiny.ENCODER) | change)
    with pytest.raises(UserError, match=message) as error:
        load_encoder(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"modules": [*BASE, module("Dense", "2_Dense")]},
            r"Transformer, Pooling, Dense \(known: Transformer, Pooling",
        ),
        ({"modules": [module("StaticEmbedding")]}, "made of StaticEmbedding"),
        ({"modules": BASE[:1]}, r"made of Transformer \(known"),
        ({"modules": BASE[::-1]}, "made of Pooling, Transformer"),
        ({"modules": [*BASE, module("Pooling", "2_Pooling")]}, "made of Transformer, Pooling, Pooling"),
        ({"modules": [BASE[0], *BASE]}, "made of Transformer, Transformer, Pooling"),
        ({"sentence_bert_config": {"max_seq_length": 0}}, "settings are damaged .*texts cut at 0 tokens"),
        ({"sentence_bert_config": {"max_seq_length": "20"}}, "settings are damaged"),
        ({"modules": [{"path": ""}]}, "settings are damaged"),
        ({"1_Pooling__config": {"pooling_mode_max_tokens": True}}, r"pooling by max_tokens \(known: mean, cls\)"),
        (
            {"1_Pooling__config": {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}},
            "pooling by max_tokens and mean_tokens",
        ),
        ({"1_Pooling__config": {"pooling_mode": "lasttoken"}}, "pooling by lasttoken"),
        ({"1_Pooling__config": {"pooling_mode_mean_tokens": False}}, "pooling by nothing"),
        ({"1_Pooling__config": None}, r"1_Pooling.config\.json is missing"),
        ({"config": None}, r"config\.json is missing"),
        ({"config": {"model_type": "bert"}}, "has no 'vocab_size'; is it the config of a bert encoder"),
        ({"config": []}, "settings are damaged"),
        ({"config_sentence_transformers": {"default_prompt_name": "query"}}, "the prompt 'query'"),
    ],
)
def test_settings_that_are_not_supported_are_named(tmp_path, files, message):
    write(tmp_path, **files)
    with pytest.raises(UserError, match=message) as error:
        load_encoder(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", None, r"holds no weights: put model\.safetensors or pytorch_model\.bin there"),
        ("model.safetensors", "x", "damaged"),
        ("tokenizer.json", None, r"no tokenizer\.json \(nor vocab\.txt\)"),
        ("tokenizer.json", "{}", "damaged"),
        ("config.json", "{", "settings are damaged"),
    ],
)
def test_files_that_are_missing_or_damaged_are_named(tmp_path, file, content, message):
    write(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_encoder(tmp_path)
    assert "\n" not in str(error.value)
