"""Every architecture and variant of it gives PyTorch's logits, from folders that transformers itself wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import tiny  # noqa: E402

from allmrec_jax.models import params  # noqa: E402
from allmrec_jax.models.llm.architectures import MODULES, read_config  # noqa: E402
from allmrec_jax.models.llm.load import FrozenLLM, load_llm  # noqa: E402
from allmrec_jax.models.llm.quantize import FLOAT32  # noqa: E402
from allmrec_jax.models.llm.sizes import PUBLISHED  # noqa: E402

VOCAB = 288
OPT = {"vocab_size": VOCAB, "hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
       "word_embed_proj_dim": 24, "max_position_embeddings": 64}  # fmt: skip
LLAMA = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 100.0}  # fmt: skip

VARIANTS = {
    "opt": ("OPT", OPT),
    "opt-350m": ("OPT", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 12}),
    "opt, projections, norms before": ("OPT", OPT | {"word_embed_proj_dim": 12}),
    "opt, untied": ("OPT", OPT | {"tie_word_embeddings": False}),
    "llama 2": ("Llama", LLAMA | {"num_key_value_heads": 4}),
    "llama 3": ("Llama", LLAMA | {"rope_parameters": LLAMA3}),
    "linear scaling": ("Llama", LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "smollm2": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "tinyllama": ("Llama", LLAMA | {"num_key_value_heads": 1}),
    "biases everywhere": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": None}),
    "mistral, a window": ("Mistral", LLAMA | {"sliding_window": 5}),
    "qwen 2": ("Qwen2", {k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "qwen 2, tied": ("Qwen2", {k: v for k, v in LLAMA.items() if k != "head_dim"} | {"tie_word_embeddings": True}),
    "qwen 3": ("Qwen3", LLAMA | {"head_dim": 12}),
    "qwen 3, biases": ("Qwen3", LLAMA | {"attention_bias": True, "tie_word_embeddings": True}),
}


def _theirs(kind: str, fields: dict, spread: float = 0.2) -> torch.nn.Module:
    """A random model of transformers, no bias 0 and no scale 1, attention far from uniform."""
    config = getattr(transformers, f"{kind}Config")(
        **fields, attn_implementation="eager", pad_token_id=None, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module", params=VARIANTS, ids=VARIANTS)
def both(request, tmp_path_factory) -> tuple[FrozenLLM, torch.nn.Module]:
    """(ours, theirs), ours read from the folder that theirs was saved to."""
    kind, fields = VARIANTS[request.param]
    theirs = _theirs(kind, fields)
    folder = tmp_path_factory.mktemp("llm")
    theirs.save_pretrained(folder)
    tiny.byte_tokenizer().backend.save(str(folder / "tokenizer.json"))
    return load_llm(folder), theirs


def test_rows_of_different_lengths_padded_on_either_side_give_the_same_logits(both):
    """`branch` is -1 where PyTorch's mask is 0; also over fewer rows of the output (`logit_rows`)."""
    llm, theirs = both
    lengths = np.array([13, 4, 9])[:, None]
    right, left = np.arange(13)[None] < lengths, np.arange(13)[None] >= 13 - lengths
    mask = np.concatenate([right, left])
    x = np.random.default_rng(0).normal(size=(6, 13, llm.width)).astype(np.float32)

    @jax.jit
    def forward(weights, x, branch):
        module = nnx.merge(llm.graph, weights)
        hidden = module(x, branch)
        return module.logits(hidden), module.logits(hidden, 200)

    ours, fewer = map(np.asarray, forward(llm.weights, x, np.where(mask, 0, -1)))
    long = torch.tensor(mask).long()
    positions = {} if isinstance(theirs, transformers.OPTForCausalLM) else {"position_ids": (long.cumsum(1) - 1) * long}
    with torch.no_grad():
        expected = theirs(inputs_embeds=torch.tensor(x), attention_mask=long, **positions).logits.numpy()
    scale = np.abs(expected).max()
    assert np.abs(ours - expected)[mask].max() < 1e-5 * scale
    assert np.abs(fewer - expected[..., :200])[mask].max() < 1e-5 * scale
    assert np.ptp(expected[mask], axis=-1).min() > 1


def test_tokens_give_the_same_logits_and_injected_embeddings_the_same_gradients(both):
    llm, theirs = both
    tokens = np.random.default_rng(1).integers(0, VOCAB, (2, 11))
    towards = np.random.default_rng(2).normal(size=(2, 11, VOCAB)).astype(np.float32)

    @jax.jit
    def ours(weights, tokens):
        module = nnx.merge(llm.graph, weights)

        def value(x):
            logits = module.logits(module(x, jnp.zeros_like(tokens), remat=jax.checkpoint_policies.nothing_saveable))
            return jnp.sum(logits * towards), logits

        return jax.grad(value, has_aux=True)(module.embed(tokens))

    gradient, logits = ours(llm.weights, tokens)
    x = theirs.get_input_embeddings()(torch.tensor(tokens)).detach().requires_grad_()
    expected = theirs(inputs_embeds=x).logits
    (expected * torch.tensor(towards)).sum().backward()
    with torch.no_grad():
        np.testing.assert_array_equal(expected.detach(), theirs(torch.tensor(tokens)).logits)
    scale = expected.detach().abs().max().item()
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-4, atol=1e-5 * x.grad.abs().max().item())


# ---------------------------------------------------------------------------------------------------------- full sizes


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_full_size_model_has_the_published_number_of_parameters(name):
    """And runs as far as its shapes: the module that its own config.json describes, without any weights."""
    raw, published = PUBLISHED[name]
    config = read_config(raw, name)
    module = MODULES[type(config)]
    assert params.count(module.describe(config)) == published

    def forward(tokens):
        model = module(config, jax.random.key(0), FLOAT32)
        return model.embed(tokens), model.logits(model(model.embed(tokens), jnp.zeros_like(tokens)))

    embedded, logits = jax.eval_shape(forward, jax.ShapeDtypeStruct((2, 16), jnp.int32))
    assert embedded.shape == (2, 16, config.width)
    assert logits.shape == (2, 16, raw["vocab_size"])
    assert config.width == (512 if name == "opt-350m" else raw["hidden_size"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_numbers_are_those_of_transformers(name):
    raw, published = PUBLISHED[name]
    kind = raw["architectures"][0].removesuffix("ForCausalLM")
    config = getattr(transformers, f"{kind}Config")(**{k: v for k, v in raw.items() if k != "architectures"})
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    assert model.num_parameters() == published
