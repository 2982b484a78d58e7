"""Stage 1: f_I, f_T and the sentence encoder learn to align collaborative and text knowledge (CF model frozen)."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from allmrec_jax.training.align_batches import Steps, TextBatches, in_file_order, most_tokens, shuffled
from allmrec_jax.training.align_step import Terms, keep_gradients, make_epoch, make_step, spans
from allmrec_jax.training.cf import CFModel
from allmrec_jax.training.checkpoint import Checkpoints, Curves
from allmrec_jax.training.state import State, create

SEED_STREAM = 1
COLD = 5  # training interactions up to which `mixed` carries an item by its text
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
    """The text of each item; what is missing is `No Title` and `No Description`, what is empty stays empty."""
    return [
        template.format(
            title="No Title" if title is None else title,
            description="No Description" if description is None else description,
        )
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


class SetUp(NamedTuple):
    """What stage 1 begins with: its parameters, what its steps draw from, and what they read."""

    trained: dict[str, Any]
    terms: Terms
    steps: Steps
    drawing: dict[str, Any]
    data: dict[str, Any]
    tokens: Int[np.ndarray, "texts longest"]
    lengths: Int[np.ndarray, " texts"]
    keys: tuple[Key[Array, ""], Key[Array, ""]]
    """Of the negatives and of dropout."""


def set_up(config: Alignment, dataset: Dataset, cf: CFModel, encoder: LoadedEncoder, *, seed: int) -> SetUp:
    """All that stage 1 draws or reads before its first step, on the host."""
    key = jax.random.fold_in(jax.random.key(seed), SEED_STREAM)
    init_I, init_T, order_key, negative_key, dropout_key = jax.random.split(key, 5)
    tokens, lengths = tokenize(encoder.backend, item_texts(dataset, config.text), encoder.config.max_seq_length)
    users, ends, positives = dataset.examples(config.targets, single=config.single_items)
    terms = terms_of(config, cf)
    trained = {
        "f_I": params.init(init_I, alignment.describe(cf.E.shape[1], config.joint)),
        "f_T": params.init(init_T, alignment.describe(encoder.config.hidden_size, config.joint)),
    }
    if config.train_encoder:
        trained["encoder"] = jax.tree.map(np.asarray, encoder.weights)  # on the host: steps take their state's buffers
    drawing = {
        "users": users.astype(np.int32),
        "positives": positives,
        "seen": batches.seen_items(*dataset.distinct("train"), dataset.n_items),
    }
    order = shuffled(order_key, len(users)) if config.order == "shuffled" else in_file_order(len(users))
    rows, of_steps = min(config.batch, config.chunk or config.batch), spans(len(users), config.batch, config.chunk)
    steps = Steps(of_steps, rows, drawing, order, negative_key)
    windows = dataset.windows(ends, cf.config.maxlen, users)
    # Host copies: cf's arrays may be committed to one device (restored) or to others than this stage uses.
    data = {"E": np.asarray(cf.E), "users": drawing["users"]}
    if terms.cf is None:
        data["x_u"] = cf.x_u(windows, users)
    else:
        data |= {"cf": jax.tree.map(np.asarray, cf.params), "windows": windows}
    return SetUp(trained, terms, steps, drawing, data, tokens, lengths, (negative_key, dropout_key))


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
    begin = set_up(config, dataset, cf, encoder, seed=seed)
    terms, steps, data, drawing = begin.terms, begin.steps, begin.data, begin.drawing
    of_steps, rows, tokens, lengths = steps.spans, steps.rows, begin.tokens, begin.lengths
    negative_key, dropout_key = begin.keys
    dtype, devices = jnp.dtype(mesh.precision(config.dtype)), mesh.data_devices(rows, devices)
    optimiser = make_optimiser(config, of_steps)
    state = create(begin.trained, optimiser)

    def Q_of(weights: Any) -> np.ndarray:
        return encode_items(encoder, weights, tokens, lengths, dtype=dtype, console=console)

    given_Q = functools.cache(lambda: Q_of(encoder.weights))

    @functools.cache
    def placed() -> Any:
        more = {"tokens": tokens, "lengths": lengths} if config.train_encoder else drawing | {"Q": given_Q()}
        return data | more if how == "pmap" else mesh.replicated(data | more, devices)

    texts = None
    if config.train_encoder:
        texts = TextBatches(
            steps,
            lengths,
            both=terms.both,
            devices=len(devices),
            training=len(of_steps) * config.epochs,
            width=encoder.config.hidden_size,
            group_tokens=config.group_tokens,
        )
        options = {"dropout": config.encoder_dropout, "dtype": dtype, "remat": config.remat}
        step = make_step(encoder.graph, optimiser, devices, terms=terms, shapes=texts.shapes, how=how, **options)
        one_step, run = _with_encoder(step, texts, placed, dropout_key, config)
    else:
        epoch = make_epoch(optimiser, devices, terms=terms, steps=of_steps, rows=rows, how=how)
        one_step, run = _frozen(epoch, steps, placed, (negative_key, dropout_key), config)

    def one_step_without_tables(state: State, i: int) -> tuple[State, Any]:
        (folder / TABLES).unlink(missing_ok=True)  # those of earlier parameters, if there are any
        return one_step(state, i)

    checkpoints = Checkpoints(folder)
    try:
        state, curves = loop.run(
            one_step_without_tables,
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
    if texts is not None and texts.made:
        say(console, f"{LABEL}: {texts.said()}")
    tables = _read_tables(folder, dataset.n_items, config.joint)
    if tables is None:
        Q = given_Q() if texts is None else Q_of(_one_copy(state.params["encoder"]))
        tables = make_tables(state.params, cf.E, Q, dataset.train_counts())
        with write_atomically(folder / TABLES) as file:
            np.savez(file, **tables)
    return Aligned(**tables, parameters=state.params), curves


Step = Callable[[State, int], tuple[State, Any]]


def _with_encoder(
    step: Any, texts: TextBatches, placed: Callable[[], Any], key: Key[Array, ""], config: Alignment
) -> tuple[Step, dict[str, Any]]:
    """The loop's step, one of the optimiser; and the loop's options."""
    an_epoch, users = texts.steps.spans.shape[0], texts.steps.spans[-1, 1]
    run = {"steps": an_epoch * config.epochs, "items_per_step": float(users / an_epoch)}
    run |= {"log_every": 10, "save_every": an_epoch * config.save_every}
    return lambda state, i: step(state, placed(), texts(i), key), run


def _frozen(
    epoch: Any, steps: Steps, placed: Callable[[], Any], keys: tuple[Key[Array, ""], Key[Array, ""]], config: Alignment
) -> tuple[Step, dict[str, Any]]:
    """The loop's step, an epoch; and the loop's options."""
    run = {"steps": config.epochs, "items_per_step": float(steps.spans[-1, 1])}
    run |= {"log_every": 1, "save_every": config.save_every, "step_name": "epoch"}
    return lambda state, i: epoch(state, placed(), steps.order(i), keys), run


def _one_copy(tree: Any) -> Any:
    """Of arrays that every device has, those of the first: what is done with them, one device does."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf, tree)


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
    done, shorter = 0, 0
    with progress("texts", len(tokens), unit="texts", console=console or Console(quiet=True)) as bar:
        for width in text_groups.text_widths(lengths, most=10):
            texts = np.flatnonzero((lengths > shorter) & (lengths <= width))
            shorter, rows, columns = width, max(1, most_tokens() // width), min(width, tokens.shape[1])
            for start in range(0, len(texts), rows):
                chosen = texts[start : start + rows]
                text, mask = np.zeros((rows, columns), np.int32), np.zeros((rows, columns), bool)
                text[: len(chosen)] = tokens[chosen, :width]
                mask[: len(chosen)] = np.arange(columns)[None] < lengths[chosen][:, None]
                out[chosen] = np.asarray(_forward(encoder.graph, weights, text, mask))[: len(chosen)]
                done += len(chosen)
                bar.update(done)
    return out
