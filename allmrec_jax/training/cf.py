"""Stage 0: trains the collaborative filtering model, one compiled program an epoch, mapped over devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from allmrec_jax.config import CF
from allmrec_jax.data import batches
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation.metrics import metrics_of
from allmrec_jax.files import write_atomically
from allmrec_jax.models import collaborative, given, ncf, params, sequential
from allmrec_jax.models.cf_model import CFModel
from allmrec_jax.models.losses import Objective
from allmrec_jax.progress import say
from allmrec_jax.training import brought, loop, mesh, table
from allmrec_jax.training.checkpoint import Checkpoints, Curves
from allmrec_jax.training.state import State, create, update

SEED_STREAM = 0  # folded into the experiment's seed, so that no two stages share random bits


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
    check_objective(c, objective, devices, batch=batch, l2_emb=l2_emb, lazy=lazy, shards=shards, how=how)
    per_device, model = batch // len(devices), collaborative.module_of(c)
    most = per_device * c.maxlen * (2 + objective.each) + objective.shared
    axes: Any = (mesh.DATA, table.AXIS) if shards > 1 else mesh.DATA
    crop_at = c.maxlen if crop else None
    by_rows = lazy or shards > 1  # what goes between devices is rows' gradients, not E's

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

    def move(state: State, value: jax.Array, of_rest: Any, of_E: Any) -> tuple[State, jax.Array]:
        value, of_rest = jax.lax.psum((value, of_rest), axes)
        if by_rows:
            ids, of_rows = (jax.lax.all_gather(part, axes, tiled=True) for part in of_E)
            if lazy:
                return table.update_rows(state, of_rest, ids, of_rows, optimiser, shards), value
            dense = table.dense_gradient(state.params["E"], ids, of_rows, shards)
        else:
            dense = jax.lax.psum(of_E, axes)
        if l2_emb:
            norm, direction = jax.value_and_grad(jnp.linalg.norm)(state.params["E"])
            value, dense = value + l2_emb * norm, dense + l2_emb * direction
        return update(state, of_rest | {"E": dense}, optimiser), value

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
            found = jax.lax.cond(fits, in_tiers, at_full_width)
        else:
            found = at_full_width()
        return move(state, *found)  # outside of `cond`, which would copy E

    def epoch(state: State, data: dict[str, Any], key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        state, losses = jax.lax.scan(lambda s, _: step(s, data, key), state, length=steps)
        return state, {"loss": losses}

    if shards == 1:
        return mesh.map_over_data(epoch, devices, batched=(False, False, False), how=how, donate=(0,))
    specs = _specs(c, optimiser)
    grid = mesh.make_mesh(model=shards, devices=devices)
    return mesh.map_over(epoch, grid, (specs, P(), P()), (specs, P()), (0,))


def _specs(c: Any, optimiser: optax.GradientTransformation) -> State:
    """How a state whose E is cut by rows lies on a mesh."""
    state = jax.eval_shape(lambda: initial_state(jax.random.key(0), c, optimiser))
    return jax.tree_util.tree_map_with_path(lambda path, _: P(table.AXIS) if table.is_table(path) else P(), state)


def check_objective(
    c: Any,
    objective: Objective,
    devices: Sequence[Any],
    *,
    batch: int,
    l2_emb: float,
    lazy: bool,
    shards: int,
    how: str,
) -> None:
    """Raises `UserError` for settings that exclude each other."""
    if objective.loss == "softmax" and hasattr(collaborative.module_of(c), "score"):
        raise UserError("cf.loss softmax needs a model whose score is x_u . E_i; choose cf.loss bce")
    whole = [f"cf.l2_emb {l2_emb}"] * (l2_emb != 0) + ["cf.loss softmax with cf.negatives 0"] * objective.all_items
    if whole and (lazy or shards > 1):
        by, instead = ("cf.table lazy", "cf.table dense") if lazy else ("devices.items above 1", "devices.items 1")
        raise UserError(f"{whole[0]} reads all of E in every step, which {by} does not allow; choose {instead}")
    if shards > 1 and how == "pmap":
        raise UserError("devices.items above 1 needs devices.map shard_map")
    if table.MULTIPLE % shards or len(devices) % shards or batch % len(devices):
        raise UserError(
            f"devices.items is {shards}, but must be a power of two up to {table.MULTIPLE} that divides the number of "
            f"devices in use ({len(devices)} for cf.batch {batch})"
        )


def initial_state(key: jax.Array, c: Any, optimiser: optax.GradientTransformation) -> State:
    """Where training starts; E is filled up to a number of rows that devices can share."""
    tree = params.init(key, collaborative.module_of(c).describe(c))
    return create(tree | {"E": table.padded(tree["E"])}, optimiser)


def _placed_state(
    key: jax.Array, c: Any, optimiser: optax.GradientTransformation, devices: Sequence[Any], shards: int
) -> State:
    """`initial_state`; where E is cut by rows no device ever holds the whole of it."""
    if shards == 1:
        return initial_state(key, c, optimiser)
    grid = mesh.make_mesh(model=shards, devices=devices)
    where = jax.tree.map(lambda spec: NamedSharding(grid, spec), _specs(c, optimiser))
    return jax.jit(lambda key: initial_state(key, c, optimiser), out_shardings=where)(key)


def training_data(dataset: Dataset, refit: bool = False) -> dict[str, Any]:
    """The device arrays that `make_epoch` reads.

    Args:
      refit: whether validation items are training items, too.

    Raises:
      UserError: if no user has two training items.
    """
    ends = dataset.history_end("test") if refit else dataset.offsets[:-1] + dataset.n_train
    users = np.flatnonzero((ends - dataset.offsets[:-1] > 1) & (dataset.n_train > 0))
    if not len(users):
        raise UserError(f"{dataset.name}: no user has two training items, so there is nothing to train on")
    return {
        "items": jnp.asarray(dataset.items),
        "start": jnp.asarray(dataset.offsets[users], jnp.int32),
        "end": jnp.asarray(ends[users], jnp.int32),
        "users": jnp.asarray(users, jnp.int32),
        "seen": batches.seen_items(*dataset.distinct("validation" if refit else "train"), dataset.n_items),
    }


VALIDATION = ("ndcg@10", "hit@10", "hit@1")


def make_validation(c: Any, dataset: Dataset, key: jax.Array, most: int = 10_000):
    """`params -> {metric: value}` of the validation items, each among 100 random items new to the user."""
    users = np.flatnonzero(dataset.has_target("validation"))
    if not len(users):
        raise UserError(f"{dataset.name}: no user has three items, so there is nothing to validate on")
    if len(users) > most:
        users = np.sort(np.asarray(jax.random.choice(jax.random.fold_in(key, 1), users, (most,), replace=False)))
    seen = batches.seen_items(*dataset.distinct("train"), dataset.n_items)
    negatives = np.asarray(batches.draw_negatives(key, 0, len(users), users, seen, 100))
    candidates = np.concatenate([dataset.targets("validation")[users][:, None], negatives], axis=1)
    windows = dataset.windows(dataset.history_end("validation")[users], c.maxlen, users)

    def validate(parameters: Any) -> dict[str, float]:
        model = CFModel(c, parameters)
        scores = model.scores(model.x_u(windows, users), candidates)
        rivals = (scores[:, 1:] >= scores[:, :1]) & (negatives > 0)  # ties count against us; 0 is no item
        rank = rivals.sum(1)
        return {name: float(np.mean(values)) for name, values in metrics_of(rank).items() if name in VALIDATION}

    return validate


def tier_multiple(batch: int, devices: int) -> int:
    """What the capacities of length tiers are multiples of: the same for 1, 2, 4 and 8 devices, so that they agree."""
    return math.lcm(math.gcd(batch, 8), devices)


NAMES = {"sasrec": "SASRec", "gru4rec": "GRU4Rec", "nextitnet": "NextItNet", "ncf": "NCF", "given": "given CF model"}


def name_of(config: CF) -> str:
    """What the model is called in tables."""
    return NAMES.get(config.model, Path(config.model).stem)


def make_optimiser(config: CF) -> optax.GradientTransformation:
    """Adam(b1 .9, b2 .98), decoupled weight decay where asked."""
    adam = {"learning_rate": config.learning_rate, "b1": 0.9, "b2": 0.98, "eps": 1e-8}
    return optax.adamw(**adam, weight_decay=config.weight_decay) if config.weight_decay else optax.adam(**adam)


LARGE = 20_000  # items from which `cf.table auto` is lazy; none of the paper's data sets has as many


def is_lazy(config: CF, n_items: int) -> bool:
    """Whether a step moves only the rows of E that it reads."""
    reads_all = config.l2_emb != 0 or Objective(config.loss, config.negatives).all_items
    return config.table == "lazy" or (config.table == "auto" and n_items > LARGE and not reads_all)


def _with_fold_in(c: Any, parameters: Any, dataset: Dataset) -> CFModel:
    """A model of users, with what makes x_u of a history of somebody else, fitted on the training histories."""
    users = np.flatnonzero(dataset.n_train > 1)
    windows = dataset.windows((dataset.offsets[:-1] + dataset.n_train)[users], c.maxlen, users)
    return CFModel(c, parameters, ncf.fold_in(*(np.asarray(parameters[name]) for name in ("E", "P")), windows, users))


def given_cf(config: CF, dataset: Dataset, folder: Path, claim: Callable[[], Any] = lambda: None) -> CFModel:
    """The model of `cf.file`, of which `folder` keeps a copy, so that the work directory is whole."""
    path, copy = brought.find(config, folder)
    arrays = given.read(path, dataset.n_items, dataset.n_users)
    claim()
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
    claim: Callable[[], Any] = lambda: None,
    console: Console | None = None,
) -> tuple[CFModel, Curves]:
    """Trains (or goes on with) stage 0 in `folder` and returns the selected model and its curves.

    Args:
      shards: devices that share one copy of E.
      claim: takes possession of `folder`; called when everything has been checked, before anything is written there.
    """
    if config.model == "given":
        return given_cf(config, dataset, folder, claim), {}
    c, data = brought.configure(config, dataset, folder), training_data(dataset, config.refit)
    key = jax.random.fold_in(jax.random.key(seed), SEED_STREAM)
    init_key, step_key, validation_key = jax.random.split(key, 3)
    optimiser = make_optimiser(config)
    steps = max(1, dataset.n_trained // config.batch)
    devices = mesh.data_devices(config.batch, devices, shards)
    lengths = np.asarray(data["end"] - data["start"] - 1)
    epoch = make_epoch(
        c,
        optimiser,
        devices,
        batch=config.batch,
        steps=steps,
        objective=Objective(config.loss, config.negatives, config.calibration),
        l2_emb=config.l2_emb,
        crop=config.crop,
        lazy=is_lazy(config, dataset.n_items),
        shards=shards,
        tiers=batches.length_tiers(lengths, c.maxlen, config.batch, tier_multiple(config.batch, len(devices))),
        how=how,
    )
    validate = None if config.refit else make_validation(c, dataset, validation_key)
    claim()
    if (found := brought.find(config, folder)) and not found[1].is_file():
        with write_atomically(found[1]) as file:
            file.write(found[0].read_bytes())
    state = _placed_state(init_key, c, optimiser, devices, shards)
    checkpoints = Checkpoints(folder, best_metric="ndcg@10" if validate else None)
    try:
        state, curves = loop.run(
            lambda s, _: epoch(s, data, step_key),
            state,
            steps=config.epochs,
            checkpoints=checkpoints,
            label=f"stage 0: {name_of(config)}",
            items_per_step=steps * config.batch,
            item_name="sequences",
            log_every=min(10, config.evaluate_every),
            save_every=config.evaluate_every,
            step_name="epoch",
            evaluate=validate and (lambda s: validate(s.params)),
            evaluated_on="validation, 100 negatives",
            console=console,
            logs=folder / "logs",
        )
        if config.select == "best" and validate:
            restored = checkpoints.restore(state, best=True, warn=lambda text: say(console or Console(), text))
            if restored is not None:
                state = restored[1]
    finally:
        checkpoints.close()
    parameters = state.params | {"E": state.params["E"][: c.n_items + 1]}
    return _with_fold_in(c, parameters, dataset) if "P" in parameters else CFModel(c, parameters), curves
