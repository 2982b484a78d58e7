"""The data recipes: which rows stay, and what becomes of the texts."""

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from allmrec_jax.data import recipes, text

_rows = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 3), st.integers(1, 5)), max_size=80)


@settings(max_examples=100, deadline=None)
@given(_rows, st.integers(1, 4), st.sampled_from([None, 3.0]))
def test_clean_conserves_rows_and_is_idempotent(rows, k, low):
    users, items, times, ratings = (
        np.array(column, np.int64) for column in (zip(*rows, strict=True) if rows else [()] * 4)
    )
    keep, dropped, _ = recipes.clean(users, items, times, ratings, k_core=k, min_positive_rating=low)
    assert keep.sum() + sum(entry["rows"] for entry in dropped) == len(rows)
    kept = [row for row, stays in zip(rows, keep, strict=True) if stays]
    assert len({row[:3] for row in kept}) == len(kept)
    assert all(sum(other[c] == row[c] for other in kept) >= k for row in kept for c in (0, 1))
    if kept:
        again, _, _ = recipes.clean(
            *(c[keep] for c in (users, items, times, ratings)), k_core=k, min_positive_rating=low
        )
        assert again.all()
    # The core is the largest one: peeling a row at a time, in any order, ends at the same rows.
    unique = list({row[:3]: row for row in reversed(rows)}.values())
    left = [row for row in unique if low is None or row[3] >= low]
    while thin := [r for r in left if any(sum(o[c] == r[c] for o in left) < k for c in (0, 1))]:
        left.remove(thin[-1])
    assert sorted(left) == sorted(kept)


def test_without_times_a_repeat_is_a_repetition():
    same = np.zeros(4, np.int64)
    keep, dropped, _ = recipes.clean(same, same, None, None, k_core=4)
    assert keep.all()
    assert sum(entry["rows"] for entry in dropped) == 0


def test_reference_counts_once_and_not_the_low_ratings_of_beauty():
    # User 0: five reviews of five items; each item is reviewed by enough others, but for item 4.
    users = np.array([0] * 5 + [u for u in range(1, 5) for _ in range(4)] + [5])
    items = np.array([0, 1, 2, 3, 4] + [0, 1, 2, 3] * 4 + [4])
    ratings = np.full(len(users), 5.0)
    keep, dropped = recipes.reference(users, items, ratings, name="Movies")
    assert np.flatnonzero(keep).tolist() == [0, 1, 2, 3]  # user 0 is left with 4 items, below the threshold
    assert keep.sum() + sum(entry["rows"] for entry in dropped) == len(users)
    keep, _ = recipes.reference(users, items, ratings, name="Luxury_Beauty")
    assert keep.sum() == 20  # threshold 4
    ratings[1] = 2.0
    keep, _ = recipes.reference(users, items, ratings, name="Luxury_Beauty")
    assert keep[1]  # not counted, and kept all the same: both counts are still 4


def test_titles():
    junk = ['<span class="a-size-medium a-color-secondary"', "var aPageStart = (new Date()).getTime();"]
    fine = ["I <3 you", "Function & Form", "A <b>bold</b> one", "R&amp;B"]
    cleaned, junk_ones = text.clean_titles(pl.Series([*junk, *fine, None]))
    assert junk_ones.sum() == 2
    assert cleaned.to_list() == [None, None, "I <3 you", "Function & Form", "A bold one", "R&B", None]
    with_years = pl.Series(["Heat (1995)", "Land Before Time (1995) (V)", "1984 (1984)", "(1995)", "M*A*S*H", None])
    assert text.without_years(with_years).to_list() == ["Heat", "Land Before Time", "1984", "(1995)", "M*A*S*H", None]
