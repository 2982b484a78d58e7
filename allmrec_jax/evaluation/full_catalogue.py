"""`full-catalogue`: no list is given; the LLM orders the CF model's first `evaluation.candidates` of all items again.

Hits and NDCG are of the target's rank among all items (`retrieve`). The history is not left out, because people do come
back to items; a metric behind `new:` leaves it out, and with it the users whose target is in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import cf as cf_alone
from allmrec_jax.evaluation import retrieve
from allmrec_jax.evaluation.labels import NEW
from allmrec_jax.evaluation.retrieve import Retrieved
from allmrec_jax.pipeline import Pipeline

SHOWN = ("hit@1", "hit@10", "ndcg@10", "mrr", f"{NEW}hit@10", f"{NEW}ndcg@10")
ORDER = ("popularity", "cf", "llm-only", "mlp-llm", "a-llmrec", "mean-rank")


def evaluate(
    pipeline: Pipeline, users: np.ndarray, models: Iterable[str], *, resamples: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]] | str:
    """(figures, paired differences with the CF model, facts); or why not."""
    x, models = pipeline.experiment, set(models)
    n, own = x.evaluation.candidates, x.llm.model
    asked = [name for name in ("llm-only", own) if name in models]
    if not asked:
        return f"it is about the order that the LLM gives; ask for llm-only or {own}"
    popularity, _ = cf_alone.trivial_ranks(pipeline.dataset, seed=x.seed)
    place = np.full(pipeline.dataset.n_users + 1, -1)
    place[np.flatnonzero(pipeline.dataset.has_target("test"))] = np.arange(pipeline.dataset.has_target("test").sum())
    figures: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    found: dict[str, float] = {}
    for prefix, new_only in (("", False), (NEW, True)):
        ranks: dict[str, np.ndarray] = {}
        try:
            for name in asked:
                heads = None if name == "llm-only" else pipeline.heads
                label = f"evaluation: full catalogue{', new items' if new_only else ''}"
                got = retrieve.retrieve(pipeline, users, n=n, new_only=new_only, heads=heads, label=label)
                ranks |= {model: of for model, of in got.ranks.items() if model != "fused"}
                if name == own:
                    ranks["mean-rank"] = got.ranks["fused"]
        except UserError:
            if not new_only:
                raise
            continue  # nobody's target is new, or histories leave too few items
        ranks["popularity"] = popularity["new" if new_only else "full"][place[got.users]]
        of = retrieve.figures(Retrieved(got.users, ranks, got.found), seed=x.seed, resamples=resamples)
        found[prefix] = of["found"]
        for model in ORDER:
            if model in of["models"]:
                figures.setdefault(model, {}).update({prefix + name: f for name, f in of["models"][model].items()})
        for model, pairs in of["differences"].items():
            into = differences.setdefault(model, {}).setdefault("cf", {})
            into |= {prefix + name: figure for name, figure in pairs["cf"].items()}
    told = f"among all {pipeline.dataset.n_items:,} items; {found['']:.1%} are among the CF model's first {n}"
    facts = {"users": len(users), "of": len(users), "told": told, "candidates": None, "metrics": SHOWN}
    return figures, differences, facts
