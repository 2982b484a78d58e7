"""`retrieve`: no candidate list. The CF model's top N of the whole catalogue become the candidates of the LLM.

A target's rank in the whole catalogue is its place among the N as the LLM orders them, or, where it is not among them,
the rank that the CF model gives it: N or beyond. So nothing is gained or lost but within the N.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import catalogue, metrics
from allmrec_jax.evaluation.rank import score_users
from allmrec_jax.models import collaborative
from allmrec_jax.models.cf_model import CFModel
from allmrec_jax.pipeline import Pipeline

ROWS = 256  # users whose scores of the whole catalogue are there at once
SEED_STREAM = 11


@dataclass(frozen=True, eq=False)
class Retrieved:
    """A row for each user: the rank (0 = first) of the target in the whole catalogue, by each model.

    found: whether the target is among the CF model's top N, beyond which no order of these helps.
    """

    users: Int[np.ndarray, " users"]
    ranks: dict[str, Int[np.ndarray, " users"]]
    found: Bool[np.ndarray, " users"]


def top_of_catalogue(
    cf: CFModel,
    x_u: Float[np.ndarray, "users d"],
    targets: Int[np.ndarray, " users"],
    n: int,
    without: Int[np.ndarray, "users others"],
) -> tuple[Int[np.ndarray, "users n"], Int[np.ndarray, " users"]]:
    """(the CF model's best `n` of all items, the rank of each target); a tie counts against the target.

    Args:
      without: items that are left out for a user (0: none); never the target.
    """
    items, E = [], None if hasattr(collaborative.module_of(cf.config), "score") else jnp.asarray(cf.E)
    ranks, size, longest = [], len(cf.E) - 1, without.shape[1]
    for start in range(0, len(x_u), ROWS):
        rows = np.arange(start, start + ROWS).clip(max=len(x_u) - 1)  # the last batch is filled up
        gone, own, every = without[rows], targets[rows], np.arange(ROWS)
        hidden = np.zeros((ROWS, size + 1), bool)
        np.put_along_axis(hidden, gone, True, axis=1)
        hidden[every, own], hidden[:, 0] = False, True
        if E is None:  # not a product: every score is asked for
            scores = cf.scores(x_u[rows], np.tile(np.arange(size + 1), (ROWS, 1)))
            best = np.argsort(-scores[:, 1:], axis=1, kind="stable") + 1
            rank = ((scores >= scores[every, own][:, None]) & ~hidden).sum(1) - 1  # itself
        else:
            best = np.asarray(catalogue.top_k(x_u[rows], E, min(size, n + longest))[1])
            rank = np.asarray(catalogue.ranks(x_u[rows], E, own, gone)[1])
        first = np.argsort(np.take_along_axis(hidden, best, axis=1), axis=1, kind="stable")[:, :n]
        items.append(np.take_along_axis(best, first, axis=1))
        ranks.append(rank)
    return np.concatenate(items)[: len(x_u)], np.concatenate(ranks)[: len(x_u)]


def retrieve(
    pipeline: Pipeline,
    users: Int[np.ndarray, " users"],
    *,
    n: int = 20,
    new_only: bool = False,
    split: str = "test",
    heads: Any = None,
    label: str = "retrieval",
) -> Retrieved:
    """The ranks of users' targets by the CF model (`cf`), by the LLM's order of its top `n` (`a-llmrec`, `mlp-llm` or
    `llm-only`), and by the mean of both (`fused`).

    Args:
      new_only: leave the history out of the catalogue, and users out whose target they had before.
      heads: `pipeline.heads`, or None for the LLM alone.

    Raises:
      UserError: if there are fewer than `n` items, or nobody is left.
    """
    dataset, x = pipeline.dataset, pipeline.experiment
    targets = dataset.targets_of(users, split)
    longest = int(max(1, dataset.lengths[users[users <= dataset.n_users]].max(initial=2)))
    history = dataset.histories(users, longest, split)
    if new_only:
        kept = ~(history == targets[:, None]).any(1)
        users, targets, history = users[kept], targets[kept], history[kept]
    else:
        history = np.zeros((len(users), 1), np.int32)
    if not len(users):
        raise UserError("retrieval: nobody is left whose target is new to them")
    if not 1 <= n <= dataset.n_items - (history > 0).sum(1).max():
        raise UserError(f"retrieval: n is {n}, but there are {dataset.n_items} items, some of them in histories")
    x_u = pipeline.cf.x_u(dataset.histories(users, x.cf.maxlen, split), users)
    items, cf_rank = top_of_catalogue(pipeline.cf, x_u, targets, n, history)
    # Each list in a random order of its user's: the prompt must not tell the LLM what the CF model thinks.
    order = np.stack([np.random.default_rng([x.seed, SEED_STREAM, int(user)]).permutation(n) for user in users])
    lists, cf = np.take_along_axis(items, order, axis=1), -order.astype(np.float32)
    name = "llm-only" if heads is None else x.llm.model
    digest = zlib.crc32(b"".join(np.ascontiguousarray(part, np.int64).tobytes() for part in (users, lists)))
    prompts = [row[row != 0] for row in dataset.histories(users, x.llm.history, split)]
    options = {"saved": pipeline.scores_folder / f"retrieve.{name}.{digest:08x}.npy", "label": f"{label}: {name}"}
    options |= {"batch": x.evaluation.batch, "console": pipeline.console}
    scores = score_users(pipeline.ranker(heads, candidates=n), prompts, lists, x_u, **options)
    inside = lists == targets[:, None]
    found, column = inside.any(1), inside.argmax(1)
    ranks = {"cf": cf_rank}
    for model, by in ((name, scores), ("fused", metrics.mean_rank(cf, scores))):
        ranks[model] = np.where(found, metrics.target_ranks(by, column), cf_rank)
    return Retrieved(users, ranks, found)


def figures(found: Retrieved, *, seed: int, resamples: int = 2000) -> dict[str, Any]:
    """`{"models": {model: {metric: {"value", "low", "high", "n"}}}, "differences": {model: {"cf": {metric: ..}}},
    "found": share of targets among the top N}`, hit rate and NDCG at k in the whole catalogue."""
    values = {model: metrics.metrics_of(ranks) for model, ranks in found.ranks.items()}
    options = {"seed": seed, "resamples": resamples}
    models = {
        model: {name: asdict(metrics.bootstrap(of_users, **options)) for name, of_users in own.items()}
        for model, own in values.items()
    }
    differences = {
        model: {
            "cf": {name: asdict(metrics.paired_difference(own[name], values["cf"][name], **options)) for name in own}
        }
        for model, own in values.items()
        if model != "cf"
    }
    return {"models": models, "differences": differences, "found": float(found.found.mean())}
