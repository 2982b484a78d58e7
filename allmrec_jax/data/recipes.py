"""The two data recipes: which rows stay. SPEC of the rules in each function; texts are in `text.py`.

Rows are given as integer codes of users and items (any numbering), in the input's order. A recipe gives a mask of the
rows that stay, and what it dropped: `[{"reason": ..., "rows": ...}]`, so that kept + dropped = all rows, exactly.
"""

import numpy as np
from jaxtyping import Bool, Integer, Real

from allmrec_jax.errors import UserError

RECIPES = ("clean", "reference")
Rows = Integer[np.ndarray, " rows"]


def clean(
    users: Rows,
    items: Rows,
    times: Rows | None,
    ratings: Real[np.ndarray, " rows"] | None,
    *,
    k_core: int = 5,
    min_positive_rating: float | None = None,
) -> tuple[Bool[np.ndarray, " rows"], list[dict]]:
    """Exact duplicates, low ratings, then the k-core.

    1. Of rows equal in user, item and time the first stays. Without times nothing counts as a duplicate: a repeated
       item may be a real repetition.
    2. Rows rated below `min_positive_rating`, if given, go.
    3. Rows of users, then of items, with fewer than `k_core` rows go, until nothing changes. What stays in the end
       does not depend on that order: it is the largest set of rows in which everybody has at least `k_core`.
    """
    keep = np.ones(len(users), bool)
    dropped = []

    def drop(reason: str, gone: np.ndarray) -> None:
        dropped.append({"reason": reason, "rows": int((keep & gone).sum())})
        keep[gone] = False

    if times is not None:
        drop("exact repeat of (user, item, time)", repeated_rows(users, items, times))
    if min_positive_rating is not None:
        if ratings is None:
            raise UserError("min_positive_rating needs ratings, and this input has none")
        drop(f"rating below {min_positive_rating:g}", ratings < min_positive_rating)
    by_user, by_item = k_core_rows(users, items, keep, k_core)
    drop(f"user with fewer than {k_core} interactions", by_user)
    drop(f"item with fewer than {k_core} interactions", by_item)
    return keep, dropped


def reference(
    users: Rows, items: Rows, ratings: Real[np.ndarray, " rows"] | None, *, name: str
) -> tuple[Bool[np.ndarray, " rows"], list[dict]]:
    """The public code's rule: ONE counting pass; a row stays if the counts of its user and of its item are enough.

    Enough is 5; if the data set's name contains `Beauty` or `Toys` it is 4, and rows rated below 3 are not counted
    (but kept like any other). Duplicates stay. Users and items below the threshold may remain.
    """
    special = "Beauty" in name or "Toys" in name
    threshold = 4 if special else 5
    if special and ratings is None:
        raise UserError(f"the reference recipe needs ratings for a data set called {name}, and this input has none")
    counted = ratings >= 3 if special else np.ones(len(users), bool)
    user_low = _counts(users, counted)[users] < threshold
    item_low = _counts(items, counted)[items] < threshold
    dropped = [
        {"reason": f"user counted fewer than {threshold} times (one pass)", "rows": int(user_low.sum())},
        {"reason": f"item counted fewer than {threshold} times (one pass)", "rows": int((item_low & ~user_low).sum())},
    ]
    return ~(user_low | item_low), dropped


def repeated_rows(users: Rows, items: Rows, times: Rows) -> Bool[np.ndarray, " rows"]:
    """Marks every row that equals an earlier one in user, item and time."""
    order = np.lexsort((times, items, users))  # stable: equal rows stay in the input's order
    same = np.ones(max(len(order) - 1, 0), bool)
    for column in (users, items, times):
        same &= column[order][1:] == column[order][:-1]
    repeated = np.zeros(len(order), bool)
    repeated[order[1:][same]] = True
    return repeated


def k_core_rows(
    users: Rows, items: Rows, keep: Bool[np.ndarray, " rows"], k: int
) -> tuple[Bool[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
    """The rows of `keep` that leave on the way to the k-core: because of their user, because of their item."""
    keep = keep.copy()
    by_user, by_item = np.zeros(len(keep), bool), np.zeros(len(keep), bool)
    changed = True
    while changed:
        changed = False
        for codes, gone in ((users, by_user), (items, by_item)):
            low = keep & (_counts(codes, keep)[codes] < k)
            if low.any():
                gone |= low
                keep &= ~low
                changed = True
    return by_user, by_item


def in_order(users: Rows, times: Rows | None) -> Integer[np.ndarray, " rows"]:
    """The order of the rows in the prepared data set: by user, then time; rows of equal time as the input has them."""
    return np.lexsort((users,) if times is None else (times, users))


def number(codes: Rows) -> tuple[Integer[np.ndarray, " rows"], Integer[np.ndarray, " distinct"]]:
    """Ids 1, 2, ... in order of first appearance, and the code that each id stands for."""
    values, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    by_appearance = np.argsort(first, kind="stable")
    ids = np.empty(len(values), np.int64)
    ids[by_appearance] = np.arange(1, len(values) + 1)
    return ids[inverse], values[by_appearance]


def _counts(codes: np.ndarray, counted: np.ndarray) -> np.ndarray:
    return np.bincount(codes[counted], minlength=int(codes.max(initial=-1)) + 1)
