"""Stage 0: trains the collaborative filtering model, one compiled program an epoch, mapped over devices."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from rich.console import Console

from allmrec_jax.config import CF
from allmrec_jax.data import batches
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation.metrics import metrics_of
from allmrec_jax.files import write_atomically
from allmrec_jax.models import collaborative, given, ncf, params, sequential
from allmrec_jax.models.losses import Objective
from allmrec_jax.progress import say
from allmrec_jax.training import loop, mesh, table
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
    def E(self) -> Float[Anywhere, "items d"]:
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

        Raises:
          UserError: for an item id beyond the table.
        """
        self._check(windows)
        if hasattr(self.config, "n_users"):  # a model of users
            return self._of_rows(windows, users)
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

    def _check(self, items: Anywhere) -> None:
        least, most = (int(items.min()), int(items.max())) if items.size else (0, 0)
        if least < 0 or most > self.config.n_items:
            raise UserError(
                f"item {most if least >= 0 else least} is not among the model's 1 to {self.config.n_items:,}"
            )

    def _of_rows(self, windows: np.ndarray, users: np.ndarray | None) -> np.ndarray:
        """Users' own rows P_u where there are any; else a linear map of the mean of their items' E_i."""
        out, known = np.zeros((len(windows), self.config.width), np.float32), np.zeros(len(windows), bool)
        if users is not None and "P" in self.params:
            known = users <= self.config.n_users
            out[known] = np.asarray(self.params["P"])[users[known]]
        if not known.all():
            out[~known] = ncf.mean_rows(np.asarray(self.E), windows[~known]) @ self.fold_in
        return out

    def scores(self, x_u: np.ndarray, candidates: Int[Anywhere, "users candidates"]) -> np.ndarray:
        """The score of each candidate: x_u . E_i, or the model's own. Raises `UserError` for an id beyond the table."""
        self._check(candidates)
        return np.asarray(_score(self.params, self.config, x_u, jnp.asarray(candidates)))


@functools.partial(jax.jit, static_argnums=1)
def _represent(parameters: Any, config: Any, windows: jax.Array, pads: jax.Array) -> jax.Array:
    return collaborative.user_representation(parameters, config, windows, pads)


@functools.partial(jax.jit, static_argnums=1)
def _score(parameters: Any, config: Any, x_u: jax.Array, candidates: jax.Array) -> jax.Array:
    return collaborative.scores(parameters, config, x_u, jnp.take(parameters["E"], candidates, axis=0))


class _Group(NamedTuple):
    """Rows of a batch that are computed in windows of one width."""

    rows: jax.Array
    users: jax.Array
    windows: jax.Array
    positives: jax.Array
    negatives: jax.Array
    pads: jax.Array | None


def make_epoch(
    c: Any,
    optimiser: optax.GradientTransformation,
    devices: Sequence[Any],
    *,
    batch: int,
    steps: int,
    objective: Objective = sequential.PAPER,
    l2_emb: float = 0.0,
    crop: bool = False,
    tiers: tuple[tuple[int, int], ...] = (),
    how: mesh.Mapping = "shard_map",
    lazy: bool = False,
    shards: int = 1,
):
    """The epoch `(state, data, key) -> (state, {"loss": (steps,)})`: `steps` optimiser steps scanned in one program.

    `data` is replicated: `items` (flat), `start` and `end` of the training items of each eligible user in it,
    `users` (their ids) and `seen` (for negatives). Batches and negatives are drawn inside, from (key, step, global
    row), so the number of devices changes nothing but the order of summation.

    Args:
      crop: whether windows of long histories end anywhere (`batches.training_rows`), not always at the last item.
      tiers: `batches.length_tiers`: the rows of a batch, sorted by length, go into windows of these widths, which hold
        all their items; padding costs nothing there. A batch that does not fit is computed at full width. Without
        tiers every batch is.
      lazy: whether a step moves only the rows of E that it reads (`table.update_rows`); else all of them, as
        PyTorch's Adam does.
      shards: devices that share one copy of E (`state.params["E"]` made by `table.padded`), each with its rows.

    Raises:
      UserError: for an objective that these do not allow.
    """
    check_objective(c, objective, l2_emb=l2_emb, lazy=lazy, shards=shards, how=how)
    per_device, model = batch // len(devices), collaborative.module_of(c)
    axes: Any = (mesh.DATA, table.AXIS) if shards > 1 else mesh.DATA
    crop_at = c.maxlen if crop else None
    by_rows = lazy or shards > 1  # what goes between devices is rows' gradients, not E's
    most = per_device * c.maxlen * (2 + objective.each) + objective.shared

    def gradients_of(state: State, key: jax.Array, groups: list[_Group], count: jax.Array):
        E = state.params["E"]
        rest = {name: leaf for name, leaf in state.params.items() if name != "E"}
        shared = batches.draw_items(key, state.step, objective.shared, c.n_items) if objective.shared else None
        # One look-up of E for everything, so that its gradient is one scatter.
        wanted = [ids for group in groups for ids in (group.windows, group.positives, group.negatives)]
        wanted += [] if shared is None else [shared]
        ids = jnp.concatenate([jnp.ravel(part) for part in wanted])
        cuts = np.cumsum([part.size for part in wanted])[:-1]

        def loss(rest: Any, looked_up: jax.Array, E: jax.Array | None) -> jax.Array:
            parts = [
                jnp.reshape(part, (*of.shape, c.width))
                for part, of in zip(jnp.split(looked_up, cuts), wanted, strict=True)
            ]
            parameters, total = rest if E is None else rest | {"E": E}, jnp.float32(0)
            for number, group in enumerate(groups):
                rows = parts[3 * number : 3 * number + 3]
                negatives = group.negatives
                if objective.loss == "softmax":
                    rows, negatives = (rows[:2], None) if shared is None else ([*rows[:2], parts[-1]], shared)
                keys = batches.dropout_keys(key, state.step, group.rows)
                total += sequential.loss_terms(
                    model,
                    parameters,
                    c,
                    group.windows,
                    group.positives,
                    negatives,
                    keys,
                    group.pads,
                    rows,
                    group.users,
                    objective,
                )[0]
            return total / count

        arguments = rest, table.look_up(E, ids, shards), E if objective.all_items else None
        value, (of_rest, of_rows, of_E) = jax.value_and_grad(loss, argnums=(0, 1, 2))(*arguments)
        if by_rows:  # of one shape, whichever way the batch went
            more = 0, most - len(ids)
            return value, of_rest, (jnp.pad(ids, more), jnp.pad(of_rows, (more, (0, 0))))
        dense = table.dense_gradient(E, ids, of_rows)
        return value, of_rest, dense if of_E is None else dense + of_E

    def step(state: State, data: dict[str, Any], key: jax.Array) -> tuple[State, jax.Array]:
        everybody = batches.draw_users(key, state.step, batch, data["start"].shape[0])
        lengths = jnp.minimum(data["end"][everybody] - data["start"][everybody] - 1, c.maxlen)
        count = jnp.sum(lengths).astype(jnp.float32)

        def group(rows, width, pads):
            return _Group(
                rows, *batches.training_rows(key, state.step, rows, data, width, objective.each, crop_at), pads
            )

        def at_full_width():
            return gradients_of(state, key, [group(mesh.local_rows(per_device, axes), c.maxlen, None)], count)

        def in_tiers():
            groups, first = [], 0
            for width, capacity in tiers:
                rows = order[first + mesh.local_rows(capacity // len(devices), axes)]
                groups.append(group(rows, width, c.maxlen - lengths[rows]))
                first += capacity
            return gradients_of(state, key, groups, count)

        if tiers:
            order = jnp.argsort(lengths, stable=True)
            ends = np.cumsum([capacity for _, capacity in tiers])
            fits = jnp.all(lengths[order[ends - 1]] <= np.array([width for width, _ in tiers]))
            value, gradients, of_E = jax.lax.cond(fits, in_tiers, at_full_width)
        else:
            value, gradients, of_E = at_full_width()
        value, gradients = jax.lax.psum((value, gradients), axes)
        if not by_rows:
            of_E = jax.lax.psum(of_E, axes)
            if l2_emb:
                norm, direction = jax.value_and_grad(jnp.linalg.norm)(state.params["E"])
                value, of_E = value + l2_emb * norm, of_E + l2_emb * direction
            return update(state, gradients | {"E": of_E}, optimiser), value
        ids, of_rows = (jax.lax.all_gather(part, axes, tiled=True) for part in of_E)
        if lazy:
            return table.update_rows(state, gradients, ids, of_rows, optimiser, shards), value
        of_E = table.dense_gradient(state.params["E"], ids, of_rows, shards)
        return update(state, gradients | {"E": of_E}, optimiser), value

    def epoch(state: State, data: dict[str, Any], key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        state, losses = jax.lax.scan(lambda s, _: step(s, data, key), state, length=steps)
        return state, {"loss": losses}

    if shards == 1:
        return mesh.map_over_data(epoch, devices, batched=(False, False, False), how=how, donate=(0,))
    whole = jax.eval_shape(lambda: initial_state(jax.random.key(0), c, optimiser))
    specs = jax.tree_util.tree_map_with_path(lambda path, _: P(table.AXIS) if table.is_table(path) else P(), whole)
    grid = mesh.make_mesh(model=shards, devices=devices)
    return mesh.map_over(epoch, grid, (specs, P(), P()), (specs, P()), (0,))


def check_objective(c: Any, objective: Objective, *, l2_emb: float, lazy: bool, shards: int, how: str) -> None:
    """Raises `UserError` for settings that exclude each other."""
    if objective.loss == "softmax" and hasattr(collaborative.module_of(c), "score"):
        raise UserError("cf.loss softmax needs a model whose score is x_u . E_i; choose cf.loss bce")
    whole = [f"cf.l2_emb {l2_emb}"] * (l2_emb != 0) + ["cf.loss softmax with cf.negatives 0"] * objective.all_items
    if whole and (lazy or shards > 1):
        by = "cf.table lazy" if lazy else "devices.items above 1"
        raise UserError(f"{whole[0]} reads all of E in every step, which {by} does not allow")
    if shards > 1 and how == "pmap":
        raise UserError("devices.items above 1 needs devices.map shard_map")


def initial_state(key: jax.Array, c: Any, optimiser: optax.GradientTransformation) -> State:
    """Where training starts; E is filled up to a number of rows that devices can share."""
    tree = params.init(key, collaborative.module_of(c).describe(c))
    return create(tree | {"E": table.padded(tree["E"])}, optimiser)


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


VALIDATION = ("ndcg@10", "hit@10", "hit@1")


def make_validation(c: Any, dataset: Dataset, key: jax.Array, most: int = 10_000):
    """`params -> {metric: value}` of the validation items, each among 100 random items new to the user."""
    users = np.flatnonzero(dataset.has_target("validation"))[:most]
    if not len(users):
        raise UserError(f"{dataset.name}: no user has three items, so there is nothing to validate on")
    seen = batches.seen_items(*dataset.distinct("validation"), dataset.n_items)
    negatives = batches.draw_negatives(key, 0, len(users), users, seen, 100)
    candidates = jnp.concatenate([dataset.targets("validation")[users][:, None], negatives], axis=1)
    windows = dataset.windows(dataset.history_end("validation")[users], c.maxlen, users)

    def validate(parameters: Any) -> dict[str, float]:
        model = CFModel(c, parameters)
        scores = model.scores(model.x_u(windows, users), candidates)
        rank = (scores[:, 1:] >= scores[:, :1]).sum(1)  # ties count against us
        return {name: float(np.mean(values)) for name, values in metrics_of(rank).items() if name in VALIDATION}

    return validate


def tier_multiple(batch: int, devices: int) -> int:
    """What the capacities of length tiers are multiples of: the same for 1, 2, 4 and 8 devices, so that they agree."""
    return math.lcm(math.gcd(batch, 8), devices)


NAMES = {"sasrec": "SASRec", "gru4rec": "GRU4Rec", "nextitnet": "NextItNet", "ncf": "NCF", "given": "given CF model"}
LARGE = 100_000  # items from which `cf.table auto` is lazy


def configure(config: CF, dataset: Dataset) -> Any:
    """The model's own config. Raises `UserError` for sizes that do not fit together."""
    if config.width % config.heads:
        raise UserError(f"cf.width {config.width} is not a multiple of cf.heads {config.heads}")
    kind, _ = collaborative.MODELS[config.model]
    sizes = {"n_items": dataset.n_items, "n_users": dataset.n_users}
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: sizes[name] if name in sizes else getattr(config, name) for name in names})


def _with_fold_in(c: Any, parameters: Any, dataset: Dataset) -> CFModel:
    """A model of users, with what makes x_u of a history of somebody else, fitted on the training histories."""
    users = np.flatnonzero(dataset.n_train > 1)
    windows = dataset.windows((dataset.offsets[:-1] + dataset.n_train)[users], c.maxlen, users)
    return CFModel(c, parameters, ncf.fold_in(*(np.asarray(parameters[name]) for name in ("E", "P")), windows, users))


def given_cf(config: CF, dataset: Dataset, folder: Path) -> CFModel:
    """The model of `cf.file`, of which `folder` keeps a copy, so that the work directory is whole."""
    copy = folder / "given.npz"
    arrays = given.read(copy if copy.is_file() else Path(config.file or ""), dataset.n_items, dataset.n_users)
    if not copy.is_file():
        with write_atomically(copy) as file:
            np.savez(file, **arrays)
    c = given.GivenConfig(dataset.n_items, dataset.n_users, arrays["E"].shape[1], config.maxlen)
    parameters = {name: array for name, array in arrays.items() if name != "A"}
    if "P" in arrays and "A" not in arrays:
        return _with_fold_in(c, parameters, dataset)
    return CFModel(c, parameters, arrays.get("A", np.eye(c.width + 1, c.width, dtype=np.float32)))


def train_cf(
    config: CF,
    dataset: Dataset,
    folder: Path,
    *,
    seed: int,
    how: mesh.Mapping = "shard_map",
    devices: Sequence[Any] | None = None,
    shards: int = 1,
    console: Console | None = None,
) -> tuple[CFModel, Curves]:
    """Trains (or goes on with) stage 0 in `folder` and returns the selected model and its curves.

    Args:
      shards: devices that share one copy of E.
    """
    if config.model == "given":
        return given_cf(config, dataset, folder), {}
    c, data = configure(config, dataset), training_data(dataset)
    key = jax.random.fold_in(jax.random.key(seed), SEED_STREAM)
    init_key, step_key, validation_key = jax.random.split(key, 3)
    adam = {"learning_rate": config.learning_rate, "b1": 0.9, "b2": 0.98, "eps": 1e-8}
    optimiser = optax.adamw(**adam, weight_decay=config.weight_decay) if config.weight_decay else optax.adam(**adam)
    state = initial_state(init_key, c, optimiser)
    steps = max(1, dataset.n_users // config.batch)
    devices = mesh.data_devices(config.batch, devices)
    lengths = dataset.n_train[dataset.n_train > 1] - 1
    epoch = make_epoch(
        c,
        optimiser,
        devices,
        batch=config.batch,
        steps=steps,
        objective=Objective(config.loss, config.negatives, config.calibration),
        l2_emb=config.l2_emb,
        crop=config.crop,
        lazy=config.table == "lazy" or (config.table == "auto" and dataset.n_items > LARGE),
        shards=shards,
        tiers=batches.length_tiers(lengths, c.maxlen, config.batch, tier_multiple(config.batch, len(devices))),
        how=how,
    )
    validate = make_validation(c, dataset, validation_key)
    checkpoints = Checkpoints(folder, best_metric="ndcg@10")
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
    parameters = state.params | {"E": state.params["E"][: c.n_items + 1]}
    return _with_fold_in(c, parameters, dataset) if "P" in parameters else CFModel(c, parameters), curves
