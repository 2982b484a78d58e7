"""The sentence encoder gives the embeddings that transformers gives, on random weights and on the real MiniLM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from parity import assert_trees_close, gradients_of, load, randomised  # noqa: E402

from allmrec_jax.models import text_encoder  # noqa: E402
from allmrec_jax.torch_baseline.alignment import SentenceEncoder  # noqa: E402
from allmrec_jax.training.align import encode_items, item_texts  # noqa: E402


def _tiny(heads: int, eps: float) -> tuple[text_encoder.EncoderConfig, torch.nn.Module]:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=16,
        layer_norm_eps=eps,
    )
    ours = text_encoder.EncoderConfig(50, 24, 40, 3, heads, max_position_embeddings=16, layer_norm_eps=eps)
    return ours, transformers.BertModel(config, add_pooling_layer=False)


@pytest.mark.parametrize(("heads", "eps", "normalize"), [(2, 1e-12, False), (4, 1e-3, True)])
def test_a_random_bert_is_equal_in_value_and_gradient(heads, eps, normalize):
    c, bert = _tiny(heads, eps)
    description = text_encoder.describe(c)
    tree = randomised(jax.random.key(heads), description)
    theirs = SentenceEncoder(load(bert, description, tree), normalize=normalize).eval()
    encoder = text_encoder.build(text_encoder.EncoderConfig(**vars(c) | {"normalize": normalize}), tree, None)
    random = np.random.default_rng(0)
    lengths = np.array([1, 2, 7, 16, 16])
    mask = np.arange(16)[None] < lengths[:, None]
    tokens = (random.integers(1, 50, mask.shape) * mask).astype(np.int32)
    towards = random.normal(size=(5, 24)).astype(np.float32)

    @jax.jit
    @jax.value_and_grad
    def ours(weights):
        Q = nnx.merge(encoder.graph, weights)(jnp.asarray(tokens), jnp.asarray(mask))
        return jnp.sum(Q * towards)

    value, gradients = ours(encoder.weights)
    Q = theirs(torch.tensor(tokens), torch.tensor(mask))
    np.testing.assert_allclose(
        jax.jit(nnx.merge(encoder.graph, encoder.weights))(tokens, mask), Q.detach(), rtol=1e-4, atol=1e-5
    )
    expected = (Q * torch.tensor(towards)).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-4)
    gradients, expected = gradients["weights"], gradients_of(theirs.transformer, description)
    for tree in (gradients, expected):  # 0 but for rounding: it shifts all logits of a query alike
        assert np.abs(tree["layers"]["k"].pop("bias")).max() < 1e-5
    assert_trees_close(gradients, expected, atol=1e-5)


def test_a_texts_embedding_does_not_depend_on_its_padding():
    c, _ = _tiny(2, 1e-12)
    encoder = text_encoder.build(c, randomised(jax.random.key(0), text_encoder.describe(c)), None)
    forward = jax.jit(nnx.merge(encoder.graph, encoder.weights))
    tokens = (
        np.random.default_rng(0).integers(1, 50, (1, 16)).astype(np.int32)
    )  # what stands in the padding is not read
    short = forward(tokens[:, :5], np.ones((1, 5), bool))
    np.testing.assert_allclose(forward(tokens, np.arange(16)[None] < 5), short, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def real_texts(weights, tmp_path_factory):
    """200 item texts of MovieLens 100K, spread over the catalogue."""
    weights("ml-100k")
    from allmrec_jax.config import Alignment
    from allmrec_jax.data.prepare import prepare

    texts = item_texts(prepare("ml-100k", tmp_path_factory.mktemp("data") / "ml-100k"), Alignment().text)
    return [*texts[1 :: len(texts) // 200][:199], " Café: “l’été”, naïve & Œuvre № 5 — " * 60]  # one to be cut short


def test_the_real_minilm_is_equal_on_item_texts(weights, real_texts):
    folder = weights("all-minilm-l6-v2")
    encoder = text_encoder.load_encoder(folder)
    tokens, lengths = text_encoder.tokenize(encoder.backend, real_texts, encoder.config.max_seq_length)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        real_texts, padding=True, truncation=True, max_length=encoder.config.max_seq_length, return_tensors="pt"
    )
    assert lengths.max() == encoder.config.max_seq_length
    np.testing.assert_array_equal(tokens, batch["input_ids"])
    np.testing.assert_array_equal(lengths, batch["attention_mask"].sum(1))

    ours = encode_items(encoder, encoder.weights, tokens, lengths)
    theirs = SentenceEncoder(transformers.AutoModel.from_pretrained(folder), normalize=encoder.config.normalize).eval()
    order = np.argsort(lengths, kind="stable")
    expected = np.zeros_like(ours)
    with torch.no_grad():
        for rows in np.array_split(order, 8):
            longest = lengths[rows].max()
            ids, mask = (batch[name][rows, :longest] for name in ("input_ids", "attention_mask"))
            expected[rows] = theirs(ids, mask.bool()).numpy()
    assert encoder.config.normalize
    cosine = (ours * expected).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.99999
    assert np.abs(ours - expected).max() < 1e-5
    assert len(np.unique(ours.round(4), axis=0)) > 150  # different texts, different embeddings
