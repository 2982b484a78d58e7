"""A GGUF file read by us and by transformers gives the same logits and the same tokens."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which transformers needs to read GGUF, is not installed")
gguf = pytest.importorskip("gguf", reason="gguf is not installed")

import tiny  # noqa: E402
from parity import assert_trees_close, randomised  # noqa: E402

from allmrec_jax.models import params  # noqa: E402
from allmrec_jax.models.llm import llama, load  # noqa: E402

C = llama.LlamaConfig(
    vocab_size=len(tiny.byte_tokenizer().backend.get_vocab()),
    hidden_size=32,  # a block of Q8_0
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=2**-12,  # exact in float32, as GGUF stores it
    rope_theta=500.0,
    max_position_embeddings=256,
)
HARD_TEXTS = [
    ' is a user representation. This user has watched "Toy Story","Heat" in the previous.',
    '","',
    '"12 Monkeys (1995)"',
    "1234567890 3.14 1,000,000 2nd 007",
    "'Til There Was You: it's he'll WE'VE i'm'd",
    "Misérables, Les; Cité des enfants perdus, La; Ölprinz; ¿Qué?",
    "“curly” ‘quotes’ — and … dots",
    "日本語 한국어 עברית Ελληνικά",
    "🎬🍿 emoji 👩‍🚀",
    "  two  spaces   three\ttab\n\nlines \r\n end ",
    "",
    " ",
    "e\u0301 combining \u00a0 no-break \u200b zero",
    "The recommendation is ",
    "ALL-CAPS_and_snake/camelCase<tag>&amp;",
    "<|im_start|>user\nHi<|im_end|>",
    "<|endoftext|>x",
]
# Where transformers, reading GGUF, differs from the model's own tokenizer; see the test of digits below.
SPACES_BEFORE_DIGIT = re.compile(r"\s\s\d")


def _logits(llm: load.FrozenLLM, tokens: np.ndarray) -> np.ndarray:
    def forward(weights, tokens):
        module = nnx.merge(llm.graph, weights)
        return module.logits(module(module.embed(tokens), jnp.zeros_like(tokens)))

    return np.asarray(jax.jit(forward)(llm.weights, tokens))


def _their_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


# ------------------------------------------------------------------------------------------------------- a tiny file


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as GGUF stores them: row k of a head's first half beside row k of its second half.

    0 1 2 3 | 4 5 6 7   ->   0 4 1 5 2 6 3 7
    """
    out = np.empty_like(weight)
    for rows_in, rows_out in zip(np.split(weight, heads), np.split(out, heads), strict=True):
        half = len(rows_in) // 2
        rows_out[0::2], rows_out[1::2] = rows_in[:half], rows_in[half:]
    return out


def _write(path: Path, tree, quantise: bool) -> Path:
    """A GGUF file as llama.cpp writes it; matrices in Q8_0 if `quantise`, the tokenizer inside."""
    tensors = params.to_torch(llama.describe(C), tree)
    kinds = {hugging_face: name for name, hugging_face in load.GGUF_NAMES.items()}
    backend = tiny.byte_tokenizer().backend
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(C.max_position_embeddings)
    writer.add_embedding_length(C.hidden_size)
    writer.add_block_count(C.num_hidden_layers)
    writer.add_feed_forward_length(C.intermediate_size)
    writer.add_head_count(C.num_attention_heads)
    writer.add_head_count_kv(C.num_key_value_heads)
    writer.add_rope_dimension_count(C.head_dim)
    writer.add_layer_norm_rms_eps(C.rms_norm_eps)
    writer.add_rope_freq_base(C.rope_theta)
    writer.add_vocab_size(C.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<b>", "<e>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tiny.MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, array in tensors.items():
        if name in kinds:
            stored = kinds[name]
        else:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            stored = f"blk.{layer}.{kinds[part]}.weight"
        if "q_proj" in name or "k_proj" in name:
            array = _interleaved(array, C.num_attention_heads if "q_proj" in name else C.num_key_value_heads)
        if quantise and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tree():
    return randomised(jax.random.key(0), llama.describe(C), spread=0.2)


def test_a_file_in_full_precision_gives_the_weights_back(tree, tmp_path):
    llm = load.load_llm(_write(tmp_path / "tiny.gguf", tree, quantise=False))
    assert llm.config == C
    assert_trees_close(llm.weights["weights"], tree, rtol=0, atol=0)


@pytest.mark.parametrize("quantise", [False, True], ids=["F32", "Q8_0"])
def test_a_tiny_file_gives_the_same_logits(tree, tmp_path, quantise):
    path = _write(tmp_path / "tiny.gguf", tree, quantise)
    tokens = np.random.default_rng(0).integers(0, C.vocab_size, (2, 17))
    ours, theirs = _logits(load.load_llm(path), tokens), _their_logits(path, tokens)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert np.ptp(theirs, axis=-1).min() > 1


# ------------------------------------------------------------------------------------------------------ the real file


@pytest.fixture(scope="module")
def real_file(weights) -> Path:
    files = sorted(weights("smollm2-135m-instruct").glob("*.gguf"))
    if not files:
        pytest.skip("the cache holds SmolLM2 as safetensors, not as GGUF")
    return files[0]


@pytest.fixture(scope="module")
def real_llm(real_file) -> load.FrozenLLM:
    return load.load_llm(real_file)


@pytest.fixture(scope="module")
def titles(weights, tmp_path_factory) -> list[str]:
    weights("ml-100k")
    from allmrec_jax.data.prepare import prepare

    dataset = prepare("ml-100k", tmp_path_factory.mktemp("data") / "ml-100k")
    return [f'"{title}"' for title in dataset.titles()[1:]]


@pytest.fixture(scope="module")
def their_tokenizer(real_file):
    return transformers.AutoTokenizer.from_pretrained(real_file.parent, gguf_file=real_file.name)


def test_the_real_tokenizer_gives_the_same_ids(real_llm, their_tokenizer, titles):
    random = np.random.default_rng(0)
    alphabet = list("aZé 0123456789\"'.,:;!?()[]-_&/\\\n\t  ßñ漢🎬")
    noise = ["".join(random.choice(alphabet, random.integers(1, 40))) for _ in range(400)]
    texts = [*HARD_TEXTS, *titles, *(text for text in noise if not SPACES_BEFORE_DIGIT.search(text))]
    ours = real_llm.tokenizer(texts)
    theirs = their_tokenizer(texts, add_special_tokens=False)["input_ids"]
    wrong = [text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    assert not wrong
    assert len(texts) > 1000
    for text, ids in zip(texts, ours, strict=True):
        assert real_llm.tokenizer.decode(ids) == their_tokenizer.decode(ids, skip_special_tokens=True), text


def test_digits_are_split_off_before_anything_else(real_llm):
    """The file's `smollm` pre-tokeniser, which transformers drops when it reads GGUF."""
    together, spaces, digit = real_llm.tokenizer(["x \n2", "x \n", "2"])
    assert together == spaces + digit


def test_the_real_tokenizer_puts_nothing_in_front(real_llm, their_tokenizer):
    assert real_llm.tokenizer.bos is None
    assert their_tokenizer("Heat")["input_ids"] == real_llm.tokenizer(["Heat"])[0]
    assert real_llm.tokenizer.eos == their_tokenizer.eos_token_id == 2


def test_the_real_llm_gives_the_same_logits(real_file, real_llm):
    text = (
        'This user has watched "Toy Story","Heat" in the previous. Recommend one next movie. The answer is "12 Monkeys"'
    )
    tokens = np.array([*real_llm.tokenizer([text]), *real_llm.tokenizer([text])[:1]])
    tokens[1] = tokens[1][::-1]
    ours, theirs = _logits(real_llm, tokens), _their_logits(real_file, tokens)
    assert np.abs(ours - theirs).max() < 1e-3
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
    assert np.abs(theirs).max() > 10
