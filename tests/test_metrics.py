"""Ranks, metrics, intervals, paired differences and the mean-rank combination against values worked out by hand or by
slow loops that say the same thing in another way."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jaxtyping import TypeCheckError

from allmrec_jax.evaluation import metrics

SMALL_SCORES = arrays(np.float64, (4, 6), elements=st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 0.5, 2.0]))


def test_ranks_by_hand():
    scores = np.array([[0.1, 0.9, 0.5], [3.0, 1.0, 2.0], [0.0, -np.inf, -5.0]])
    assert metrics.target_ranks(scores, np.array([1, 2, 1])).tolist() == [0, 1, 2]


def test_ties_go_to_the_earlier_column():
    scores = np.zeros((4, 4))
    assert metrics.target_ranks(scores, np.arange(4)).tolist() == [0, 1, 2, 3]


@settings(max_examples=50, deadline=None)
@given(SMALL_SCORES, st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_ranks_are_places_in_a_stable_sort(scores, target):
    expected = [
        sorted(range(6), key=lambda c, row=row: -row[c]).index(t) for row, t in zip(scores, target, strict=True)
    ]
    assert metrics.target_ranks(scores, np.array(target)).tolist() == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_orders_nothing_is_named(bad):
    scores = np.zeros((3, 4))
    scores[1, 2] = scores[2, 0] = bad
    with pytest.raises(ValueError, match="user 1, candidate column 2"):
        metrics.target_ranks(scores, np.zeros(3, int))
    with pytest.raises(ValueError, match=r"^cf: user 1"):
        metrics.summarise({"popularity": np.zeros((3, 4)), "cf": scores}, np.zeros(3, int), seed=0)


@pytest.mark.parametrize("column", [-1, 4])
def test_a_target_must_be_a_candidate(column):
    with pytest.raises(ValueError, match="user 1: target column"):
        metrics.target_ranks(np.zeros((2, 4)), np.array([0, column]))


def test_metrics_by_hand():
    values = metrics.metrics_of(np.array([0, 1, 4, 5, 9, 10]))
    assert tuple(values) == metrics.METRICS
    assert values["hit@1"].tolist() == [1, 0, 0, 0, 0, 0]
    assert values["hit@5"].tolist() == [1, 1, 1, 0, 0, 0]
    assert values["hit@10"].tolist() == [1, 1, 1, 1, 1, 0]
    np.testing.assert_allclose(values["ndcg@5"], [1, 0.6309297536, 0.3868528072, 0, 0, 0])
    np.testing.assert_allclose(values["ndcg@10"], [1, 0.6309297536, 0.3868528072, 0.3562071871, 0.2890648263, 0])
    np.testing.assert_allclose(values["mrr"], [1, 1 / 2, 1 / 5, 1 / 6, 1 / 10, 1 / 11])


def test_chance_is_what_random_scores_get():
    by_chance = metrics.chance(20)
    assert by_chance["hit@1"] == 0.05
    assert by_chance["hit@5"] == 0.25
    rng = np.random.default_rng(0)
    found = metrics.summarise({"dice": rng.random((20_000, 20))}, rng.integers(0, 20, 20_000), seed=1, level=0.999)
    for name, figures in found["dice"].items():
        assert figures["low"] <= by_chance[name] <= figures["high"]


def test_interval_of_a_share_is_the_binomial_one():
    """For 0/1 values a bootstrap mean is Binomial(n, p) / n, whose quantiles are known."""
    n, hits = 100, 30
    values = np.r_[np.ones(hits), np.zeros(n - hits)]
    interval = metrics.bootstrap(values, seed=3, resamples=200_000)
    share = np.array([1.0])  # the distribution of Binomial(n, 0.3), one trial after another
    for _ in range(n):
        share = np.r_[share * 0.7, 0] + np.r_[0, share * 0.3]
    below = np.cumsum(share)
    assert (interval.value, interval.n) == (0.3, 100)
    assert interval.low == np.searchsorted(below, 0.025) / n == 0.21
    assert interval.high == np.searchsorted(below, 0.975) / n == 0.39


def test_interval_agrees_with_drawing_users_one_by_one():
    rng = np.random.default_rng(5)
    values = 1 / (rng.integers(0, 20, 60) + 1.0)
    interval = metrics.bootstrap(values, seed=0, resamples=40_000)
    means = values[rng.integers(0, 60, (40_000, 60))].mean(axis=1)
    np.testing.assert_allclose([interval.low, interval.high], np.quantile(means, [0.025, 0.975]), atol=3e-3)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(7)
    truth = metrics.metrics_of(np.arange(20))["mrr"].mean()
    inside = 0
    for trial in range(400):
        values = metrics.metrics_of(rng.integers(0, 20, 100))["mrr"]
        interval = metrics.bootstrap(values, seed=trial, resamples=500)
        inside += interval.low <= truth <= interval.high
    assert 0.90 <= inside / 400 <= 0.98


def test_same_seed_same_bits_in_any_order_of_users_and_any_chunking(monkeypatch):
    values = np.random.default_rng(1).random(50)
    first = metrics.bootstrap(values, seed=11)
    assert metrics.bootstrap(values[::-1].copy(), seed=11) == first
    assert metrics.bootstrap(values, seed=12) != first
    difference = metrics.paired_difference(values, values[::-1].copy(), seed=11)
    monkeypatch.setattr(metrics, "CELLS", 1000)
    assert metrics.bootstrap(values, seed=11) == first
    assert metrics.paired_difference(values, values[::-1].copy(), seed=11) == difference


@pytest.mark.parametrize("value", [0.0, 1.0, 1 / np.log2(3), 1 / 7])
def test_equal_values_give_an_interval_without_width(value):
    interval = metrics.bootstrap(np.full(13, value), seed=0)
    assert interval.low == interval.value == interval.high
    assert interval.value == pytest.approx(value)


def test_values_must_be_there_and_finite():
    with pytest.raises(ValueError, match="at least one user"):
        metrics.bootstrap(np.array([]), seed=0)
    with pytest.raises(ValueError, match="user 1: the value is not finite"):
        metrics.bootstrap(np.array([0.0, np.nan]), seed=0)
    with pytest.raises(ValueError, match="level"):
        metrics.bootstrap(np.ones(3), seed=0, level=95.0)


def test_sign_flip_p_is_the_exact_one_for_few_users():
    a, b = np.array([0.9, 0.8, 0.3, 1.0, 0.5, 0.4]), np.array([0.5, 0.1, 0.5, 0.2, 0.5, 0.1])
    d = a - b
    sums = [abs(np.dot(signs, d)) for signs in itertools.product([-1, 1], repeat=6)]
    exact = np.mean([s >= abs(d.sum()) - 1e-12 for s in sums])
    found = metrics.paired_difference(a, b, seed=0, permutations=100_000)
    assert found.p_value == pytest.approx(exact, abs=0.005)
    assert found.value == pytest.approx(d.mean())
    assert found.low < found.value < found.high


def test_a_clear_difference_is_found_and_none_is_not_invented():
    rng = np.random.default_rng(2)
    user = rng.normal(size=100)  # what both models share cancels in the pairing
    better, worse = user + 0.3 + 0.1 * rng.normal(size=100), user
    clear = metrics.paired_difference(better, worse, seed=0)
    assert 0.2 < clear.low < clear.value < clear.high < 0.4
    assert clear.p_value == 1 / 10_001
    none = metrics.paired_difference(user, user, seed=0)
    assert (none.value, none.low, none.high, none.p_value) == (0, 0, 0, 1)


def test_p_values_of_equal_models_are_spread_evenly():
    rng = np.random.default_rng(4)
    p = [
        metrics.paired_difference(rng.random(40), rng.random(40), seed=trial, resamples=10, permutations=400).p_value
        for trial in range(300)
    ]
    assert 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.09
    assert 0.42 <= np.mean(np.array(p) <= 0.5) <= 0.58


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, (2, 9), elements=st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0])))
def test_swapping_the_sides_negates_exactly(values):
    forth = metrics.paired_difference(*values, seed=6, resamples=200, permutations=200)
    back = metrics.paired_difference(*values[::-1], seed=6, resamples=200, permutations=200)
    assert (back.value, back.low, back.high) == (-forth.value, -forth.high, -forth.low)
    assert back.p_value == forth.p_value


def naive_ranks(row):
    return [sum(s > mine for s in row) + (sum(s == mine for s in row) - 1) / 2 for mine in row]


@settings(max_examples=50, deadline=None)
@given(SMALL_SCORES, SMALL_SCORES, SMALL_SCORES)
def test_mean_rank_against_a_loop(a, b, c):
    scores = (a, b, c)
    expected = -np.mean([[naive_ranks(row) for row in of_model] for of_model in scores], axis=0)
    np.testing.assert_allclose(metrics.mean_rank(*scores), expected)


def test_mean_rank_forgets_the_scale_and_refuses_other_candidates():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 8))
    np.testing.assert_array_equal(metrics.mean_rank(a, b), metrics.mean_rank(1000 * a - 3, np.exp(b)))
    np.testing.assert_array_equal(np.argsort(metrics.mean_rank(a)), np.argsort(a))
    with pytest.raises((ValueError, TypeCheckError), match=r"different candidates|axis annotation"):
        metrics.mean_rank(a, b[:, :7])
    with pytest.raises(ValueError, match="at least one model"):
        metrics.mean_rank()


def test_summary_and_differences_fit_together():
    rng = np.random.default_rng(8)
    target = rng.integers(0, 10, 50)
    good = rng.normal(size=(50, 10))
    good[np.arange(50), target] += 2
    scores = {"a-llmrec": good, "llm-only": rng.normal(size=(50, 10))}
    summary = metrics.summarise(scores, target, seed=1)
    pairs = metrics.differences(scores, target, [("a-llmrec", "llm-only")], seed=1, metrics=("hit@1", "mrr"))
    assert tuple(summary) == ("a-llmrec", "llm-only")
    assert set(summary["a-llmrec"]) == set(metrics.METRICS)
    assert set(pairs["a-llmrec"]["llm-only"]) == {"hit@1", "mrr"}
    for name, figures in pairs["a-llmrec"]["llm-only"].items():
        assert set(figures) == {"value", "low", "high", "n", "p_value"}
        assert figures["value"] == pytest.approx(
            summary["a-llmrec"][name]["value"] - summary["llm-only"][name]["value"]
        )
        assert figures["low"] > 0
        assert figures["n"] == 50
    with pytest.raises(ValueError, match="no scores of sasrec"):
        metrics.differences(scores, target, [("a-llmrec", "sasrec")], seed=1)
