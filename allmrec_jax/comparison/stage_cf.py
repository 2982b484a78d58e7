"""Stage 0 of both programs, from the same weights on the same batches, dropout off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from allmrec_jax.comparison.checks import Run, Trace, recorded
from allmrec_jax.config import CF
from allmrec_jax.data import batches
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.models import collaborative, gru4rec, ncf, nextitnet, sasrec
from allmrec_jax.models.losses import Objective
from allmrec_jax.training import cf, table
from allmrec_jax.training.state import create

COMPARED = (sasrec.SASRecConfig, gru4rec.GRU4RecConfig, nextitnet.NextItNetConfig, ncf.NCFConfig)
"""The configs of the models that have a counterpart in PyTorch."""

ROWS = 2048  # of users at once


def without_dropout(c: Any) -> Any:
    """The same model's config, its dropout off."""
    return dataclasses.replace(c, dropout=0.0) if hasattr(c, "dropout") else c


def baseline(c: Any, parameters: Any) -> Any:
    """The PyTorch model with these weights, in evaluation mode."""
    from allmrec_jax.torch_baseline.gru4rec import GRU4Rec
    from allmrec_jax.torch_baseline.ncf import NCF
    from allmrec_jax.torch_baseline.nextitnet import NextItNet
    from allmrec_jax.torch_baseline.sasrec import SASRec
    from allmrec_jax.torch_baseline.weights import load

    kind = dict(zip(COMPARED, (SASRec, GRU4Rec, NextItNet, NCF), strict=True))[type(c)]
    return load(kind(without_dropout(c)), collaborative.module_of(c).describe(c), parameters).eval()


def _key(seed: int) -> jax.Array:
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), cf.SEED_STREAM), 3)[1]


def ours(config: CF, c: Any, parameters: Any, dataset: Dataset, *, seed: int, steps: int) -> Run:
    """The steps of `training.cf`: in length tiers, all rows of E moved."""
    c, data = without_dropout(c), cf.training_data(dataset, config.refit)
    lengths = np.asarray(data["end"] - data["start"] - 1)
    optimiser = recorded(cf.make_optimiser(config))
    epoch = cf.make_epoch(
        c,
        optimiser,
        jax.devices()[:1],
        batch=config.batch,
        steps=1,
        objective=Objective(config.loss, config.negatives, config.calibration),
        l2_emb=config.l2_emb,
        crop=config.crop,
        tiers=batches.length_tiers(lengths, c.maxlen, config.batch, cf.tier_multiple(config.batch, 1)),
    )
    start = jax.tree.map(jnp.array, parameters)
    state, losses, rows = create(start | {"E": table.padded(start["E"])}, optimiser), [], c.n_items + 1
    for _ in range(steps):
        state, found = epoch(state, data, _key(seed))
        losses.append(found["loss"])

    def cut(tree: Any) -> Any:
        return jax.device_get(tree | {"E": tree["E"][:rows]})

    kept = state.opt_state[0]
    return Run(
        [float(loss[0]) for loss in losses],
        cut(kept["first"]),
        jax.device_get(parameters),
        cut(state.params),
        cut(kept["squares"]),
    )


def batches_of(config: CF, c: Any, dataset: Dataset, *, seed: int, steps: int) -> Iterator[Any]:
    """The same steps' batches for PyTorch, at full width."""
    import torch

    from allmrec_jax.torch_baseline.training import CFBatch

    data, key = cf.training_data(dataset, config.refit), _key(seed)
    objective = Objective(config.loss, config.negatives, config.calibration)
    crop = c.maxlen if config.crop else None
    for step in range(steps):
        found = batches.training_rows(key, step, config.batch, data, c.maxlen, max(1, objective.each), crop)
        shared = batches.draw_items(key, step, objective.shared, c.n_items) if objective.shared else None
        parts = [None if part is None else torch.tensor(np.asarray(part)).long() for part in (*found, shared)]
        yield CFBatch(*parts)


def theirs(config: CF, c: Any, parameters: Any, dataset: Dataset, *, seed: int, steps: int) -> Run:
    """The steps of `torch_baseline.training`."""
    from allmrec_jax.torch_baseline.training import train_cf
    from allmrec_jax.torch_baseline.weights import gradients_of, weights_of

    description = collaborative.module_of(c).describe(c)
    model, gradients = baseline(c, parameters), []
    drawn = batches_of(config, c, dataset, seed=seed, steps=steps)

    def watch() -> None:
        if not gradients:
            gradients.append(gradients_of(model, description))

    losses = list(train_cf(model, drawn, config, c.n_items, watch))
    return Run(losses, gradients[0], jax.device_get(parameters), weights_of(model, description))


def representation(c: Any, parameters: Any, windows: np.ndarray, users: np.ndarray) -> np.ndarray:
    """x_u by PyTorch."""
    import torch

    if isinstance(c, ncf.NCFConfig):
        return np.asarray(parameters["P"])[users]
    model, windows = baseline(c, parameters), torch.tensor(windows[:, -c.maxlen :]).long()
    with torch.no_grad():
        parts = [model.user_representation(windows[at : at + ROWS]) for at in range(0, len(windows), ROWS)]
    return torch.cat(parts).numpy()


def scores(c: Any, parameters: Any, x_u: np.ndarray, users: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Of the candidates, by PyTorch."""
    import torch

    model, items = baseline(c, parameters), torch.tensor(candidates).long()
    with torch.no_grad():
        if isinstance(c, ncf.NCFConfig):
            return model(torch.tensor(users).long(), items).numpy()
        return model.scores(torch.tensor(x_u), items).numpy()


def trace(c: Any, parameters: Any, other: Any, windows: np.ndarray) -> Trace:
    """SASRec's features after its embedding and after each block, the last norm on top of each; of other models, those
    at the end alone. `other` are PyTorch's parameters."""
    import torch

    def after(blocks: int):
        def pairs():
            part = dataclasses.replace(without_dropout(c), blocks=blocks)
            cut = {**parameters, "blocks": jax.tree.map(lambda leaf: leaf[:blocks], parameters["blocks"])}
            found = sasrec.features(jax.tree.map(jnp.asarray, cut), part, jnp.asarray(windows))
            model = baseline(c, other)
            model.config = part
            with torch.no_grad():
                expected = model(torch.tensor(windows).long()).numpy()
            return [(f"SASRec's block {blocks}" if blocks else "SASRec's embedding of items", found, expected)]

        return pairs

    if isinstance(c, sasrec.SASRecConfig):
        return [after(blocks) for blocks in range(c.blocks + 1)]

    def whole():
        features = collaborative.module_of(c).features
        found = features(jax.tree.map(jnp.asarray, parameters), without_dropout(c), jnp.asarray(windows))
        with torch.no_grad():
            expected = baseline(c, other)(torch.tensor(windows).long()).numpy()
        return [(f"{type(c).__name__.removesuffix('Config')}'s features", found, expected)]

    return [] if isinstance(c, ncf.NCFConfig) else [whole]
