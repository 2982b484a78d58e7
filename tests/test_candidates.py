"""Candidate lists: the target among distinct strangers, seeded, the same however the work is cut."""

import jax
import numpy as np
import pytest

from allmrec_jax.data.batches import seen_items
from allmrec_jax.data.candidates import draw_candidates
from allmrec_jax.errors import UserError

KEY = jax.random.key(0)
N_ITEMS, USERS, COUNT = 60, 300, 20


@pytest.fixture(scope="module")
def seen():
    """Users 1..300 with 1 to 40 of 60 items each."""
    random = np.random.default_rng(1)
    sets = [np.sort(random.choice(N_ITEMS, random.integers(1, 41), replace=False)) + 1 for _ in range(USERS)]
    return seen_items(np.concatenate(sets), np.concatenate([[0, 0], np.cumsum([len(s) for s in sets])]), N_ITEMS), sets


@pytest.fixture(scope="module")
def drawn(seen):
    users = np.arange(1, USERS + 1)
    targets = np.array([s[-1] for s in seen[1]])
    return users, targets, *draw_candidates(KEY, 0, users, users, targets, seen[0], COUNT)


def test_distinct_never_the_user_s_items_and_the_target_where_it_is_said_to_be(seen, drawn):
    _, targets, candidates, column = drawn
    assert candidates.shape == (USERS, COUNT)
    assert ((candidates >= 1) & (candidates <= N_ITEMS)).all()
    np.testing.assert_array_equal(candidates[np.arange(USERS), column], targets)
    for row, at, has in zip(candidates.tolist(), column, seen[1], strict=True):
        assert len(set(row)) == COUNT
        assert not set(row[:at] + row[at + 1 :]) & set(has.tolist())


def test_the_same_however_the_rows_are_split_over_calls(seen, drawn):
    users, targets, candidates, column = drawn
    for rows in (slice(0, 1), slice(100, 150), slice(250, 300)):
        part = draw_candidates(KEY, 0, users[rows], users[rows], targets[rows], seen[0], COUNT)
        np.testing.assert_array_equal(part[0], candidates[rows])
        np.testing.assert_array_equal(part[1], column[rows])
    order = np.random.default_rng(0).permutation(USERS)
    shuffled = draw_candidates(KEY, 0, users[order], users[order], targets[order], seen[0], COUNT)
    np.testing.assert_array_equal(shuffled[0], candidates[order])


def test_seeded_and_drawn_anew_each_step(seen, drawn):
    users, targets, candidates, _ = drawn
    again, _ = draw_candidates(KEY, 0, users, users, targets, seen[0], COUNT)
    np.testing.assert_array_equal(again, candidates)
    for key, step in ((jax.random.key(1), 0), (KEY, 1)):
        other, _ = draw_candidates(key, step, users, users, targets, seen[0], COUNT)
        assert (other != candidates).any(1).all()


def test_the_target_stands_anywhere_and_every_stranger_is_as_likely(seen):
    """4,000 draws for one user: the column and the items are uniform within five standard deviations."""
    rows, user = np.arange(4000), 7
    has = set(seen[1][user - 1].tolist())
    target = int(seen[1][user - 1][0])
    users, targets = np.full(len(rows), user), np.full(len(rows), target)
    candidates, column = draw_candidates(KEY, 3, rows, users, targets, seen[0], 5)

    def assert_uniform(counts: np.ndarray) -> None:
        expected, freedom = counts.sum() / len(counts), len(counts) - 1
        assert abs(((counts - expected) ** 2 / expected).sum() - freedom) < 5 * np.sqrt(2 * freedom)

    assert_uniform(np.bincount(column, minlength=5))
    counts = np.bincount(candidates.ravel(), minlength=N_ITEMS + 1)
    strangers = sorted(set(range(1, N_ITEMS + 1)) - has)
    assert counts[target] == len(rows)
    assert counts.sum() == 5 * len(rows)
    assert counts[[target, *strangers]].sum() == counts.sum()
    assert_uniform(counts[strangers])


def test_every_stranger_where_there_are_just_enough_and_a_clear_word_where_not():
    few = seen_items(np.array([1, 2, 3, 5]), np.array([0, 0, 1, 4]), 6)
    candidates, _ = draw_candidates(KEY, 0, np.arange(1), np.array([2]), np.array([5]), few, 4)
    assert sorted(candidates[0].tolist()) == [1, 4, 5, 6]
    with pytest.raises(UserError, match="user 2 leaves only 3 items for 4 random candidates; ask for fewer"):
        draw_candidates(KEY, 0, np.arange(2), np.array([1, 2]), np.array([1, 5]), few, 5)
