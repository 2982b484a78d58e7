"""The data recipes: which rows stay. The rules stand in each function; what becomes of the texts, in `text.py`.

Rows are given as integer codes of users and items (any numbering), in the input's order. A recipe gives a mask of the
rows that stay, and what it dropped: `[{"reason": ..., "rows": ...}]`, so that kept + dropped = all rows, exactly.
"""

import numpy as np
from jaxtyping import Bool, Integer, Real

from allmrec_jax.errors import UserError

RECIPES = ("clean", "reference", "as-is")
"""`as-is` keeps every row and changes no text: for data that somebody has filtered already."""
Rows = Integer[np.ndarray, " rows"]


def clean(
    users: Rows,
    items: Rows,
    times: Rows | None,
    ratings: Real[np.ndarray, " rows"] | None,
    *,
    k_core: int = 5,
    min_positive_rating: float | None = None,
) -> tuple[Bool[np.ndarray, " rows"], list[dict], Bool[np.ndarray, " rows"]]:
    """Exact duplicates, low ratings, then the k-core. Returns the rows that stay, what went, the rows before step 3.

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
    cleaned = keep.copy()
    by_user, by_item = k_core_rows(users, items, keep, k_core)
    drop(f"user with fewer than {k_core} interactions", by_user)
    drop(f"item with fewer than {k_core} interactions", by_item)
    return keep, dropped, cleaned


def cold_rows(
    users: Rows, items: Rows, cleaned: Bool[np.ndarray, " rows"], keep: Bool[np.ndarray, " rows"], count: int = 3
) -> Bool[np.ndarray, " rows"]:
    """The rows of cold users: removed by the k-core, with exactly `count` cleaned rows, all of items that survive."""
    survives = _counts(items, keep)[items] > 0
    lost = cleaned & ~survives
    cold = (_counts(users, cleaned) == count) & (_counts(users, lost) == 0) & (_counts(users, keep) == 0)
    return cleaned & cold[users]


def defaults(name: str) -> dict[str, float | None]:
    """Thresholds of the clean recipe by the data set's name: the paper keeps ratings above 3 of Beauty and Toys."""
    special = is_special(name)
    return {"k_core": 4 if special else 5, "min_positive_rating": 4.0 if special else None}


def is_special(name: str) -> bool:
    """Whether the public code has rules of its own for a data set of this name."""
    return "Beauty" in name or "Toys" in name


def reference(
    users: Rows, items: Rows, ratings: Real[np.ndarray, " rows"] | None, *, name: str
) -> tuple[Bool[np.ndarray, " rows"], list[dict]]:
    """The public code's rule: ONE counting pass; a row stays if the counts of its user and of its item are enough.

    Enough is 5; if the data set's name contains `Beauty` or `Toys` it is 4, and rows rated below 3 are not counted
    (but kept like any other). Duplicates stay. Users and items below the threshold may remain.
    """
    special = is_special(name)
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
    import polars as pl

    pairs = users.astype(np.uint64) * np.uint64(_distinct(items)) + items.astype(np.uint64)
    rows = pl.DataFrame({"pair": pairs, "time": times})
    return ~rows.select(pl.struct(pl.all()).is_first_distinct()).to_series().to_numpy()


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
    """Ids 1, 2, ... in order of first appearance, and the row in which each id appears first."""
    first = np.full(_distinct(codes), len(codes))
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # the last write, of the earliest row, stays
    appears = np.sort(first[first < len(codes)])
    ids = np.empty(len(first), np.int64)
    ids[codes[appears]] = np.arange(1, len(appears) + 1)
    return ids[codes], appears


def _counts(codes: np.ndarray, counted: np.ndarray) -> np.ndarray:
    return np.bincount(codes[counted], minlength=_distinct(codes))


def _distinct(codes: np.ndarray) -> int:
    return int(codes.max()) + 1 if len(codes) else 0
