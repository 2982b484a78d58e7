"""Stage 1: f_I, f_T and the sentence encoder learn to align collaborative and text knowledge (CF model frozen)."""

from __future__ import annotations

import functools
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from rich.console import Console

from allmrec_jax.config import Alignment
from allmrec_jax.data import batches, text_groups
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.files import write_atomically
from allmrec_jax.models import alignment, params
from allmrec_jax.models.text_encoder import LoadedEncoder, tokenize
from allmrec_jax.progress import progress, say
from allmrec_jax.training import loop, mesh
from allmrec_jax.training.align_step import Terms, draw, keep_gradients, make_epoch, make_step, spans
from allmrec_jax.training.cf import CFModel
from allmrec_jax.training.checkpoint import Checkpoints, Curves
from allmrec_jax.training.state import State, create

SEED_STREAM = 1
COLD = 5  # training interactions up to which `mixed` carries an item by its text
SAMPLES = 32  # steps whose texts decide which shapes are compiled
TABLES = "tables.npz"
LABEL = "stage 1: alignment"


@dataclass(frozen=True)
class Aligned:
    """What stage 2 and the evaluation need: the joint embedding tables, and the parameters that made them.

    The tables are (n_items + 1, d'), row 0 being padding: `e` of all items, `q` of all texts, seen in training or not,
    and `mixed`, q for items of at most `COLD` training interactions and e for the others. `parameters` holds f_I, f_T
    and, if it was trained, encoder.
    """

    e: Float[np.ndarray, "items joint"]
    q: Float[np.ndarray, "items joint"]
    mixed: Float[np.ndarray, "items joint"]
    parameters: Any


def item_texts(dataset: Dataset, template: str) -> list[str]:
    """The text of each item; missing titles and descriptions become `No Title` and `No Description`."""
    return [
        template.format(title=title or "No Title", description=description or "No Description")
        for title, description in zip(dataset.titles(), dataset.descriptions(), strict=True)
    ]


def terms_of(config: Alignment, cf: CFModel | None) -> Terms:
    """The loss that a config asks for; a switch that is off is a factor of 0.

    Args:
      cf: None where x_u is given in any case.
    """
    weights = {
        "match": float(config.match),
        "item": config.alpha * config.reconstruction,
        "text": config.beta * config.reconstruction,
        "rec": float(config.recommendation),
    }
    drops = config.cf_dropout and cf is not None and getattr(cf.config, "dropout", 0) > 0
    return Terms(weights, config.score, config.items == "both", cf.config if drops else None)


def make_optimiser(config: Alignment, steps: np.ndarray | None = None) -> optax.GradientTransformation:
    """Adam(b1 .9, b2 .98), with a learning rate of its own for the sentence encoder where one is given.

    Args:
      steps: `align_step.spans` of an epoch, needed where `config.chunk` cuts batches.
    """
    adam = partial(optax.adam, b1=0.9, b2=0.98, eps=1e-8)
    rates = {"heads": adam(config.learning_rate)}
    if config.encoder_learning_rate is not None:
        rates["encoder"] = adam(config.encoder_learning_rate)

    def label(trained: dict[str, Any]) -> dict[str, str]:
        return {name: "encoder" if name == "encoder" else "heads" for name in trained}

    optimiser = optax.multi_transform(rates, label) if "encoder" in rates else rates["heads"]
    if config.chunk is None or config.chunk >= config.batch:
        return optimiser
    return optax.chain(keep_gradients(steps, config.batch), optimiser)


def train_align(
    config: Alignment,
    dataset: Dataset,
    cf: CFModel,
    encoder: LoadedEncoder,
    folder: Path,
    *,
    seed: int,
    how: mesh.Mapping = "shard_map",
    devices: Sequence[Any] | None = None,
    console: Console | None = None,
) -> tuple[Aligned, Curves]:
    """Trains (or goes on with) stage 1 in `folder`, on (history, next, random negative): each user's last, or all.

    Of the training items only. The tables of `Aligned` are kept beside the checkpoints.
    """
    console = console or Console()
    key = jax.random.fold_in(jax.random.key(seed), SEED_STREAM)
    init_I, init_T, order_key, negative_key, dropout_key = jax.random.split(key, 5)
    tokens, lengths = tokenize(encoder.backend, item_texts(dataset, config.text), encoder.config.max_seq_length)
    dtype = jnp.dtype(mesh.precision(config.dtype))
    users, ends, positives = dataset.examples(config.targets, single=config.single_items)
    steps = spans(len(users), config.batch, config.chunk)
    rows = min(config.batch, config.chunk or config.batch)
    devices = mesh.data_devices(rows, devices)
    terms, optimiser = terms_of(config, cf), make_optimiser(config, steps)

    d, text_width = cf.E.shape[1], encoder.config.hidden_size
    trained = {
        "f_I": params.init(init_I, alignment.describe(d, config.joint)),
        "f_T": params.init(init_T, alignment.describe(text_width, config.joint)),
    }
    if config.train_encoder:
        trained["encoder"] = jax.tree.map(np.asarray, encoder.weights)  # a copy: steps take their state's buffers
    state = create(trained, optimiser)

    drawing = {
        "users": jnp.asarray(users, jnp.int32),
        "positives": jnp.asarray(positives),
        "seen": batches.seen_items(*dataset.distinct("train"), dataset.n_items),
    }
    windows = dataset.windows(ends, cf.config.maxlen, users)
    # Host copies: cf's arrays may be committed to one device (restored) or to others than this stage uses.
    data = drawing | {"E": np.asarray(cf.E)}
    if terms.cf is None:
        data["x_u"] = cf.x_u(windows, users)
    else:
        data |= {"cf": jax.tree.map(np.asarray, cf.params), "windows": windows}

    order_of = lru_cache(1)(
        lambda epoch: np.asarray(
            np.arange(len(users), dtype=np.int32)
            if config.order == "file"
            else batches.epoch_order(order_key, epoch, len(users))
        )
    )

    @functools.cache
    def given_Q() -> np.ndarray:
        return encode_items(encoder, encoder.weights, tokens, lengths, dtype=dtype, console=console)

    if config.train_encoder:
        data |= {"tokens": tokens, "lengths": lengths}
        trainer = TextBatches(terms.both, steps, rows, lengths, len(devices), drawing, order_of, negative_key)
        shapes = trainer.shapes(tokens.shape[1], config.epochs)
        made = make_step(
            encoder.graph,
            optimiser,
            devices,
            terms=terms,
            shapes=shapes,
            dropout=config.encoder_dropout,
            dtype=dtype,
            how=how,
        )
        placed = functools.cache(lambda: data if how == "pmap" else mesh.replicated(data, devices))

        def one_step(state: State, i: int):
            return made(state, placed(), trainer.batch(i, shapes), dropout_key)

        run = {"steps": len(steps) * config.epochs, "items_per_step": len(users) / len(steps), "log_every": 10}
        run["save_every"] = len(steps) * config.save_every
    else:
        made = make_epoch(optimiser, devices, terms=terms, steps=steps, rows=rows, how=how)
        placed = functools.cache(
            lambda: (data if how == "pmap" else mesh.replicated(data, devices)) | {"Q": jnp.asarray(given_Q())}
        )

        def one_step(state: State, i: int):
            return made(state, placed(), order_of(i), (negative_key, dropout_key))

        run = {"steps": config.epochs, "items_per_step": len(users), "log_every": 1, "save_every": config.save_every}
        run["step_name"] = "epoch"

    checkpoints = Checkpoints(folder)
    try:
        state, curves = loop.run(
            one_step,
            state,
            checkpoints=checkpoints,
            label=LABEL,
            item_name="users",
            console=console,
            logs=folder / "logs",
            **run,
        )
    finally:
        checkpoints.close()
    if config.train_encoder and trainer.computed:
        say(
            console,
            f"{LABEL}: {1 - trainer.real / trainer.computed:.1%} of the encoder's tokens were padding; "
            f"{len(shapes)} text shapes in one compiled program; {trainer.distinct / trainer.entries:.0%} of the texts "
            "of a batch were distinct and were encoded",
        )
    tables = _read_tables(folder, dataset.n_items, config.joint)
    if tables is None:
        weights = state.params.get("encoder")
        Q = given_Q() if weights is None else encode_items(encoder, weights, tokens, lengths, dtype=dtype)
        tables = make_tables(state.params, cf.E, Q, dataset.train_counts())
        with write_atomically(folder / TABLES) as file:
            np.savez(file, **tables)
    return Aligned(**tables, parameters=state.params), curves


class TextBatches:
    """The batches of a stage that trains the encoder, their texts in groups; and counts of what was made of them.

    Args:
      both: whether the negatives' texts are needed, too.
      steps, rows: `align_step.spans` of an epoch, and the most users of a step.
      lengths: of all texts, in tokens.
      drawing: what `align_step.draw` reads, with `key`; order_of: epoch -> order of the users.
    """

    def __init__(
        self,
        both: bool,
        steps: np.ndarray,
        rows: int,
        lengths: Int[np.ndarray, " texts"],
        devices: int,
        drawing: Any,
        order_of: Callable[[int], np.ndarray],
        key: Key[Array, ""],
    ):
        self.both, self.steps, self.lengths, self.devices, self._order_of = both, steps, lengths, devices, order_of
        self.most = math.ceil(rows * (1 + both) / devices)
        self._draw = jax.jit(lambda order, span, i: draw(drawing, order, span, jnp.arange(rows), i, key))
        self.real = self.computed = self.distinct = self.entries = 0

    def drawn(self, i: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """The rows of step i, its distinct items, and how often each stands in it."""
        epoch, at = divmod(i, len(self.steps))
        drawn = jax.device_get(self._draw(self._order_of(epoch), self.steps[at], i))
        items = [drawn["positive"], drawn["negative"]] if self.both else [drawn["positive"]]
        return drawn, *np.unique(np.concatenate([part[drawn["real"]] for part in items]), return_counts=True)

    def shapes(self, limit: int, epochs: int) -> tuple[text_groups.Shape, ...]:
        """The shapes that suit steps spread over the first epoch; texts have at most `limit` tokens."""
        some = np.unique(np.linspace(0, len(self.steps) - 1, SAMPLES).astype(int))
        samples = [np.sort(self.lengths[self.drawn(int(i))[1]])[:: self.devices] for i in some]
        return text_groups.choose_shapes(samples, self.lengths, most_tokens(), limit, epochs * len(self.steps))

    def batch(self, i: int, shapes: tuple[text_groups.Shape, ...]) -> dict[str, np.ndarray]:
        """What `align_step.make_step` reads."""
        drawn, texts, counts = self.drawn(i)
        shares = (counts / drawn["real"].sum()).astype(np.float32)
        groups = text_groups.group(texts, shares, self.lengths, shapes, most=self.most, devices=self.devices)
        self.real, self.computed = self.real + groups.tokens[0], self.computed + groups.tokens[1]
        self.distinct, self.entries = self.distinct + len(texts), self.entries + int(counts.sum())
        return drawn | {"shape": groups.shape, "texts": groups.texts, "shares": groups.shares}


def most_tokens() -> int:
    """Of a group of texts: what a CPU's caches hold, or what keeps an accelerator busy."""
    return 1024 if jax.default_backend() == "cpu" else 16384


def make_tables(
    trained: Any, E: Any, Q: Float[np.ndarray, "items text"], train_counts: Int[np.ndarray, " items"]
) -> dict[str, np.ndarray]:
    """e, q and mixed of all items."""
    encode = jax.jit(alignment.encode)
    e, q = (np.asarray(encode(trained[name], np.asarray(x))) for name, x in (("f_I", E), ("f_T", Q)))
    return {"e": e, "q": q, "mixed": np.where((train_counts <= COLD)[:, None], q, e)}


def _read_tables(folder: Path, n_items: int, joint: int) -> dict[str, np.ndarray] | None:
    """The tables that a finished stage left; None if there are none, or if they are damaged."""
    try:
        with np.load(folder / TABLES, allow_pickle=False) as archive:
            tables = {name: archive[name] for name in ("e", "q", "mixed")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return tables if all(table.shape == (n_items + 1, joint) for table in tables.values()) else None


@partial(jax.jit, static_argnums=0)
def _forward(graph: Any, weights: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return nnx.merge(graph, weights)(tokens, mask).astype(jnp.float32)


def encode_items(
    encoder: LoadedEncoder,
    weights: Any,
    tokens: Int[np.ndarray, "texts longest"],
    lengths: Int[np.ndarray, " texts"],
    *,
    dtype: Any = jnp.float32,
    console: Console | None = None,
) -> Float[np.ndarray, "texts h"]:
    """Q of every text, without dropout, in batches of texts of like lengths so that little is padding."""
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), weights)
    out = np.zeros((len(tokens), encoder.config.hidden_size), np.float32)
    longest = tokens.shape[1]
    done, shorter = 0, 0
    with progress("texts", len(tokens), unit="texts", console=console or Console(quiet=True)) as bar:
        for width in text_groups.text_widths(lengths, most=10):
            texts = np.flatnonzero((lengths > shorter) & (lengths <= width))
            shorter, rows = width, max(1, most_tokens() // width)
            for start in range(0, len(texts), rows):
                chosen = texts[start : start + rows]
                text, mask = (
                    np.zeros((rows, min(width, longest)), np.int32),
                    np.zeros((rows, min(width, longest)), bool),
                )
                text[: len(chosen)] = tokens[chosen, :width]
                mask[: len(chosen)] = np.arange(mask.shape[1])[None] < lengths[chosen][:, None]
                out[chosen] = np.asarray(_forward(encoder.graph, weights, text, mask))[: len(chosen)]
                done += len(chosen)
                bar.update(done)
    return out
