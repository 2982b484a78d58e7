"""Recommendations for one user: candidates ranked by the CF model and the LLM, and what moved the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from allmrec_jax.data.dataset import Dataset
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation.constrained import TitleWriter
from allmrec_jax.evaluation.metrics import mean_rank
from allmrec_jax.evaluation.titles import doubts, find_items
from allmrec_jax.pipeline import Pipeline

REASONS = 3  # history items shown for each recommendation
BEAMS = 10  # at least, where any title may be written
ORDERS = {
    "cf": "In order of the mean of both ranks among the CF model's top {n}.",
    "among": "In order of the mean of both ranks among the {n} candidates.",
    "all": "In order of the LLM's likelihood, of the titles that it found among all; CF ranks are among all items.",
}


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


def recommend(
    pipeline: Pipeline,
    *,
    user: str | None = None,
    titles: Sequence[str] | None = None,
    k: int = 5,
    candidates: int = 20,
    among: Sequence[str] | None = None,
    everything: bool = False,
    reasons: bool = False,
) -> dict[str, Any]:
    """The `k` best items for a known user, or for somebody new who liked these titles.

    Of the CF model's top `candidates` or of the items `among`: by the mean of the CF model's and A-LLMRec's ranks.
    Of `everything`: the titles that the LLM writes by beam search, its prompt naming the CF model's top `candidates`.
    Items of the history are not recommended, unless they are named in `among`.

    Returns `{"history", "candidates": how many, "source", "notes", "recommendations": [{"rank", "title", "item",
    "mean_rank", "cf_rank", "llm_rank", "log_likelihood"}]}`, ranks from 1. With `reasons` also `"reasons"`: the history
    items whose absence changes the log-likelihood most: [{"title", "log_likelihood", "cf"}], what each adds to both
    scores.

    Raises:
      UserError: for an unknown user or title, an empty history, or nothing left to recommend.
    """
    dataset, x = pipeline.dataset, pipeline.experiment
    if candidates < 1 or k < 1:
        raise UserError("-k and --candidates must be at least 1")
    if among is not None and everything:
        raise UserError("choose either --among or --all")
    notes: list[str] = []
    if user is not None:
        items = dataset.sequence(find_user(dataset, user)).tolist()
    else:
        matches = find_items(dataset, titles or [])
        items, notes = [match.item for match in matches], doubts(matches)
    if not items:
        raise UserError("the history is empty; name at least one title")
    x_u = pipeline.cf.x_u(_windows([items], x.cf.maxlen))
    if among is not None:
        matches = find_items(dataset, among)
        named = list(dict.fromkeys(match.item for match in matches))
        notes += doubts(matches)
        if len(named) < len(matches):
            notes.append(f"{len(matches) - len(named)} of the candidates were named before, and count once")
        pool, source = np.array(named), "among"
        scores = pipeline.cf.scores(x_u, pool[None])[0]
    else:
        scores = pipeline.cf.scores(x_u, np.arange(dataset.n_items + 1)[None])[0].copy()
        scores[[0, *items]] = -np.inf
        left = dataset.n_items - len(set(items))
        if not left:
            raise UserError("the history holds every item; there is nothing left to recommend")
        pool, source = np.argsort(-scores, kind="stable")[: min(candidates, left)], "all" if everything else "cf"
        if left < candidates:
            notes.append(f"there are only {left} items beside the history")
    # In a random order, as in training: the prompt must not tell the LLM what the CF model thinks.
    shuffle = np.random.default_rng(x.seed).permutation(len(pool))
    pool, prompt = pool[shuffle], items[-x.llm.history :]
    if source == "all":
        chosen, likelihood = _written(pipeline, prompt, pool, x_u, items, k)
        cf_rank = 1 + (scores[None] > scores[chosen][:, None]).sum(1)
        llm_rank = 1 + np.arange(len(chosen))
        order, mean = np.arange(len(chosen))[:k], (cf_rank + llm_rank) / 2
    else:
        cf = scores[pool] if source == "cf" else scores[shuffle]
        ranker = pipeline.ranker(pipeline.heads, candidates=len(pool), batch=pipeline.mesh.shape["data"])
        chosen, likelihood = pool, ranker([prompt], pool[None], x_u)[0]
        mean = 1 - mean_rank(cf[None], likelihood[None])[0]
        order = np.argsort(mean, kind="stable")[:k]
        cf_rank, llm_rank = (np.argsort(np.argsort(-s, kind="stable")) + 1 for s in (cf, likelihood))
    names = ["No Title" if title is None else title for title in dataset.titles()]
    rows = [
        {
            "rank": place + 1,
            "title": names[chosen[c]],
            "item": dataset.item_keys[chosen[c]],
            "mean_rank": float(mean[c]),
            "cf_rank": int(cf_rank[c]),
            "llm_rank": int(llm_rank[c]),
            "log_likelihood": float(likelihood[c]),
        }
        for place, c in enumerate(order)
    ]
    if reasons:
        moved = leave_one_out(pipeline, items, pool, chosen[order])
        for row, of_row in zip(rows, moved, strict=True):
            row["reasons"] = [{"title": names[item], "log_likelihood": llm, "cf": cf} for item, llm, cf in of_row]
    return {
        "history": [names[i] for i in prompt],
        "candidates": len(pool),
        "source": source,
        "notes": notes,
        "recommendations": rows,
    }


def _windows(histories: Sequence[Sequence[int]], maxlen: int) -> Int[np.ndarray, "rows maxlen"]:
    """The last items of each history, padded with 0 on the left."""
    windows = np.zeros((len(histories), maxlen), np.int32)
    for row, history in zip(windows, histories, strict=True):
        last = history[-maxlen:]
        row[maxlen - len(last) :] = last
    return windows


def _written(
    pipeline: Pipeline, prompt: Sequence[int], pool: np.ndarray, x_u: np.ndarray, history: Sequence[int], k: int
) -> tuple[Int[np.ndarray, " found"], Float[np.ndarray, " found"]]:
    """(items, log-likelihoods) of the titles of all items that the LLM finds likeliest, best first."""
    options = pipeline.through_llm(pipeline.heads, batch=pipeline.mesh.shape["data"])
    normalise, everything = pipeline.experiment.evaluation.score == "mean", np.arange(1, pipeline.dataset.n_items + 1)
    options |= {"beams": max(k, BEAMS), "catalogue": everything, "normalise": normalise}
    writer = TitleWriter(pipeline.llm, pipeline.heads, **options)
    items, scores = writer([list(prompt)], pool[None], x_u, without=[list(history)])
    there = items[0] > 0
    return items[0][there], scores[0][there]


def leave_one_out(
    pipeline: Pipeline, items: Sequence[int], pool: Int[np.ndarray, " candidates"], chosen: Int[np.ndarray, " chosen"]
) -> list[list[tuple[int, float, float]]]:
    """For each chosen item what each item of the prompt's history adds to its scores, the largest change first.

    An item is left out of the prompt and of the history behind x_u; all histories are scored together.

    Returns for each chosen item [(history item, log-likelihood, CF score)], at most `REASONS`.
    """
    x = pipeline.experiment
    first = max(0, len(items) - x.llm.history)
    histories = [list(items), *([*items[:at], *items[at + 1 :]] for at in range(first, len(items)))]
    prompts = [list(items[first:]), *([*items[first:at], *items[at + 1 :]] for at in range(first, len(items)))]
    x_u, rows = pipeline.cf.x_u(_windows(histories, x.cf.maxlen)), len(histories)
    asked, lists = np.tile(chosen, (rows, 1)), np.tile(pool, (rows, 1))
    batch = -(-min(rows, x.evaluation.batch) // pipeline.mesh.shape["data"]) * pipeline.mesh.shape["data"]
    ranker = pipeline.ranker(pipeline.heads, candidates=len(chosen), batch=batch)
    likelihood, cf = ranker(prompts, lists, x_u, asked=asked), pipeline.cf.scores(x_u, asked)
    added = [(scores[:1] - scores[1:]).T for scores in (likelihood, cf)]
    found = []
    for of_llm, of_cf in zip(*added, strict=True):
        order = np.argsort(-np.abs(of_llm), kind="stable")[:REASONS]
        found.append([(items[first + i], float(of_llm[i]), float(of_cf[i])) for i in order])
    return found


def table(answer: dict[str, Any]) -> Any:
    """The answer of `recommend` for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    how = ORDERS[answer["source"]].format(n=answer["candidates"])
    notes = [note[0].upper() + note[1:] + "." for note in answer["notes"]]
    out = Table(
        title="After " + escape("; ".join(answer["history"])), caption=escape("\n".join([how, *notes])), box=None
    )
    out.title_justify = out.caption_justify = "left"
    out.add_column("", justify="right")
    out.add_column("title")
    for name in ("CF rank", "LLM rank", "mean rank"):
        out.add_column(name, justify="right")
    explained = any("reasons" in row for row in answer["recommendations"])
    if explained:
        out.add_column("what moved the LLM (log-likelihood)")
    for row in answer["recommendations"]:
        ranks = str(row["cf_rank"]), str(row["llm_rank"]), f"{row['mean_rank']:g}"
        why = [f"{reason['log_likelihood']:+.3f} {reason['title']}" for reason in row.get("reasons", [])]
        out.add_row(str(row["rank"]), escape(row["title"]), *ranks, *([escape("\n".join(why))] if explained else []))
    return out
