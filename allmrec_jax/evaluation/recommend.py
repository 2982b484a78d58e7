"""Recommendations for one user: the CF model's top items, ranked again by the LLM."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np

from allmrec_jax.data.dataset import Dataset
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation.metrics import mean_rank
from allmrec_jax.pipeline import Pipeline


def find_user(dataset: Dataset, key: str) -> int:
    """The id of the user with this raw key.

    Raises:
      UserError: if there is none.
    """
    try:
        return dataset.user_keys.index(str(key), 1)
    except ValueError:
        shown = ", ".join(dataset.user_keys[1:6])
        raise UserError(f"there is no user {key!r} in {dataset.name}; some that there are: {shown}") from None


def find_items(dataset: Dataset, titles: Sequence[str]) -> list[int]:
    """The item that each title names: an equal title (case aside), else the only one that contains it.

    Raises:
      UserError: if a title names none, or several; the nearest are listed.
    """
    known = ["" if title is None else title.lower() for title in dataset.titles()]
    shown = dataset.titles()
    found = []
    for title in titles:
        wanted = title.strip().lower()
        equal = [i for i, name in enumerate(known) if i and name == wanted]
        inside = [i for i, name in enumerate(known) if i and wanted and wanted in name]
        if equal or len(inside) == 1:
            found.append((equal or inside)[0])
            continue
        near = [shown[i] for i in inside] or [
            shown[known.index(name)] for name in difflib.get_close_matches(wanted, known[1:], n=5, cutoff=0.5)
        ]
        options = "; ".join(dict.fromkeys(near[:5])) or "nothing like it"
        problem = f"{title!r} fits several titles" if inside else f"there is no title {title!r}"
        raise UserError(f"{problem} in {dataset.name}; did you mean: {options}")
    return found


def recommend(
    pipeline: Pipeline,
    *,
    user: str | None = None,
    titles: Sequence[str] | None = None,
    k: int = 5,
    candidates: int = 20,
) -> dict[str, Any]:
    """The `k` best of the CF model's top `candidates`, by the mean of the CF model's and A-LLMRec's ranks.

    Items already in the history are not recommended. Returns `{"history", "candidates": how many,
    "recommendations": [{"rank", "title", "item", "mean_rank", "cf_rank", "llm_rank", "log_likelihood"}]}`, ranks from
    1, in order of `mean_rank`.
    """
    dataset, x = pipeline.dataset, pipeline.experiment
    if candidates < 1 or k < 1:
        raise UserError("-k and --candidates must be at least 1")
    if user is not None:
        number = find_user(dataset, user)
        items = dataset.sequence(number).tolist()
    else:
        items = find_items(dataset, titles or [])
    if not items:
        raise UserError("the history is empty; name at least one title")
    names = ["No Title" if title is None else title for title in dataset.titles()]
    window = np.zeros((1, x.cf.maxlen), np.int32)
    last = items[-x.cf.maxlen :]
    window[0, -len(last) :] = last
    x_u = pipeline.cf.x_u(window)
    everything = pipeline.cf.scores(x_u, np.arange(dataset.n_items + 1)[None])[0].copy()
    everything[[0, *items]] = -np.inf
    top = np.argsort(-everything, kind="stable")[: min(candidates, dataset.n_items - len(set(items)))]
    if not len(top):
        raise UserError("the history holds every item; there is nothing left to recommend")
    # In a random order, as in training: the prompt must not tell the LLM what the CF model thinks.
    top = np.random.default_rng(x.seed).permutation(top)
    ranker = pipeline.ranker(pipeline.heads, candidates=len(top), batch=pipeline.mesh.shape["data"])
    likelihood = ranker([items[-x.llm.history :]], top[None], x_u)[0]
    cf = everything[top]
    mean = 1 - mean_rank(cf[None], likelihood[None])[0]
    order = np.argsort(mean, kind="stable")[:k]
    cf_rank, llm_rank = (np.argsort(np.argsort(-scores, kind="stable")) + 1 for scores in (cf, likelihood))
    return {
        "history": [names[i] for i in items[-x.llm.history :]],
        "candidates": len(top),
        "recommendations": [
            {
                "rank": place + 1,
                "title": names[top[c]],
                "item": dataset.item_keys[top[c]],
                "mean_rank": float(mean[c]),
                "cf_rank": int(cf_rank[c]),
                "llm_rank": int(llm_rank[c]),
                "log_likelihood": float(likelihood[c]),
            }
            for place, c in enumerate(order)
        ],
    }


def table(answer: dict[str, Any]) -> Any:
    """The answer of `recommend` for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    how = f"In order of the mean of both ranks among the CF model's top {answer['candidates']}."
    out = Table(title="After " + escape("; ".join(answer["history"])), caption=how, box=None)
    out.title_justify = out.caption_justify = "left"
    out.add_column("", justify="right")
    out.add_column("title")
    for name in ("CF rank", "LLM rank", "mean rank"):
        out.add_column(name, justify="right")
    for row in answer["recommendations"]:
        ranks = str(row["cf_rank"]), str(row["llm_rank"]), f"{row['mean_rank']:g}"
        out.add_row(str(row["rank"]), escape(row["title"]), *ranks)
    return out
