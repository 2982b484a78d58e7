"""Benchmarks of stage 1: an encoder of the size of all-MiniLM-L6-v2, users and texts as many and as long as Beauty's.

    align.trained    users a second, the encoder trained, positives and negatives in every term (the public code)
    align.paper      the same, positives alone in L_match, L_item and L_text
    align.frozen     the encoder left as it is

The baseline of all three is PyTorch as the public code runs it: texts tokenised at each step, positives and negatives
encoded apart, each padded to its longest. Same weights, same users and negatives; x_u is given on both sides. Weights
are random and texts are generated: speed depends on neither.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from allmrec_jax.comparison.bench import Row, interleave, row
from allmrec_jax.comparison.sampling import popular_items
from allmrec_jax.config import Alignment
from allmrec_jax.data import batches
from allmrec_jax.models import alignment, params
from allmrec_jax.models.text_encoder import EncoderConfig, LoadedEncoder, build, describe, tokenize
from allmrec_jax.training import align, align_step, mesh
from allmrec_jax.training.align_batches import Steps, TextBatches, in_file_order
from allmrec_jax.training.state import create

SEED = 0
USERS, ITEMS, D = 9930, 6141, 50  # the paper's Beauty (Kim et al. 2024, table 2)
MEDIAN, SPREAD = 84, 0.66  # tokens of its items' texts: lognormal, 4.9 % beyond the 256 at which MiniLM cuts
STEPS = 2  # of a measurement; a step of the baseline takes many seconds
TEXTS = 256  # encoded to measure how long all take
ENCODER = EncoderConfig(
    vocab_size=30522, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
)


def _backend(rng: np.random.Generator, size: int) -> tuple[Any, list[str], list[str]]:
    """A WordPiece tokenizer like BERT's over generated words, and these: whole ones and endings."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    made = sorted({"".join(rng.choice(letters, 6)) for _ in range(size - 4)})
    words, endings = made[: 2 * len(made) // 3], made[2 * len(made) // 3 :]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words, *(f"##{ending}" for ending in endings)]
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return backend, words, endings


def _texts(rng: np.random.Generator, words: list[str], endings: list[str]) -> list[str]:
    """Of item 0 and of all others; 6 words of 10 are of two tokens."""
    texts = ["No Title, No Description"]
    for tokens in np.exp(rng.normal(np.log(MEDIAN), SPREAD, ITEMS)).astype(int):
        n = max(3, int(tokens / 1.6))
        first, second = rng.integers(len(words), size=n), rng.integers(len(endings), size=n)
        two = rng.random(n) < 0.6
        texts.append(" ".join(words[a] + (endings[b] if t else "") for a, b, t in zip(first, second, two, strict=True)))
    return texts


@contextlib.contextmanager
def _programs(found: list[float]) -> Iterator[None]:
    """Appends to `found` the seconds that each program took to compile meanwhile."""

    def heard(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


class _World:
    """Users, texts and weights that both sides share."""

    def __init__(self):
        rng = np.random.default_rng(SEED)
        backend, words, endings = _backend(rng, ENCODER.vocab_size)
        self.texts = _texts(rng, words, endings)
        tree = jax.device_get(jax.jit(lambda key: params.init(key, describe(ENCODER)))(jax.random.key(SEED)))
        self.encoder: LoadedEncoder = build(ENCODER, tree, backend)
        self.tokens, self.lengths = tokenize(backend, self.texts, ENCODER.max_seq_length)
        positives = popular_items(rng, USERS, ITEMS)
        self.drawing = {
            "users": np.arange(1, USERS + 1, dtype=np.int32),
            "positives": positives,
            "seen": batches.seen_items(positives, np.append(0, np.arange(USERS + 1)), ITEMS),
        }
        self.data = {
            "E": rng.normal(size=(ITEMS + 1, D)).astype(np.float32),
            "x_u": rng.normal(size=(USERS, D)).astype(np.float32),
        }
        f_I, f_T = (alignment.describe(width, Alignment().joint) for width in (D, ENCODER.hidden_size))
        self.heads = {"f_I": params.init(jax.random.key(1), f_I), "f_T": params.init(jax.random.key(2), f_T)}
        self.key = jax.random.key(SEED)

    def steps(self, config: Alignment) -> Steps:
        spans = align_step.spans(USERS, config.batch, None)
        return Steps(spans, config.batch, self.drawing, in_file_order(USERS), self.key)


class _Ours:
    """Steps that train the encoder, going on where the last call stopped; says the seconds a user took."""

    def __init__(self, world: _World, config: Alignment):
        devices = mesh.data_devices(config.batch)
        steps, terms = world.steps(config), align.terms_of(config, None)
        self.key, self.at, self.batch = world.key, 0, config.batch
        self.texts = TextBatches(
            steps,
            world.lengths,
            both=terms.both,
            devices=len(devices),
            training=len(steps.spans) * config.epochs,
            width=ENCODER.hidden_size,
        )
        optimiser = align.make_optimiser(config)
        self.step = align_step.make_step(
            world.encoder.graph,
            optimiser,
            devices,
            terms=terms,
            shapes=self.texts.shapes,
            dtype=jnp.dtype(mesh.precision(config.dtype)),
        )
        self.state = create(jax.tree.map(np.asarray, {**world.heads, "encoder": world.encoder.weights}), optimiser)
        self.data = mesh.replicated(world.data | {"tokens": world.tokens, "lengths": world.lengths}, devices)
        self.first, self.later = [], []
        with _programs(self.first):
            self.loss = self._run(1)

    def _run(self, steps: int) -> float:
        for _ in range(steps):
            self.state, found = self.step(self.state, self.data, self.texts(self.at), self.key)
            self.at += 1
        return float(found["loss"])

    def __call__(self) -> float:
        start = time.perf_counter()
        with _programs(self.later):
            self._run(STEPS)
        return (time.perf_counter() - start) / (STEPS * self.batch)

    def beside(self) -> dict[str, float | str]:
        texts = self.texts
        return {
            "padding": f"{1 - texts.real / texts.computed:.1%} of {texts.computed / texts.made:,.0f} tokens a step",
            "shapes of texts": " ".join(f"{rows}x{width}" for rows, width in texts.shapes),
            "programs compiled": f"{len(self.first)} in {sum(self.first):.0f} s, later {len(self.later)}",
            "loss of the first step": self.loss,
        }


class _Theirs:
    """The public code's step."""

    def __init__(self, world: _World, config: Alignment, *, frozen: bool):
        import torch

        from allmrec_jax.torch_baseline.alignment import AutoEncoder, SentenceEncoder, in_transformers
        from allmrec_jax.torch_baseline.weights import load

        self.world, self.config, self.frozen, self.at, self.tokens = world, config, frozen, 0, 0
        self.drawn = world.steps(config)
        heads, joint = world.heads, config.joint
        self.f_I = load(AutoEncoder(D, joint), alignment.describe(D, joint), heads["f_I"])
        text = ENCODER.hidden_size
        self.f_T = load(AutoEncoder(text, joint), alignment.describe(text, joint), heads["f_T"])
        self.encoder = SentenceEncoder(
            load(in_transformers(ENCODER), describe(ENCODER), world.encoder.weights["weights"])
        )
        self.encoder.train(not frozen)
        trained = [self.f_I, self.f_T, *([] if frozen else [self.encoder])]
        adam = {"lr": config.learning_rate, "betas": (0.9, 0.98)}
        self.optimiser = torch.optim.Adam([p for module in trained for p in module.parameters()], **adam)
        self.loss = self._run(1)

    def _encode(self, items: np.ndarray) -> Any:
        import torch

        backend = self.world.encoder.backend
        backend.enable_truncation(ENCODER.max_seq_length)
        backend.enable_padding()
        encoded = backend.encode_batch([self.world.texts[item] for item in items])
        tokens, mask = (np.array([getattr(e, name) for e in encoded]) for name in ("ids", "attention_mask"))
        self.tokens += tokens.size
        with torch.set_grad_enabled(not self.frozen):
            return self.encoder(torch.tensor(tokens), torch.tensor(mask, dtype=torch.bool))

    def _run(self, steps: int) -> float:
        import torch

        from allmrec_jax.torch_baseline.alignment import losses, train_batch

        for _ in range(steps):
            drawn = self.drawn(self.at)
            self.at += 1

            def loss_of(rows: slice, drawn=drawn) -> Any:
                positive, negative, who = (drawn[name][rows] for name in ("positive", "negative", "who"))
                E, x_u = self.world.data["E"], self.world.data["x_u"]
                return losses(
                    self.f_I,
                    self.f_T,
                    x_u=torch.tensor(x_u[who]),
                    E_positive=torch.tensor(E[positive]),
                    E_negative=torch.tensor(E[negative]),
                    Q_positive=self._encode(positive),
                    Q_negative=self._encode(negative),
                    weights=align.terms_of(self.config, None).weights,
                    score=self.config.score,
                )["loss"]

            values = train_batch(self.optimiser, loss_of, self.config.batch)
        return values[-1]

    def __call__(self) -> float:
        start = time.perf_counter()
        self._run(STEPS)
        return (time.perf_counter() - start) / (STEPS * self.config.batch)

    def beside(self) -> dict[str, float | str]:
        return {
            "the baseline's tokens a step": f"{self.tokens / self.at:,.0f}",
            "its loss of the first step": self.loss,
        }


def _frozen(world: _World, config: Alignment) -> tuple[Callable[[], float], dict[str, float | str]]:
    """Seconds a user took over the stage's epochs, the encoding of all texts before them included."""
    steps, optimiser = align_step.spans(USERS, config.batch, None), align.make_optimiser(config)
    devices = mesh.data_devices(config.batch)
    terms = align.terms_of(config, None)
    epoch = align_step.make_epoch(optimiser, devices, terms=terms, steps=steps, rows=config.batch)
    Q = np.random.default_rng(SEED).normal(size=(ITEMS + 1, ENCODER.hidden_size)).astype(np.float32)
    data = mesh.replicated(world.data | world.drawing | {"Q": Q}, devices)
    state = create(jax.tree.map(np.asarray, world.heads), optimiser)
    some = np.random.default_rng(SEED).permutation(ITEMS)[:TEXTS]
    seconds: dict[str, float | str] = {}
    encoder = world.encoder

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        align.encode_items(encoder, encoder.weights, world.tokens[some], world.lengths[some])
        encoded = (time.perf_counter() - start) / len(some) * (ITEMS + 1)
        start = time.perf_counter()
        state, found = epoch(state, data, np.arange(USERS, dtype=np.int32), (world.key, world.key))
        jax.block_until_ready(found)
        an_epoch = time.perf_counter() - start
        seconds.update({"seconds to encode all texts": encoded, "seconds an epoch": an_epoch})
        return (encoded + config.epochs * an_epoch) / (config.epochs * USERS)

    return run, seconds


def bench_align(repeats: int, console: Console) -> list[Row]:
    """All rows. Raises ImportError without PyTorch."""
    world, config = _World(), Alignment().as_public_code()
    reference, paper = _Ours(world, config), _Ours(world, Alignment(beta=config.beta))
    theirs = _Theirs(world, config, frozen=False)
    runs = [("reference", reference), ("paper", paper), ("theirs", theirs)]
    seconds = interleave(runs, repeats, console)
    what = (
        f"stage 1 with a trained {ENCODER.num_hidden_layers}-layer encoder, batch {config.batch}; against PyTorch as "
    )
    what += "the public code does it"
    rows = [
        row(
            name,
            "users/s",
            1,
            seconds[ours],
            seconds["theirs"],
            what=f"{what}; {which}",
            beside=made.beside() | theirs.beside(),
            compile_seconds=sum(made.first),
        )
        for name, ours, made, which in (
            ("align.trained", "reference", reference, "the same loss"),
            ("align.paper", "paper", paper, "ours with positives alone in L_match, L_item and L_text"),
        )
    ]
    still = _Theirs(world, config, frozen=True)
    ours, beside = _frozen(world, config)
    first, later = [], []
    with _programs(first):
        ours()
    with _programs(later):
        ours()
    beside["programs compiled"] = f"{len(first)} in {sum(first):.0f} s, later {len(later)}"
    seconds = interleave([("ours", ours), ("theirs", still)], repeats, console)
    what = (
        f"the encoder left as it is, {config.epochs} epochs with the encoding before them (measured on {TEXTS} texts)"
    )
    rows.append(
        row(
            "align.frozen",
            "users/s",
            1,
            seconds["ours"],
            seconds["theirs"],
            what=what,
            beside=beside,
            compile_seconds=sum(first),
        )
    )
    return rows
