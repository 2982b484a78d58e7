"""`allmrec compare --train`: the three stages trained by both programs, each on what its own earlier stages gave.

From the same initial weights on the same batches, dropout off. Rounding grows over a training, so that single numbers
part in the end; what must agree are the metrics, within their intervals, and the losses.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from allmrec_jax.comparison import stage_align, stage_cf, stage_llm
from allmrec_jax.comparison.checks import Check, Run
from allmrec_jax.comparison.compare import MOST_USERS, Comparison, Parts, Users, check_metrics, inputs_of
from allmrec_jax.errors import UserError
from allmrec_jax.models import alignment
from allmrec_jax.pipeline import Pipeline
from allmrec_jax.progress import progress
from allmrec_jax.training import align
from allmrec_jax.training.cf import CFModel

SIDES = ("ours", "theirs")
LAST, LOSS_TOLERANCE = (
    0.1,
    0.02,
)  # the share of a training's steps whose mean losses are compared, and how near they are


def train_both(pipeline: Pipeline, *, users: int = 32) -> Comparison:
    """Trains all three stages in both programs, as the experiment says, and compares what they give.

    Args:
      users: whose candidates the LLM ranks on both sides; the other models rank for up to 512.

    Raises:
      UserError: for an experiment that cannot be trained in both, or not twice from the same weights.
    """
    found, parts = Comparison(), Parts(pipeline)
    parts.trained = []  # initial weights, whatever the work directory holds
    x, c = parts.x, parts.cf.config
    if not isinstance(c, stage_cf.COMPARED):
        raise UserError(f"{x.cf.model} has no counterpart in PyTorch; choose --cf.model sasrec")
    if not x.align.train_encoder:
        raise UserError("compare --train trains the encoder on both sides; set --align.train-encoder")
    with progress("training both", 3, unit="stages", console=pipeline.console) as bar:
        models = _stage_0(found, parts)
        bar.update(1)
        aligned = _stage_1(found, parts, models)
        bar.update(2)
        _stage_2(found, parts, models, aligned, users)
        bar.update(3)
    return found


def _losses(found: Comparison, name: str, runs: dict[str, list[float]]) -> None:
    """Keeps the curves, and checks the means of their last steps."""
    found.curves[name] = runs
    last = max(1, round(LAST * len(runs["ours"])))
    a, b = (float(np.mean(runs[side][-last:])) for side in SIDES)
    share = abs(a - b) / abs(b)
    what = f"{name}: mean loss of the last {last} of {len(runs['ours'])} steps"
    found.checks.append(Check(what, abs(a - b), share, LOSS_TOLERANCE, share <= LOSS_TOLERANCE))


def _metrics(found: Comparison, name: str, scores: dict[str, np.ndarray], column: np.ndarray, seed: int) -> None:
    made, found.metrics[name] = check_metrics(f"{name}: metrics after training", scores, column, seed)
    found.checks.append(made)


def _stage_0(found: Comparison, parts: Parts) -> dict[str, CFModel]:
    x, c, dataset, start = parts.x, parts.cf.config, parts.pipeline.dataset, parts.cf.params
    steps = max(1, dataset.n_trained // x.cf.batch) * x.cf.epochs
    train = {"ours": stage_cf.ours, "theirs": stage_cf.theirs}
    runs = {side: train[side](x.cf, c, start, dataset, seed=x.seed, steps=steps) for side in SIDES}
    _losses(found, "stage 0", {side: run.losses for side, run in runs.items()})
    asked = Users(parts, MOST_USERS)
    models = {side: CFModel(c, run.end, parts.cf.fold_in) for side, run in runs.items()}
    x_u = x_u_of(parts, models, asked.windows, asked.ids)
    scores = {
        "ours": models["ours"].scores(x_u["ours"], asked.candidates),
        "theirs": stage_cf.scores(c, runs["theirs"].end, x_u["theirs"], asked.ids, asked.candidates),
    }
    _metrics(found, "stage 0", scores, asked.column, x.seed)
    return models


def x_u_of(parts: Parts, models: dict[str, CFModel], windows: np.ndarray, users: np.ndarray) -> dict[str, np.ndarray]:
    """By each program, with its own weights."""
    theirs = stage_cf.representation(parts.cf.config, models["theirs"].params, windows, users)
    return {"ours": models["ours"].x_u(windows, users), "theirs": theirs}


def _stage_1(found: Comparison, parts: Parts, models: dict[str, CFModel]) -> dict[str, Any]:
    x, dataset, encoder = parts.x, parts.pipeline.dataset, parts.pipeline.encoder
    users, ends, _ = dataset.examples(x.align.targets, single=x.align.single_items)
    windows = dataset.windows(ends, parts.cf.config.maxlen, users)
    x_u = x_u_of(parts, models, windows, users)
    begin = align.set_up(stage_align.plain(x.align), dataset, models["ours"], encoder, seed=x.seed)
    start = jax.device_get(begin.trained)
    options = {"seed": x.seed, "steps": len(begin.steps.spans) * x.align.epochs}
    runs = {
        "ours": stage_align.ours(x.align, dataset, models["ours"], encoder, start, **options),
        "theirs": stage_align.theirs(x.align, dataset, models["theirs"], encoder, start, x_u["theirs"], **options),
    }
    terms = len(runs["ours"].losses) // options["steps"]  # in alphabetical order; the loss is the second
    _losses(found, "stage 1", {side: run.losses[1::terms] for side, run in runs.items()})
    asked = Users(parts, MOST_USERS)
    own = x_u_of(parts, models, asked.windows, asked.ids)
    scores = {side: _decoded(runs[side], models[side], own[side], asked.candidates) for side in SIDES}
    _metrics(found, "stage 1", scores, asked.column, x.seed)
    return {side: run.end for side, run in runs.items()}


def _decoded(run: Run, model: CFModel, x_u: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """x_u . E' of each candidate: what L_rec trains."""
    f_I = run.end["f_I"]
    E = jnp.asarray(model.E)[candidates.ravel()]
    decoded = np.asarray(alignment.decode(f_I, alignment.encode(f_I, E))).reshape(*candidates.shape, -1)
    return np.einsum("ud,ucd->uc", x_u, decoded)


def _stage_2(found: Comparison, parts: Parts, models: dict[str, CFModel], aligned: dict[str, Any], count: int) -> None:
    x, dataset, llm, encoder = parts.x, parts.pipeline.dataset, parts.llm, parts.pipeline.encoder
    config, (examples, _) = dataclasses.replace(x.llm, cf_dropout=False), parts.examples
    steps = stage_llm.total_steps(config, examples)
    windows = dataset.windows(examples.ends, parts.cf.config.maxlen, examples.users)
    x_u, some = x_u_of(parts, models, windows, examples.users), np.ones(1, int)
    E = {side: np.asarray(model.E) for side, model in models.items()}
    modules = stage_align.baseline(encoder.config, aligned["theirs"], encoder.weights["weights"])
    e = {
        "ours": stage_align.our_tables(parts.begin, encoder, aligned["ours"], E["ours"], some)["e"],
        "theirs": stage_align.tables(parts.begin, modules, E["theirs"], some)["e"],
    }
    inputs = {side: inputs_of(parts, x_u[side], E[side], e[side]) for side in SIDES}
    heads, model = parts.heads(inputs["ours"]), stage_llm.transformer(llm, parts.pipeline.llm_folder)
    runs = {
        "ours": stage_llm.ours(config, examples, llm, heads, inputs["ours"], steps),
        "theirs": stage_llm.theirs(config, examples, model, heads, inputs["theirs"], steps),
    }
    _losses(found, "stage 2", {side: run.losses for side, run in runs.items()})
    asked = Users(parts, count)
    own = x_u_of(parts, models, asked.windows, asked.ids)
    shown = {side: stage_llm.in_use(config, llm, runs[side].end, inputs[side]) for side in SIDES}
    scores = {
        side: score(config, which, examples.builder, shown[side], inputs[side].table, own[side], asked.asked)
        for side, score, which in (
            ("ours", stage_llm.our_scores, llm),
            ("theirs", stage_llm.their_scores, model),
        )
    }
    _metrics(found, "stage 2", scores, asked.column, x.seed)
