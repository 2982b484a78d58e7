"""Stage 1: f_I, f_T and the sentence encoder learn to align collaborative and text knowledge (CF model frozen)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float, Int
from rich.console import Console

from allmrec_jax.config import Alignment
from allmrec_jax.data import batches
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.errors import UserError
from allmrec_jax.models import alignment, params
from allmrec_jax.models.text_encoder import LoadedEncoder, tokenize
from allmrec_jax.training import loop, mesh
from allmrec_jax.training.cf import CFModel
from allmrec_jax.training.checkpoint import Checkpoints, Curves
from allmrec_jax.training.state import State, create, update

SEED_STREAM = 1
TIERS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # text lengths that programs are compiled for


@dataclass(frozen=True)
class Aligned:
    """What stage 2 and the evaluation need: the joint embedding tables, and the parameters that made them.

    `e` and `q` are (n_items + 1, d'); row 0 is padding. `parameters` holds f_I, f_T and encoder.
    """

    e: Float[np.ndarray, "items joint"]
    q: Float[np.ndarray, "items joint"]
    parameters: Any


def item_texts(dataset: Dataset, template: str) -> list[str]:
    """The text of each item; missing titles and descriptions become `No Title` and `No Description`."""
    return [
        template.format(title=title or "No Title", description=description or "No Description")
        for title, description in zip(dataset.titles(), dataset.descriptions(), strict=True)
    ]


def make_step(
    graph: Any,
    optimiser: optax.GradientTransformation,
    devices: Sequence[Any],
    *,
    weights: dict[str, float],
    train_encoder: bool = True,
    how: mesh.Mapping = "shard_map",
):
    """The mapped step `(state, frozen, batch, key) -> (state, losses)`.

    `state.params` holds `f_I`, `f_T` and, if it is trained, `encoder`. `frozen` holds `E` and, if not, `encoder`.
    `batch` is cut over devices: tokens, mask, x_u, positive, negative, and real (False on rows that fill up a batch).
    """

    def step(state: State, frozen: Any, batch: dict[str, jax.Array], key: jax.Array):
        rows = mesh.local_rows(batch["real"].shape[0])
        keys = batches.dropout_keys(key, state.step, rows)
        real = batch["real"].astype(jnp.float32)
        count = jax.lax.psum(jnp.sum(real), mesh.DATA)

        def loss(parameters: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            encoder = nnx.merge(graph, parameters["encoder"] if train_encoder else frozen["encoder"])
            Q = encoder(batch["tokens"], batch["mask"], keys if train_encoder else None)
            rows_loss = alignment.loss_rows(
                parameters["f_I"],
                parameters["f_T"],
                x_u=batch["x_u"],
                E_positive=jnp.take(frozen["E"], batch["positive"], axis=0),
                E_negative=jnp.take(frozen["E"], batch["negative"], axis=0),
                Q_positive=Q,
                weights=weights,
            )
            means = {name: jnp.sum(value * real) / count for name, value in rows_loss.items()}
            return means["loss"], means

        (_, means), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        means, gradients = jax.lax.psum((means, gradients), mesh.DATA)
        return update(state, gradients, optimiser), means

    return mesh.map_over_data(step, devices, batched=(False, False, True, False), how=how, donate=(0,))


def make_optimiser(config: Alignment) -> optax.GradientTransformation:
    """Adam(b1 .9, b2 .98), with a learning rate of its own for the sentence encoder where one is given."""
    adam = partial(optax.adam, b1=0.9, b2=0.98, eps=1e-8)
    if config.encoder_learning_rate is None:
        return adam(config.learning_rate)
    rates = {"heads": adam(config.learning_rate), "encoder": adam(config.encoder_learning_rate)}

    def label(trained: dict[str, Any]) -> dict[str, str]:
        return {name: "encoder" if name == "encoder" else "heads" for name in trained}

    return optax.multi_transform(rates, label)


def _tier(longest: int, limit: int) -> int:
    """The length that texts of up to `longest` tokens are padded to; never beyond the encoder's positions."""
    return min(limit, next(tier for tier in TIERS if tier >= longest))


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
    """Trains (or goes on with) stage 1 in `folder`, on the last (history, next, random negative) of each user.

    Of the training items only; users with a single one are left out (paper).
    """
    key = jax.random.fold_in(jax.random.key(seed), SEED_STREAM)
    init_I, init_T, order_key, negative_key, dropout_key = jax.random.split(key, 5)
    tokens, lengths = tokenize(encoder.backend, item_texts(dataset, config.text), encoder.config.max_seq_length)
    d, text_width = cf.E.shape[1], encoder.config.hidden_size
    trained = {
        "f_I": params.init(init_I, alignment.describe(d, config.joint)),
        "f_T": params.init(init_T, alignment.describe(text_width, config.joint)),
    }
    # A host copy: cf.E may be committed to one device (restored) or to others than this stage uses.
    frozen = {"E": np.asarray(cf.E)}
    (trained if config.train_encoder else frozen)["encoder"] = encoder.weights
    # No L_match gradient reaches the encoder where the encoder is frozen; f_I and f_T are trained in any case.
    weights = {
        "match": float(config.match),
        "item": config.alpha,
        "text": config.beta,
        "rec": float(config.recommendation),
    }
    optimiser = make_optimiser(config)
    state = create(trained, optimiser)
    step = make_step(
        encoder.graph,
        optimiser,
        mesh.data_devices(config.batch, devices),
        weights=weights,
        train_encoder=config.train_encoder,
        how=how,
    )

    users = np.flatnonzero(dataset.has_target("train"))
    if not len(users):
        raise UserError(f"{dataset.name}: no user has two training items, so there is nothing to align")
    positives = dataset.targets("train")[users]
    x_u = cf.x_u(dataset.windows(dataset.history_end("train")[users], cf.config.maxlen, users), users)
    seen = batches.seen_items(*dataset.distinct("train"), dataset.n_items)
    per_epoch = batches.steps_per_epoch(len(users), config.batch)
    draw = jax.jit(lambda i, rows, who: batches.draw_negatives(negative_key, i, rows, who, seen)[:, 0])
    order_of = lru_cache(1)(lambda epoch: np.asarray(batches.epoch_order(order_key, epoch, len(users))))

    def one_step(state: State, i: int):
        order = order_of(i // per_epoch)
        chosen, real = map(np.asarray, batches.rows_of_step(order_key, i, config.batch, len(users), order))
        positive = positives[chosen]
        time = _tier(int(lengths[positive].max()), encoder.config.max_position_embeddings)
        text = np.zeros((config.batch, time), np.int32)
        width = min(time, tokens.shape[1])
        text[:, :width] = tokens[positive, :width]
        batch = {
            "tokens": text,
            "mask": np.arange(time)[None] < lengths[positive][:, None],
            "x_u": x_u[chosen],
            "positive": positive,
            "negative": np.asarray(draw(i, jnp.arange(config.batch), users[chosen])),
            "real": real,
        }
        return step(state, frozen, batch, dropout_key)

    checkpoints = Checkpoints(folder)
    try:
        state, curves = loop.run(
            one_step,
            state,
            steps=per_epoch * config.epochs,
            checkpoints=checkpoints,
            label="stage 1: alignment",
            items_per_step=config.batch,
            item_name="users",
            log_every=10,
            save_every=per_epoch * config.save_every,
            console=console,
            logs=folder / "logs",
        )
    finally:
        checkpoints.close()
    Q = encode_items(encoder, state.params.get("encoder", frozen.get("encoder")), tokens, lengths)
    encode = jax.jit(alignment.encode)
    e = np.asarray(encode(state.params["f_I"], frozen["E"]))
    q = np.asarray(encode(state.params["f_T"], Q))
    return Aligned(e, q, state.params), curves


def encode_items(
    encoder: LoadedEncoder,
    weights: Any,
    tokens: Int[np.ndarray, "texts longest"],
    lengths: Int[np.ndarray, " texts"],
    batch: int = 64,
) -> Float[np.ndarray, "texts h"]:
    """Q of every text, without dropout, sorted by length so that little is padding."""
    forward = jax.jit(lambda w, t, m: nnx.merge(encoder.graph, w)(t, m))
    out = np.zeros((len(tokens), encoder.config.hidden_size), np.float32)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        time = _tier(int(lengths[chosen].max()), encoder.config.max_position_embeddings)
        text, mask = np.zeros((batch, time), np.int32), np.zeros((batch, time), bool)
        width = min(time, tokens.shape[1])
        text[: len(chosen), :width] = tokens[chosen, :width]
        mask[: len(chosen)] = np.arange(time)[None] < lengths[chosen][:, None]
        out[chosen] = np.asarray(forward(weights, text, mask))[: len(chosen)]
    return out
