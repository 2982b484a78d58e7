"""The named scenarios of an evaluation: which rows of which lists each is about, or why it does not apply.

overall                 all rows of `test`
cold-items, warm-items  rows whose target is among the 35 % of the catalogue with the fewest (most) training
                        interactions; beside each the rule "at most (more than) 5", as NAME-by-rule
cold-users              lists of their own
few-shot-256, -128      all rows of `test`, by models that were trained on so many users alone
cross-domain            another data set's test users (`cross_domain`)
genres                  those of `test` whose item has a category (`genres`)
full-catalogue          `test`, no list given (`full_catalogue`)
generated               `test`, answers in words (`written`)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from allmrec_jax.config import FEW_SHOT
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.data.scenarios import FEW
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import metrics
from allmrec_jax.evaluation.labels import NEW
from allmrec_jax.evaluation.lists import Lists

BY_RULE = "-by-rule"
ROWS = {  # whose rows
    "overall": "test",
    "cold-items": "test",
    "warm-items": "test",
    "cold-users": "cold-users",
    **{f"few-shot-{k}": "test" for k in FEW_SHOT},
}
ALL = (*ROWS, "cross-domain", "genres")  # the paper's, and what `all` means
NAMES = (*ALL, "full-catalogue", "generated")
FREE = ("overall", "cold-items", "warm-items")  # of the same scored users


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of one scenario, with facts for people."""

    rows: Bool[np.ndarray, " rows"]
    facts: dict[str, Any] = field(default_factory=dict)


def asked(names: Iterable[str] | None, few_shot: int | None = None) -> tuple[str, ...]:
    """The scenarios that the names mean, in the order of `NAMES`; None is those that cost nothing more, `all` is `ALL`.

    Args:
      few_shot: where everything was trained on so many users alone, there is that scenario only.

    Raises:
      UserError: for a name that is none, or none of such a work directory.
    """
    there = NAMES if few_shot is None else (f"few-shot-{few_shot}",)
    names = [name for name in FREE if name in there] or list(there) if names is None else list(names)
    for name in names:
        if name not in (*NAMES, "all"):
            raise UserError(f"there is no scenario {name!r}; choose among {', '.join(NAMES)}, or all")
        if name not in (*there, "all"):
            raise UserError(f"{name} needs models of all users; those of this work directory saw {few_shot} alone")
    wanted = {*names, *(ALL if "all" in names else ())}
    return tuple(name for name in there if name in wanted)


def in_order(names: Iterable[str]) -> list[str]:
    """In the order of `NAMES`, each with those beside it."""
    places = {name: place for place, name in enumerate(NAMES)}
    return sorted(names, key=lambda name: (places[name.removesuffix(BY_RULE)], name))


def why_not(dataset: Dataset, name: str) -> str | None:
    """Why the scenario does not apply to the data set; None if it does."""
    stored = dataset.manifest["scenarios"]
    return stored[name if name in stored else "overall"]["reason"]


def parts(dataset: Dataset, name: str, lists: Lists) -> dict[str, Part]:
    """The scenario's rows of `lists`, and for items those by the rule, by name. A part may have none."""
    if name not in ("cold-items", "warm-items"):
        return {name: Part(np.ones(len(lists.users), bool))}
    stored = dataset.scenario(name)
    seen = dataset.train_counts()[lists.targets]
    by_rule = seen <= FEW if name == "cold-items" else seen > FEW
    facts = {key: stored.facts[key] for key in ("items", "least", "most")}
    return {
        name: Part(np.isin(lists.users, stored.users), facts),
        name + BY_RULE: Part(by_rule, {"items": stored.facts["items_by_rule"], "rule": stored.facts["rule"]}),
    }


def figures(
    scores: Mapping[str, Float[np.ndarray, "rows candidates"]],
    lists: Lists,
    rows: Bool[np.ndarray, " rows"],
    pairs: Iterable[tuple[str, str]],
    *,
    seed: int,
    resamples: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(figures of each model, paired differences of those pairs that have scores) over some rows.

    A metric behind `NEW` is over the rows whose target is not in the history; no other candidate ever is.
    """
    options = {"seed": seed, "resamples": resamples}
    pairs = [(a, b) for a, b in pairs if a in scores and b in scores]
    new = rows & ~lists.repeats
    found, differences = (
        metrics.summarise({name: of[rows] for name, of in scores.items()}, lists.column[rows], **options),
        metrics.differences({name: of[rows] for name, of in scores.items()}, lists.column[rows], pairs, **options),
    )
    if new.any():
        some = {name: of[new] for name, of in scores.items()}
        for name, of_model in metrics.summarise(some, lists.column[new], **options).items():
            found[name] |= {NEW + metric: figure for metric, figure in of_model.items()}
        of_pairs = metrics.differences(some, lists.column[new], pairs, **options)
        for a, of_a in of_pairs.items():
            for b, of_pair in of_a.items():
                differences[a][b] |= {NEW + metric: figure for metric, figure in of_pair.items()}
    return found, differences
