"""A GGUF file read by us and by transformers gives the same logits and the same tokens."""

import dataclasses
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

from allmrec_jax.errors import UserError  # noqa: E402
from allmrec_jax.models import params  # noqa: E402
from allmrec_jax.models.llm import gguf_file, llama, load, rotary  # noqa: E402

# A row is one block of the K-quants.
C = llama.LlamaConfig(
    vocab_size=len(tiny.byte_tokenizer().backend.get_vocab()),
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rms_norm_eps=2**-12,  # exact in float32, as GGUF stores it
    rope_theta=500.0,
    max_position_embeddings=256,
)
KINDS = {
    "llama": C,  # Mistral's files too
    "llama, untied": dataclasses.replace(C, tie_word_embeddings=False),
    "qwen2": dataclasses.replace(C, qkv_bias=True),
    # transformers takes heads of Qwen3 to be 128 wide, whatever the file says
    "qwen3": dataclasses.replace(C, qk_norm=True, tie_word_embeddings=False, head_dim=128),
}
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


def _blocks(shape: tuple[int, int], kind: gguf.GGMLQuantizationType, random: np.random.Generator) -> np.ndarray:
    """A random matrix in a K-quant, which `gguf` reads but does not write: small scales, everything else at random."""
    size, scales = {"Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,)), "Q3_K": (110, (108,))}[
        kind.name
    ]
    blocks = random.integers(0, 256, (shape[0], shape[1] // 256, size), dtype=np.uint8)
    for k, at in enumerate(scales):
        value = np.float16((2e-4, 1e-3)[k] if len(scales) == 2 else 2e-5 if kind.name == "Q6_K" else 4e-4)
        blocks[..., at : at + 2] = np.frombuffer(value.tobytes(), np.uint8)
    return blocks.reshape(shape[0], -1)


def _write(path: Path, kind: str, c: llama.LlamaConfig, tree, quant: str = "F32") -> Path:
    """A GGUF file as llama.cpp writes it; matrices in `quant`, the tokenizer inside."""
    tensors, name = params.to_torch(llama.describe(c), tree), kind.split(",")[0]
    names = {there: here for here, there in gguf_file.NAMES.items()}
    byte_level = tiny.byte_tokenizer().backend.get_vocab()
    tokens = sorted(byte_level, key=byte_level.__getitem__)
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    if name == "llama":
        writer.add_rope_dimension_count(c.head_dim)
    else:
        writer.add_key_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    if c.rope_scaling is not None and c.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_scaling.factor)
    elif c.rope_scaling is not None:
        writer.add_tensor(gguf_file.DIVISORS, np.array(c.rope_scaling.divisors, np.float32))
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<b>", "<e>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tiny.MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random, how = np.random.default_rng(0), gguf.GGMLQuantizationType[quant]
    for their_name, array in tensors.items():
        part, ending = their_name.rsplit(".", 1)
        if part in names:
            stored = f"{names[part]}.{ending}"
        else:
            _, _, layer, part = part.split(".", 3)
            stored = f"blk.{layer}.{names[part]}.{ending}"
        if name == "llama" and ("q_proj" in their_name or "k_proj" in their_name):
            array = _interleaved(array, c.num_attention_heads if "q_proj" in their_name else c.num_key_value_heads)
        if quant == "F32" or array.ndim == 1:
            writer.add_tensor(stored, array)
        elif quant.endswith("_K"):
            writer.add_tensor(stored, _blocks(array.shape, how, random), raw_dtype=how)
        else:
            writer.add_tensor(stored, gguf.quants.quantize(array, how), raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _random(c: llama.LlamaConfig):
    return jax.device_get(randomised(jax.random.key(0), llama.describe(c), spread=0.05))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_in_full_precision_gives_the_weights_back(kind, tmp_path):
    tree = _random(KINDS[kind])
    llm = load.load_llm(_write(tmp_path / "tiny.gguf", kind, KINDS[kind], tree))
    assert llm.config == KINDS[kind]
    assert_trees_close(llm.weights["weights"], tree, rtol=0, atol=0)


def _agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    assert np.ptp(theirs, axis=-1).min() > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_each_architecture_gives_the_same_logits(kind, tmp_path):
    path = _write(tmp_path / "tiny.gguf", kind, KINDS[kind], _random(KINDS[kind]), "Q8_0")
    tokens = np.random.default_rng(0).integers(0, C.vocab_size, (2, 17))
    _agree(_logits(load.load_llm(path), tokens), _their_logits(path, tokens))


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_each_way_of_storing_numbers_gives_the_same_logits(quant, tmp_path):
    path = _write(tmp_path / "tiny.gguf", "llama", C, _random(C), quant)
    tokens = np.random.default_rng(0).integers(0, C.vocab_size, (2, 17))
    _agree(_logits(load.load_llm(path), tokens), _their_logits(path, tokens))


def test_slowed_rotations_are_read_as_llama_cpp_stores_them(tmp_path):
    """Linear scaling as a field; Llama 3.1's as the divisor of each frequency, in a tensor."""
    three = rotary.Scaling("llama3", 8.0, 1.0, 4.0, 32)
    divisors = rotary.frequencies(64, 500.0) / rotary.frequencies(64, 500.0, three)
    assert set(np.round(divisors, 3)) > {1.0, 8.0}
    given = rotary.Scaling("given", divisors=tuple(divisors.tolist()))
    tokens = np.random.default_rng(0).integers(0, C.vocab_size, (2, 17))
    logits = {}
    for name, scaling in {"none": None, "linear": rotary.Scaling("linear", 4.0), "given": given}.items():
        c = dataclasses.replace(C, rope_scaling=scaling)
        llm = load.load_llm(_write(tmp_path / f"{name}.gguf", "llama", c, _random(c)))
        assert llm.config == c
        logits[name] = _logits(llm, tokens)
    c = dataclasses.replace(C, rope_scaling=three)
    np.testing.assert_allclose(_logits(load.build(c, _random(c), None), tokens), logits["given"], rtol=0, atol=1e-4)
    assert np.abs(logits["none"] - logits["given"]).max() > 0.01 < np.abs(logits["none"] - logits["linear"]).max()


@pytest.mark.parametrize(
    ("architecture", "says"),
    [("gemma3", "gemma3 is not supported.*llama, qwen2, qwen3"), ("llama", "damaged or lacks 'llama.attention")],
)
def test_another_or_an_incomplete_file_is_refused(architecture, says, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=says):
        load.load_llm(tmp_path / "x.gguf")


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
