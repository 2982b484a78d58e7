"""Tiny data and models for the tests: real code, real formats, seconds instead of hours."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
