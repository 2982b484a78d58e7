"""The scores of every model on a group of lists: what goes through the LLM is computed once, saved, and taken up again.

<workdir>/evaluation/GROUP.lists.npz    users, candidates, column
<workdir>/evaluation/GROUP.MODEL.npy    float32 (rows, candidates), NaN where not yet scored
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from allmrec_jax.evaluation import baselines
from allmrec_jax.evaluation.lists import Lists
from allmrec_jax.evaluation.rank import score_users
from allmrec_jax.files import write_atomically
from allmrec_jax.pipeline import Pipeline
from allmrec_jax.progress import say

# What carries the items of the prompt: what F_I was trained on (None), or another of stage 1's tables.
INJECTED = {"a-llmrec": None, "mlp-llm": None, "a-llmrec-q": "q", "a-llmrec-mixed": "mixed"}
THROUGH_LLM = ("llm-only", *INJECTED)


def score(pipeline: Pipeline, lists: Lists, models: Iterable[str]) -> dict[str, Float[np.ndarray, "rows candidates"]]:
    """Scores of the models that are asked for, of those that score by themselves (`fused` does not).

    Raises:
      UserError: if a stage cannot be trained or taken up, or a likelihood is not finite.
    """
    models, dataset = list(models), pipeline.dataset
    found: dict[str, Any] = {}
    if any(name in baselines.NAMES for name in models):
        found |= baselines.score(dataset, lists)
    llm = [name for name in models if name in THROUGH_LLM]
    if "cf" in models or llm:
        x_u = representations(pipeline, lists)
        found["cf"] = pipeline.cf.scores(x_u, lists.candidates)
    for name in llm:
        found[name] = through_llm(pipeline, lists, name, x_u)
    return {name: found[name] for name in models if name in found}


def representations(pipeline: Pipeline, lists: Lists) -> Float[np.ndarray, "rows d"]:
    """x_u of each row's history.

    A model of users has no row of who it was not trained on: they come as somebody unknown, from the history alone.
    """
    dataset = pipeline.dataset
    trained = dataset.n_train[np.minimum(lists.users, dataset.n_users)] > 1
    users = np.where(trained, lists.users, dataset.n_users + 1)
    return pipeline.cf.x_u(dataset.histories(lists.users, pipeline.experiment.cf.maxlen, lists.split), users)


def open_folder(pipeline: Pipeline, lists: Lists) -> Path:
    """The folder of scores, claimed; scores of other lists than these are removed from it."""
    folder = pipeline.scores_folder
    path, own = folder / f"{lists.group}.lists.npz", _content(lists)
    saved = read_lists(path)
    if saved is not None:
        n = min(len(saved["users"]), len(lists.users))
        if all(np.array_equal(saved[name][:n], own[name][:n]) for name in own):
            if n == len(lists.users):
                return folder
        else:
            saved = None
    scores = sorted(folder.glob(f"{lists.group}.*.npy"))
    if saved is None and scores:
        say(pipeline.console, f"{folder}: the saved scores of {lists.group} are of other candidates; scoring again")
        for old in scores:
            old.unlink()
    with write_atomically(path) as file:
        np.savez(file, **own)
    return folder


def _content(lists: Lists) -> dict[str, np.ndarray]:
    return {"users": lists.users, "candidates": lists.candidates, "column": lists.column}


def read_lists(path: Path) -> dict[str, np.ndarray] | None:
    """`users`, `candidates` and `column` that saved scores are of; None if there are none, or they are damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("users", "candidates", "column")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def read_scores(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The first rows of saved scores if all of them are there, else None."""
    try:
        scores = np.load(path, allow_pickle=False)
    except Exception:  # whatever a damaged header makes NumPy raise
        return None
    whole = scores.ndim == 2 and scores.shape[1] == shape[1] and len(scores) >= shape[0]
    return scores[: shape[0]] if whole and np.isfinite(scores[: shape[0]]).all() else None


def through_llm(
    pipeline: Pipeline, lists: Lists, name: str, x_u: Float[np.ndarray, "rows d"]
) -> Float[np.ndarray, "rows candidates"]:
    """The scores of one of `THROUGH_LLM`, those that are saved and those that are not yet."""
    saved = open_folder(pipeline, lists) / f"{lists.group}.{name}.npy"
    done = read_scores(saved, lists.candidates.shape)
    if done is not None:
        return done
    x = pipeline.experiment
    _resize(saved, len(lists.users))
    histories = pipeline.dataset.histories(lists.users, x.llm.history, lists.split)
    heads, e = injected(pipeline, name)
    return score_users(
        pipeline.ranker(heads, candidates=lists.candidates.shape[1], e=e),
        [row[row != 0] for row in histories],
        lists.candidates,
        x_u,
        saved=saved,
        label=f"evaluation: {lists.group}, {name}",
        batch=x.evaluation.batch,
        console=pipeline.console,
    )


def _resize(path: Path, rows: int) -> None:
    """Saved scores of fewer (or more) users become those of `rows`, the new ones not yet scored."""
    try:
        scores = np.load(path, allow_pickle=False)
    except Exception:  # none, or damaged: `score_users` says so
        return
    if scores.ndim == 2 and len(scores) != rows:
        more = np.full((max(0, rows - len(scores)), scores.shape[1]), np.nan, np.float32)
        with write_atomically(path) as file:
            np.save(file, np.concatenate([scores[:rows], more]))


def injected(pipeline: Pipeline, name: str) -> tuple[Any, np.ndarray | None]:
    """(the heads of one of `THROUGH_LLM`, None for the LLM alone; what F_I reads of items, if not as in training)."""
    if name not in INJECTED:
        return None, None
    table = INJECTED[name]
    return pipeline.heads, None if table is None else getattr(pipeline.aligned, table)
