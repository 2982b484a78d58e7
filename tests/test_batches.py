"""The index functions: who is in a batch, and which negatives they get."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from allmrec_jax.data import batches
from allmrec_jax.data.batches import (
    draw_distinct,
    draw_negatives,
    draw_users,
    epoch_order,
    rows_of_step,
    seen_items,
    steps_per_epoch,
)


def _seen(sets: list[list[int]], n_items: int):
    offsets = np.concatenate([[0, 0], np.cumsum([len(items) for items in sets])])
    return seen_items(np.array([i for items in sets for i in items], np.int32), offsets, n_items)


def _chi_square(counts: np.ndarray) -> float:
    """Distance from uniform, in standard deviations of the statistic."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def test_negatives_are_uniform_over_exactly_the_items_the_user_lacks():
    sets = [[2, 3, 6], [], [1], [7], [1, 2, 3, 4, 5, 7], [1, 3, 5, 7]]
    rows = 4000
    seen = _seen(sets, 7)
    draw = jax.jit(lambda step, user: draw_negatives(jax.random.key(1), step, rows, user, seen, 3))
    for user, has in enumerate(sets, 1):
        drawn = np.asarray(draw(user, np.full(rows, user)))
        counts = np.bincount(drawn.ravel(), minlength=8)
        lacks = [item for item in range(1, 8) if item not in has]
        assert set(np.flatnonzero(counts)) == set(lacks)
        if len(lacks) > 1:
            assert abs(_chi_square(counts[lacks])) < 5


def test_negatives_of_a_large_catalogue_are_uniform_and_reach_both_ends():
    n_items = 100_003  # above 2^16, where 32-bit products overflow
    seen = _seen([[1, 50_000, n_items]], n_items)
    drawn = np.asarray(draw_negatives(jax.random.key(0), 0, 2000, np.ones(2000, int), seen, 100)).ravel()
    assert drawn.min() >= 2
    assert drawn.max() <= n_items - 1
    assert abs(_chi_square(np.histogram(drawn, bins=100, range=(1, n_items + 1))[0])) < 5


def test_the_product_of_two_words_is_exact():
    a = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint64)
    a[:2] = 0, 2**32 - 1
    for b in (1, 2**16 - 1, 2**16, 100_003, 2**31 - 1, 2**32 - 1):
        high, low = batches._product(jnp.asarray(a, jnp.uint32), jnp.asarray(b, jnp.uint32))
        product = a * np.uint64(b)
        np.testing.assert_array_equal(high, product >> np.uint64(32))
        np.testing.assert_array_equal(low, product & np.uint64(0xFFFFFFFF))


def test_a_user_who_has_everything_gets_padding():
    seen = _seen([[1, 2, 3], [2]], 3)
    drawn = np.asarray(draw_negatives(jax.random.key(0), 0, 2, np.array([1, 2]), seen, 20))
    assert not drawn[0].any()
    assert set(drawn[1]) == {1, 3}


def test_negatives_never_hit_what_the_user_has():
    random = np.random.default_rng(0)
    sets = [sorted(random.choice(np.arange(1, 41), random.integers(0, 40), replace=False).tolist()) for _ in range(500)]
    drawn = np.asarray(draw_negatives(jax.random.key(4), 5, 500, np.arange(1, 501), _seen(sets, 40), 60))
    for has, row in zip(sets, drawn.tolist(), strict=True):
        assert set(row) <= set(range(1, 41)) - set(has)


def test_comparing_and_bisecting_find_the_same_items():
    random = np.random.default_rng(0)
    sizes = [0, 1, 15, 16, 17, 40, 200]
    sets = [sorted(random.choice(np.arange(1, 300), size, replace=False).tolist()) for size in sizes]
    seen, users = _seen(sets, 300), np.arange(1, len(sizes) + 1)
    r = jnp.asarray(random.integers(0, 100, (len(sizes), 50)), jnp.int32)
    found = [f(seen, r, seen.offsets[users], seen.offsets[users + 1]) for f in (batches._compare, batches._bisect)]
    np.testing.assert_array_equal(*found)
    expected = [sum(item - 1 - rank <= 7 for rank, item in enumerate(has)) for has in sets]
    np.testing.assert_array_equal(
        batches._compare(seen, jnp.full_like(r, 7), seen.offsets[users], seen.offsets[users + 1])[:, 0], expected
    )


def test_distinct_draws_are_uniform_over_every_ordered_choice():
    """All 5 * 4 * 3 ordered choices of 3 of the 5 items that the user lacks come equally often, and nothing else."""
    rows, sets = 12_000, [[2, 3, 6], [4]]
    drawn = np.asarray(draw_distinct(jax.random.key(2), 0, rows, np.ones(rows, int), _seen(sets, 8), 3))
    choices, counts = np.unique(drawn, axis=0, return_counts=True)
    assert {tuple(choice) for choice in choices.tolist()} == set(itertools.permutations([1, 4, 5, 7, 8], 3))
    assert abs(_chi_square(counts)) < 5


def test_distinct_draws_take_everything_that_is_left():
    sets = [[2, 3, 6], [1, 2, 3, 4, 5], []]
    drawn = np.asarray(draw_distinct(jax.random.key(2), 0, 3, np.array([1, 1, 3]), _seen(sets, 8), 5))
    assert [sorted(row) for row in drawn[:2].tolist()] == [[1, 4, 5, 7, 8]] * 2
    assert len(set(drawn[2].tolist())) == 5
    only = np.asarray(draw_distinct(jax.random.key(2), 0, 1, np.array([2]), _seen(sets, 8), 3))
    assert sorted(only[0].tolist()) == [6, 7, 8]


def test_distinct_draws_of_many_users_hit_neither_their_items_nor_each_other():
    random = np.random.default_rng(0)
    sets = [sorted(random.choice(np.arange(1, 41), random.integers(0, 21), replace=False).tolist()) for _ in range(300)]
    seen, users = _seen(sets, 40), np.arange(1, 301)
    drawn = np.asarray(draw_distinct(jax.random.key(4), 5, 300, users, seen, 19))
    for has, row in zip(sets, drawn.tolist(), strict=True):
        assert len(set(row)) == 19
        assert set(row) <= set(range(1, 41)) - set(has)
    part = np.asarray(draw_distinct(jax.random.key(4), 5, np.arange(100, 150), users[100:150], seen, 19))
    np.testing.assert_array_equal(part, drawn[100:150])
    other = np.asarray(draw_distinct(jax.random.key(4), 6, 300, users, seen, 19))
    assert (other != drawn).any(1).mean() > 0.99


def test_distinct_draws_reach_both_ends_of_a_large_catalogue():
    n_items = 100_003
    seen = _seen([[1, 50_000, n_items]], n_items)
    drawn = np.asarray(draw_distinct(jax.random.key(0), 0, 4000, np.ones(4000, int), seen, 19))
    assert drawn.min() >= 2
    assert drawn.max() <= n_items - 1
    assert abs(_chi_square(np.histogram(drawn, bins=100, range=(1, n_items + 1))[0])) < 5
    for column in (0, 18):
        assert abs(_chi_square(np.histogram(drawn[:, column], bins=20, range=(1, n_items + 1))[0])) < 5


def test_a_process_computes_its_own_rows():
    key, users = jax.random.key(3), np.array([1, 2, 1, 2, 1, 2, 1, 2])
    seen = _seen([[2, 3], [5]], 9)
    whole = np.asarray(draw_negatives(key, 11, 8, users, seen, 4))
    part = np.asarray(draw_negatives(key, 11, np.arange(4, 8), users[4:], seen, 4))
    np.testing.assert_array_equal(whole[4:], part)
    np.testing.assert_array_equal(draw_users(key, 11, 8, 100)[4:], draw_users(key, 11, np.arange(4, 8), 100))
    fewer = np.asarray(draw_negatives(key, 11, 8, users, seen, 2))
    np.testing.assert_array_equal(whole[:, :2], fewer)


def test_draws_are_the_same_inside_jit_and_differ_by_step_row_and_purpose():
    key, n = jax.random.key(0), 10_000
    seen = _seen([[]], n)
    users = np.ones(64, int)
    once = np.asarray(draw_negatives(key, 0, 64, users, seen)[:, 0])
    inside = jax.jit(lambda step, seen: draw_negatives(key, step, 64, users, seen)[:, 0])
    np.testing.assert_array_equal(once, inside(0, seen))
    assert (once != np.asarray(inside(1, seen))).mean() > 0.9
    assert len(set(once.tolist())) > 55
    assert (once - 1 != np.asarray(draw_users(key, 0, 64, n))).mean() > 0.9


def test_users_are_drawn_uniformly_with_replacement():
    drawn = np.asarray(draw_users(jax.random.key(0), 7, 20_000, 50))
    counts = np.bincount(drawn, minlength=50)
    assert len(counts) == 50
    assert abs(_chi_square(counts)) < 5


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_every_example_comes_once_an_epoch(n, batch):
    key, steps = jax.random.key(2), steps_per_epoch(n, batch)
    step_rows = jax.jit(lambda step: rows_of_step(key, step, batch, n))
    for epoch in range(3):
        rows, real = (
            np.concatenate(x) for x in zip(*(step_rows(epoch * steps + s) for s in range(steps)), strict=True)
        )
        np.testing.assert_array_equal(rows[real], epoch_order(key, epoch, n))
        assert sorted(rows[real]) == list(range(n))
        assert ((rows >= 0) & (rows < n)).all()
    if n > 4:
        assert (np.asarray(epoch_order(key, 0, n)) != np.asarray(epoch_order(key, 1, n))).any()


def test_seen_items_must_be_ascending_and_known():
    with pytest.raises(ValueError, match="distinct, ascending"):
        _seen([[3, 2]], 5)
    with pytest.raises(ValueError, match="distinct, ascending"):
        _seen([[2, 2]], 5)
    with pytest.raises(ValueError, match=r"within 1\.\.n_items"):
        _seen([[6]], 5)
    _seen([[5], [1]], 5)  # descending from one user to the next is fine


@pytest.mark.parametrize(("mean", "batch", "multiple"), [(3, 128, 8), (3, 16, 1), (20, 128, 8), (200, 128, 8)])
def test_length_tiers_hold_every_batch_with_fewer_positions(mean, batch, multiple):
    random = np.random.default_rng(0)
    lengths = random.geometric(1 / mean, 5000)
    tiers = batches.length_tiers(lengths, 50, batch, multiple)
    if mean == 200:  # everybody's window is full: nothing to save
        assert tiers == ()
        return
    widths, capacities = (np.array(column) for column in zip(*tiers, strict=True))
    assert capacities.sum() == batch
    assert not (capacities % multiple).any()
    assert (np.diff(widths) > 0).all()
    assert widths[-1] == 50
    assert (widths * capacities).sum() < 50 * batch * 2 / 3
    drawn = np.sort(np.minimum(lengths, 50)[random.integers(0, 5000, (500, batch))], axis=1)
    assert (drawn[:, np.cumsum(capacities) - 1] > widths[None]).any(1).mean() < 0.02
