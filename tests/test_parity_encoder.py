"""The sentence encoders give the embeddings that transformers gives, on random weights and on the real MiniLM."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from parity import assert_trees_close, gradients_of, load, randomised  # noqa: E402

from allmrec_jax.models import bert, text_encoder  # noqa: E402
from allmrec_jax.models.bert import EncoderConfig  # noqa: E402
from allmrec_jax.torch_baseline.alignment import SentenceEncoder, in_transformers  # noqa: E402
from allmrec_jax.training.align import encode_items, item_texts  # noqa: E402

TIME = 16
PAD = 1  # MPNet in transformers tells padding by this id


def tiny(architecture: str, heads: int = 2, eps: float = 1e-12, **change) -> EncoderConfig:
    """Three layers, 24 wide; room for exactly `TIME` tokens."""
    c = EncoderConfig(50, 24, 40, 3, heads, layer_norm_eps=eps, architecture=architecture, **change)
    return replace(c, max_position_embeddings=TIME + c.first_position)


class Pooled(torch.nn.Module):
    """The first state in place of their mean."""

    def __init__(self, transformer, normalize):
        super().__init__()
        self.transformer, self.normalize = transformer, normalize

    def forward(self, tokens, mask):
        Q = self.transformer(input_ids=tokens, attention_mask=mask.long()).last_hidden_state[:, 0]
        return torch.nn.functional.normalize(Q, dim=-1) if self.normalize else Q


@pytest.fixture(scope="module")
def batch():
    """Texts of 1 to `TIME` tokens, padded on the right."""
    random = np.random.default_rng(0)
    mask = np.arange(TIME)[None] < np.array([1, 2, 7, TIME, TIME])[:, None]
    tokens = np.where(mask, random.integers(2, 50, mask.shape), PAD).astype(np.int32)
    return SimpleNamespace(tokens=tokens, mask=mask, towards=random.normal(size=(5, 24)).astype(np.float32))


@pytest.mark.parametrize(
    ("architecture", "heads", "eps", "pooling", "normalize"),
    [
        ("bert", 2, 1e-12, "mean", False),
        ("bert", 4, 1e-3, "cls", True),
        ("distilbert", 4, 1e-12, "mean", False),
        ("distilbert", 2, 1e-12, "cls", False),
        ("mpnet", 4, 1e-5, "mean", True),
        ("mpnet", 2, 1e-5, "cls", False),
    ],
)
def test_a_random_encoder_is_equal_in_value_and_gradient(batch, architecture, heads, eps, pooling, normalize):
    c = tiny(architecture, heads, eps, pooling=pooling, normalize=normalize)
    description = bert.describe(c)
    tree = randomised(jax.random.key(heads), description)
    pooled = Pooled if pooling == "cls" else SentenceEncoder
    theirs = pooled(load(in_transformers(c).eval(), description, tree), normalize=normalize).eval()
    encoder = text_encoder.build(c, tree, None)

    @jax.jit
    def ours(weights):
        def value(weights):
            Q = nnx.merge(encoder.graph, weights)(jnp.asarray(batch.tokens), jnp.asarray(batch.mask))
            return jnp.sum(Q * batch.towards), Q

        return jax.value_and_grad(value, has_aux=True)(weights)

    (value, found), gradients = ours(encoder.weights)
    Q = theirs(torch.tensor(batch.tokens), torch.tensor(batch.mask))
    np.testing.assert_allclose(found, Q.detach(), rtol=1e-4, atol=1e-5)
    expected = (Q * torch.tensor(batch.towards)).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-4)
    gradients, expected = gradients["weights"], gradients_of(theirs.transformer, description)
    for tree in (gradients, expected):  # 0 but for rounding: it shifts all logits of a query alike
        assert np.abs(tree["layers"]["k"].pop("bias")).max() < 1e-5
    assert_trees_close(gradients, expected, atol=1e-5)


def test_relative_positions_fall_into_the_buckets_of_mpnet():
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    query, key = torch.arange(512)[:, None], torch.arange(512)[None, :]
    expected = MPNetEncoder.relative_position_bucket(key - query)
    np.testing.assert_array_equal(bert.relative_buckets(512), expected)


@pytest.mark.parametrize("rates", [(0.5, 0.0), (0.0, 0.5)], ids=["hidden", "attention"])
@pytest.mark.parametrize("architecture", bert.ARCHITECTURES)
def test_dropout_falls_where_transformers_has_it(batch, architecture, rates):
    """Over many draws Q has the same mean and the same spread; a place too few or too many shows in the latter."""
    c = tiny(architecture, dropout=rates[0], attention_dropout=rates[1])
    description, draws = bert.describe(c), 600
    tree = randomised(jax.random.key(5), description, spread=0.4)  # attention's part of the sum must count
    module = load(in_transformers(c).eval(), description, tree)
    of_weights = {"bert": "attention.self", "distilbert": "attention", "mpnet": "attention.attn"}[architecture]
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = c.attention_dropout if name.endswith(f"{of_weights}.dropout") else c.dropout
    tokens, mask = (np.repeat(array[3:4], draws, 0) for array in (batch.tokens, batch.mask))
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = SentenceEncoder(module).train()(torch.tensor(tokens), torch.tensor(mask)).numpy()
    encoder = text_encoder.build(c, tree, None)
    keys = jax.random.split(jax.random.key(0), draws)
    ours = jax.jit(lambda w, t, m, k: nnx.merge(encoder.graph, w)(t, m, k))(encoder.weights, tokens, mask, keys)
    ours = np.asarray(ours)
    error = np.sqrt((ours.var(0) + theirs.var(0)) / draws)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) / error).max() < 4.5
    np.testing.assert_allclose(np.sqrt(ours.var(0).sum()), np.sqrt(theirs.var(0).sum()), rtol=0.05)


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
