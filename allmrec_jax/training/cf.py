"""Stage 0: trains the collaborative filtering model, one compiled program an epoch, mapped over devices."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from rich.console import Console

from allmrec_jax.config import CF
from allmrec_jax.data import batches
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.errors import UserError
from allmrec_jax.models import collaborative, ncf, params, sequential
from allmrec_jax.progress import say
from allmrec_jax.training import loop, mesh
from allmrec_jax.training.checkpoint import Checkpoints, Curves
from allmrec_jax.training.state import State, create, update

Anywhere = Array | np.ndarray  # functions that take host and device arrays alike
SEED_STREAM = 0  # folded into the experiment's seed, so that no two stages share random bits


@dataclass(frozen=True)
class CFModel:
    """A trained model: the item table E and the user representation x_u of any history.

    fold_in: what makes x_u of a history where the model itself knows users only (`models.ncf.fold_in`).
    """

    config: Any  # of one of `models.collaborative.MODELS`
    params: Any
    fold_in: np.ndarray | None = None

    @property
    def E(self) -> Float[Array, "items d"]:
        return self.params["E"]

    def x_u(
        self,
        windows: Int[np.ndarray, "users maxlen"],
        users: Int[np.ndarray, " users"] | None = None,
        batch: int = 512,
    ) -> Float[np.ndarray, "users d"]:
        """User representations of left-padded windows.

        In batches of one shape, short histories apart from long ones, so that little is computed on padding.

        Args:
          users: their ids, where they are known: a model of users (NCF) then gives their rows.
        """
        if self.fold_in is not None:
            known = np.zeros(len(windows), bool) if users is None else users <= self.config.n_users
            out = np.zeros((len(windows), self.config.width), np.float32)
            out[~known] = ncf.mean_rows(np.asarray(self.E), windows[~known]) @ self.fold_in
            if known.any():
                out[known] = np.asarray(self.params["P"])[users[known]]
            return out
        lengths, maxlen = (windows != 0).sum(1), windows.shape[1]
        out, done = np.zeros((len(windows), self.config.width), np.float32), np.zeros(len(windows), bool)
        for width in sorted({min(width, maxlen) for width in (4, 16, maxlen)}):
            rows = np.flatnonzero((lengths <= width) & ~done)
            if width < maxlen and len(rows) < batch:
                continue  # too few for a program of their own
            done[rows] = True
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                padded, pads = np.zeros((batch, width), np.int32), np.zeros(batch, np.int32)
                padded[: len(part)] = windows[part, maxlen - width :]
                pads[: len(part)] = maxlen - lengths[part]
                out[part] = np.asarray(_represent(self.params, self.config, padded, pads))[: len(part)]
        return out

    def scores(self, x_u: np.ndarray, candidates: Int[Anywhere, "users candidates"]) -> np.ndarray:
        """The score of each candidate: x_u . E_i, or the model's own."""
        return np.asarray(_score(self.params, self.config, x_u, jnp.asarray(candidates)))


@functools.partial(jax.jit, static_argnums=1)
def _represent(parameters: Any, config: Any, windows: jax.Array, pads: jax.Array) -> jax.Array:
    return collaborative.user_representation(parameters, config, windows, pads)


@functools.partial(jax.jit, static_argnums=1)
def _score(parameters: Any, config: Any, x_u: jax.Array, candidates: jax.Array) -> jax.Array:
    return collaborative.scores(parameters, config, x_u, jnp.take(parameters["E"], candidates, axis=0))


def make_epoch(
    c: Any,
    optimiser: optax.GradientTransformation,
    devices: Sequence[Any],
    *,
    batch: int,
    steps: int,
    l2_emb: float = 0.0,
    tiers: tuple[tuple[int, int], ...] = (),
    how: mesh.Mapping = "shard_map",
):
    """The epoch `(state, data, key) -> (state, {"loss": (steps,)})`: `steps` optimiser steps scanned in one program.

    `data` is replicated: `items` (flat), `start` and `end` of the training items of each eligible user in it,
    `users` (their ids) and `seen` (for negatives). Batches and negatives are drawn inside, from (key, step, global
    row), so the number of devices changes nothing but the order of summation.

    Args:
      tiers: `batches.length_tiers`: the rows of a batch, sorted by length, go into windows of these widths, which hold
        all their items; padding costs nothing there. A batch that does not fit is computed at full width. Without
        tiers every batch is.
    """
    per_device, model = batch // len(devices), collaborative.module_of(c)

    def losses_of(groups, keys_of, parameters):
        # One look-up of E for everything, so that its gradient is one scatter.
        ids = jnp.concatenate([jnp.ravel(ids) for group in groups for ids in group[2:5]])
        looked_up, at, total = sequential.rows_of(parameters["E"], ids), 0, jnp.float32(0)
        for rows, users, windows, positives, negatives, pads in groups:
            shape, parts = windows.shape, []
            for _ in range(3):
                parts.append(jnp.reshape(looked_up[at : at + windows.size], (*shape, c.width)))
                at += windows.size
            inputs = (windows, positives, negatives, keys_of(rows), pads, parts, users)
            total += sequential.loss_terms(model, parameters, c, *inputs)[0]
        return total

    def step(state: State, data: dict[str, Any], key: jax.Array) -> tuple[State, jax.Array]:
        everybody = batches.draw_users(key, state.step, batch, data["start"].shape[0])
        lengths = jnp.minimum(data["end"][everybody] - data["start"][everybody] - 1, c.maxlen)
        count = jnp.sum(lengths).astype(jnp.float32)

        def keys_of(rows):
            return batches.dropout_keys(key, state.step, rows)

        def gradients_of(groups):
            def loss(parameters: Any) -> jax.Array:
                total = losses_of(groups, keys_of, parameters)
                if l2_emb == 0:
                    return total / count
                return total / count + l2_emb * jnp.linalg.norm(parameters["E"]) / len(devices)

            return jax.value_and_grad(loss)(state.params)

        def group(rows, width, pads):
            return rows, *batches.training_rows(key, state.step, rows, data, width), pads

        def at_full_width():
            return gradients_of([group(mesh.local_rows(per_device), c.maxlen, None)])

        def in_tiers():
            groups, first = [], 0
            for width, capacity in tiers:
                rows = order[first + mesh.local_rows(capacity // len(devices))]
                groups.append(group(rows, width, c.maxlen - lengths[rows]))
                first += capacity
            return gradients_of(groups)

        if tiers:
            order = jnp.argsort(lengths, stable=True)
            ends = np.cumsum([capacity for _, capacity in tiers])
            fits = jnp.all(lengths[order[ends - 1]] <= np.array([width for width, _ in tiers]))
            value, gradients = jax.lax.cond(fits, in_tiers, at_full_width)
        else:
            value, gradients = at_full_width()
        value, gradients = jax.lax.psum((value, gradients), mesh.DATA)
        return update(state, gradients, optimiser), value

    def epoch(state: State, data: dict[str, Any], key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        state, losses = jax.lax.scan(lambda s, _: step(s, data, key), state, length=steps)
        return state, {"loss": losses}

    return mesh.map_over_data(epoch, devices, batched=(False, False, False), how=how, donate=(0,))


def training_data(dataset: Dataset) -> dict[str, Any]:
    """The device arrays that `make_epoch` reads.

    Raises:
      UserError: if no user has two training items.
    """
    users = np.flatnonzero(dataset.n_train > 1)
    if not len(users):
        raise UserError(f"{dataset.name}: no user has two training items, so there is nothing to train on")
    start = dataset.offsets[users]
    return {
        "items": jnp.asarray(dataset.items),
        "start": jnp.asarray(start, jnp.int32),
        "end": jnp.asarray(start + dataset.n_train[users], jnp.int32),
        "users": jnp.asarray(users, jnp.int32),
        "seen": batches.seen_items(*dataset.distinct("train"), dataset.n_items),
    }


def make_validation(c: Any, dataset: Dataset, key: jax.Array, most: int = 10_000):
    """`params -> {"ndcg@10"}` of the validation items, each among 100 random items new to the user."""
    users = np.flatnonzero(dataset.has_target("validation"))[:most]
    if not len(users):
        raise UserError(f"{dataset.name}: no user has three items, so there is nothing to validate on")
    seen = batches.seen_items(*dataset.distinct("validation"), dataset.n_items)
    negatives = batches.draw_negatives(key, 0, len(users), users, seen, 100)
    candidates = jnp.concatenate([dataset.targets("validation")[users][:, None], negatives], axis=1)
    windows = dataset.windows(dataset.history_end("validation")[users], c.maxlen, users)

    def validate(parameters: Any) -> dict[str, float]:
        model = _model(c, parameters, dataset)
        scores = model.scores(model.x_u(windows, users), candidates)
        rank = (scores[:, 1:] >= scores[:, :1]).sum(1)  # ties count against us
        return {"ndcg@10": float(np.mean(np.where(rank < 10, 1 / np.log2(rank + 2), 0)))}

    return validate


def tier_multiple(batch: int, devices: int) -> int:
    """What the capacities of length tiers are multiples of: the same for 1, 2, 4 and 8 devices, so that they agree."""
    return math.lcm(math.gcd(batch, 8), devices)


NAMES = {"sasrec": "SASRec", "gru4rec": "GRU4Rec", "nextitnet": "NextItNet", "ncf": "NCF"}


def configure(config: CF, dataset: Dataset) -> Any:
    """The model's own config. Raises `UserError` for sizes that do not fit together."""
    if config.width % config.heads:
        raise UserError(f"cf.width {config.width} is not a multiple of cf.heads {config.heads}")
    kind, _ = collaborative.MODELS[config.model]
    sizes = {"n_items": dataset.n_items, "n_users": dataset.n_users}
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: sizes[name] if name in sizes else getattr(config, name) for name in names})


def _model(c: Any, parameters: Any, dataset: Dataset) -> CFModel:
    """The trained model; of NCF, with what makes a user's row of a history, fitted on the training histories."""
    if not isinstance(c, ncf.NCFConfig):
        return CFModel(c, parameters)
    users = np.flatnonzero(dataset.n_train > 1)
    windows = dataset.windows((dataset.offsets[:-1] + dataset.n_train)[users], c.maxlen, users)
    return CFModel(c, parameters, ncf.fold_in(*(np.asarray(parameters[name]) for name in ("E", "P")), windows, users))


def train_cf(
    config: CF,
    dataset: Dataset,
    folder: Path,
    *,
    seed: int,
    how: mesh.Mapping = "shard_map",
    devices: Sequence[Any] | None = None,
    console: Console | None = None,
) -> tuple[CFModel, Curves]:
    """Trains (or goes on with) stage 0 in `folder` and returns the selected model and its curves."""
    c = configure(config, dataset)
    key = jax.random.fold_in(jax.random.key(seed), SEED_STREAM)
    init_key, step_key, validation_key = jax.random.split(key, 3)
    optimiser = optax.adam(config.learning_rate, b1=0.9, b2=0.98, eps=1e-8)
    state = create(params.init(init_key, collaborative.module_of(c).describe(c)), optimiser)
    steps = max(1, dataset.n_users // config.batch)
    devices = mesh.data_devices(config.batch, devices)
    lengths = dataset.n_train[dataset.n_train > 1] - 1
    epoch = make_epoch(
        c,
        optimiser,
        devices,
        batch=config.batch,
        steps=steps,
        l2_emb=config.l2_emb,
        tiers=batches.length_tiers(lengths, c.maxlen, config.batch, tier_multiple(config.batch, len(devices))),
        how=how,
    )
    validate = make_validation(c, dataset, validation_key)
    checkpoints = Checkpoints(folder, best_metric="ndcg@10")
    data = training_data(dataset)
    try:
        state, curves = loop.run(
            lambda s, _: epoch(s, data, step_key),
            state,
            steps=config.epochs,
            checkpoints=checkpoints,
            label=f"stage 0: {NAMES[config.model]}",
            items_per_step=steps * config.batch,
            item_name="sequences",
            log_every=min(10, config.evaluate_every),
            save_every=config.evaluate_every,
            step_name="epoch",
            evaluate=lambda s: validate(s.params),
            console=console,
            logs=folder / "logs",
        )
        if config.select == "best":
            restored = checkpoints.restore(state, best=True, warn=lambda text: say(console or Console(), text))
            if restored is not None:
                state = restored[1]
    finally:
        checkpoints.close()
    return _model(c, state.params, dataset), curves
