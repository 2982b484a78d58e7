"""Which users and items each scenario is about: seeded, stored with the data set, or the reason why it does not apply.

    overall               every user with a test item
    cold-items            ... whose test item is among the 35 % of the catalogue with the fewest training interactions
    warm-items            ... the most training interactions
    cold-users            users with exactly three interactions, left out of all training: history two, target the last
    few-shot-256, -128    the users that everything is trained on; tested on the users of `overall`
    cross-domain          trained on another data set: items are known by their texts alone
    genres                which categories would this user enjoy: users whose test item has some

The paper says "bottom / top 35 % of interactions" and no more. Here ALL items of the catalogue are ranked by their
training interactions, ties by id, and floor(0.35 n) of them are cold, as many are warm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Integer

from allmrec_jax.config import FEW_SHOT

if TYPE_CHECKING:
    from allmrec_jax.data.dataset import Dataset

SHARE = 35  # per cent
FEW = 5
COLD_LENGTH = 3

NAMES = (
    "overall",
    "cold-items",
    "warm-items",
    "cold-users",
    *(f"few-shot-{k}" for k in FEW_SHOT),
    "cross-domain",
    "genres",
)


@dataclass(frozen=True, eq=False)
class Scenario:
    """One scenario of one data set.

    users: the user ids it is about (see the module's docstring); ids above `n_users` are the data set's cold users.
    items: the item ids it is about, where it is about some.
    facts: figures for people.
    reason: why it does not apply to this data set; None if it does.
    """

    users: Integer[np.ndarray, " users"] = field(default_factory=lambda: np.zeros(0, np.int32))
    items: Integer[np.ndarray, " items"] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None


def make(
    dataset: Dataset,
    *,
    seed: int,
    with_text: int,
    with_category: Bool[np.ndarray, " catalogue"],
    cold_users: str | None = None,
) -> dict[str, Scenario]:
    """The scenarios of a data set.

    Args:
      with_text: how many items have a title or description.
      with_category: whether item 1, 2, ... has a category.
      cold_users: why there can be no cold users, if the recipe leaves none.
    """
    tested = np.flatnonzero(dataset.has_target("test")).astype(np.int32)
    found = {"overall": Scenario(tested, reason=None if len(tested) else "no user has three interactions")}
    found |= _by_popularity(dataset, tested)
    found["cold-users"] = _cold_users(dataset, cold_users)
    trainable = np.flatnonzero(dataset.has_target("train")).astype(np.int32)
    drawn = np.random.default_rng([seed, 256]).permutation(trainable)
    for k in FEW_SHOT:
        reason = None if k < len(trainable) else f"only {len(trainable):,} users can be trained on"
        users = np.sort(drawn[:k]) if reason is None else drawn[:0]
        found[f"few-shot-{k}"] = Scenario(users, facts={"tested": len(tested)}, reason=reason)
    texts = {"items_with_text": with_text}
    found["cross-domain"] = Scenario(tested, facts=texts, reason=None if with_text else "no item has a text")
    scored = tested[with_category[dataset.targets("test")[tested] - 1]]
    reason = None if len(scored) else "no test item has a category" if with_category.any() else "no item has a category"
    found["genres"] = Scenario(scored, facts={"items_with_category": int(with_category.sum())}, reason=reason)
    return {name: found[name] for name in NAMES}


def _by_popularity(dataset: Dataset, tested: Integer[np.ndarray, " users"]) -> dict[str, Scenario]:
    counts = dataset.train_counts()[1:]
    ranked = np.argsort(counts, kind="stable") + 1
    size = SHARE * len(counts) // 100
    targets = dataset.targets("test")[tested]
    found = {}
    for name, chosen in (("cold-items", ranked[:size]), ("warm-items", ranked[len(ranked) - size :])):
        items = np.sort(chosen).astype(np.int32)
        users = tested[np.isin(targets, items)]
        by_rule = np.flatnonzero(counts <= FEW if name == "cold-items" else counts > FEW) + 1
        facts = {
            "least": int(counts[items - 1].min(initial=counts.max(initial=0))) if size else 0,
            "most": int(counts[items - 1].max(initial=0)),
            "items": size,
            "rule": f"{'at most' if name == 'cold-items' else 'more than'} {FEW} training interactions",
            "items_by_rule": len(by_rule),
            "users_by_rule": int(np.isin(targets, by_rule).sum()),
        }
        reason = None if len(users) else "no test item is among them"
        found[name] = Scenario(users, items, facts, reason)
    return found


def _cold_users(dataset: Dataset, why_none: str | None) -> Scenario:
    kept_apart = np.arange(dataset.n_users + 1, dataset.n_users + 1 + len(dataset.cold_items), dtype=np.int32)
    if len(kept_apart):
        return Scenario(kept_apart, facts={"kept_apart": True})
    users = np.flatnonzero(dataset.lengths == COLD_LENGTH).astype(np.int32)
    if why_none is None and not len(users):
        why_none = f"no user has exactly {COLD_LENGTH} interactions"
    return Scenario(users if why_none is None else users[:0], facts={"kept_apart": False}, reason=why_none)
