"""Tiny data and models for the tests: real code, real formats, seconds instead of hours."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from allmrec_jax.config import CF, Alignment, Injection
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.data.writer import write_dataset
from allmrec_jax.models import params, sasrec, text_encoder
from allmrec_jax.models.llm import llama, load
from allmrec_jax.models.llm.tokenizer import Tokenizer, from_backend
from allmrec_jax.training.cf import CFModel

N_ITEMS = 40
SASREC = sasrec.SASRecConfig(N_ITEMS, width=8, blocks=2, heads=2, maxlen=10, dropout=0.5)
LLAMA = llama.LlamaConfig(
    vocab_size=288,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
ENCODER = text_encoder.EncoderConfig(
    vocab_size=288,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    max_seq_length=64,
)

# Shrunken stages: their own defaults otherwise.
STAGE_0 = CF(width=8, blocks=1, maxlen=10, batch=16, epochs=6, evaluate_every=2)
STAGE_1 = Alignment(joint=6, batch=16, epochs=4, save_every=2)
STAGE_2 = Injection(history=3, candidates=4, batch=4, epochs=1.0, save_every=2, learning_rate=1e-2)

# Two-character tokens on top of the bytes; a Ġ is a space.
MERGES = [(",", '"'), ('"', "."), ("Ġ", "i"), ("Ġi", "s"), ("Ġ", '"')]


def dataset(path: Path, n_users: int = 30, n_items: int = N_ITEMS, seed: int = 0) -> Dataset:
    """Users of 3 to 12 distinct items, titled `Film 1`, `Film 2`, ...; the last item has neither title nor text."""
    random = np.random.default_rng(seed)
    sequences = [random.permutation(n_items)[: random.integers(3, 13)] + 1 for _ in range(n_users)]
    return of_sequences(
        path,
        sequences,
        n_items,
        titles=[*(f"Film {item}" for item in range(1, n_items)), None],
        descriptions=[*(f"Genre {item % 5}" for item in range(1, n_items)), None],
    )


def of_sequences(path: Path, sequences: Sequence[Sequence[int]], n_items: int, **texts: list[str | None]) -> Dataset:
    """The users whose items these are, one sequence each; without texts where none are given."""
    return write_dataset(
        path,
        name="tiny",
        items=np.concatenate(sequences),
        offsets=np.concatenate([[0, 0], np.cumsum([len(s) for s in sequences])]),
        times=None,
        ratings=None,
        user_keys=[f"u{user}" for user in range(1, len(sequences) + 1)],
        item_keys=[f"i{item}" for item in range(1, n_items + 1)],
        titles=texts.get("titles", [None] * n_items),
        descriptions=texts.get("descriptions", [None] * n_items),
        categories=[[]] * n_items,
    )


def byte_tokenizer(*, bos: bool = False, merges: Sequence[tuple[str, str]] = MERGES) -> Tokenizer:
    """A byte-level BPE tokenizer as GPT-2's with a handful of merges; `<e>` ends a text, `<b>` begins one if `bos`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<b>", "<e>", *alphabet, *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<b>", "<e>")])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 0)])
    return from_backend(backend, eos=1)


@functools.cache
def _weights(model: str) -> Any:
    """On the host, drawn in one compiled program."""
    describe = {
        "llama": llama.describe(LLAMA),
        "encoder": text_encoder.describe(ENCODER),
        "cf": sasrec.describe(SASREC),
    }
    return jax.device_get(jax.jit(lambda key: params.init(key, describe[model]))(jax.random.key(7)))


def frozen_llm(
    mesh: jax.sharding.Mesh | None = None, *, bos: bool = False, rules: Mapping[str, str] = params.AXIS_RULES
) -> load.FrozenLLM:
    """A random Llama that reads `byte_tokenizer`."""
    return load.build(LLAMA, _weights("llama"), byte_tokenizer(bos=bos), mesh=mesh, rules=rules)


def encoder() -> text_encoder.LoadedEncoder:
    """A random sentence encoder over bytes, its texts between `<b>` and `<e>`."""
    backend = byte_tokenizer().backend
    backend.post_processor = processors.TemplateProcessing(single="<b> $A <e>", special_tokens=[("<b>", 0), ("<e>", 1)])
    return text_encoder.build(ENCODER, jax.tree.map(jnp.asarray, _weights("encoder")), backend)


def cf_model() -> CFModel:
    """An untrained SASRec."""
    return CFModel(SASREC, jax.tree.map(jnp.asarray, _weights("cf")))


def joint_embeddings(width: int = 6) -> np.ndarray:
    """Something in place of e."""
    return np.random.default_rng(10).uniform(size=(N_ITEMS + 1, width)).astype(np.float32)


def write_movielens(folder: Path) -> Path:
    """40 users of 8 to 15 ratings on 60 films, in MovieLens 100K's own format."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows = []
    for user in range(1, 41):
        films = random.permutation(60)[: random.integers(8, 16)] + 1
        rows += [
            f"{user}\t{film}\t{random.integers(1, 6)}\t{880000000 + 60 * k + user}" for k, film in enumerate(films)
        ]
    (folder / "u.data").write_text("\n".join(rows) + "\n")
    flags = ["|".join(map(str, random.integers(0, 2, 19))) for _ in range(60)]
    items = [f"{i}|Film {i} ({1900 + i})|01-Jan-1995||http://example.org/{i}|{flags[i - 1]}" for i in range(1, 61)]
    (folder / "u.item").write_text("\n".join(items) + "\n", encoding="latin-1")
    return folder


def write_llm(folder: Path) -> Path:
    """A tiny Llama with random weights, as the Hugging Face hub lays one out."""
    c = LLAMA
    folder.mkdir(parents=True)
    description = llama.describe(c)
    save_file(params.to_torch(description, params.init(jax.random.key(3), description)), folder / "model.safetensors")
    names = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
        "max_position_embeddings",
        "tie_word_embeddings",
    ]
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "eos_token_id": 1} | {
        name: getattr(c, name) for name in names
    }
    (folder / "config.json").write_text(json.dumps(raw))
    byte_tokenizer().backend.save(str(folder / "tokenizer.json"))
    return folder


def write_encoder(folder: Path) -> Path:
    """A tiny BERT with random weights, as sentence-transformers lays one out."""
    c = ENCODER
    (folder / "1_Pooling").mkdir(parents=True)
    description = text_encoder.describe(c)
    save_file(params.to_torch(description, params.init(jax.random.key(4), description)), folder / "model.safetensors")
    names = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "type_vocab_size",
        "layer_norm_eps",
    ]
    raw = {"model_type": "bert", "hidden_dropout_prob": 0.1} | {name: getattr(c, name) for name in names}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "modules.json").write_text(json.dumps([{"type": "Transformer"}, {"type": "Pooling"}]))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": c.max_seq_length}))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    byte_tokenizer().backend.save(str(folder / "tokenizer.json"))
    return folder


def options(root: Path) -> list[str]:
    """Fields of the config on the command line that make a run tiny, with files in `root`."""
    small = {
        "data.name": write_movielens(root / "raw"),
        "align.encoder": write_encoder(root / "encoder"),
        "llm.llm": write_llm(root / "llm"),
        "cf.width": 8,
        "cf.maxlen": 10,
        "cf.batch": 16,
        "cf.epochs": 4,
        "cf.evaluate-every": 2,
        "align.joint": 6,
        "align.batch": 16,
        "align.epochs": 2,
        "align.save-every": 1,
        "llm.history": 3,
        "llm.candidates": 4,
        "llm.batch": 8,
        "llm.epochs": 1.0,
        "llm.save-every": 2,
        "evaluation.users": 12,
        "evaluation.validation-users": 12,
        "evaluation.examples": 5,
        "evaluation.candidates": 5,
        "evaluation.batch": 8,
        "evaluation.resamples": 200,
    }
    return [str(a) for name, value in small.items() for a in (f"--{name}", value)]
