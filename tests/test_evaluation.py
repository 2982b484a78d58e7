"""Who is tested among what, the trivial models, and the combination: without an LLM, on small invented worlds."""

import csv
import dataclasses
import io
import itertools

import numpy as np
import pytest
import tiny

from allmrec_jax.data.candidates import draw_for_test
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import baselines, breakdown, fused, lists, metrics, paper, scenarios, tables
from allmrec_jax.evaluation.labels import NEW, scenario_title

N_ITEMS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """80 users of 3 to 20 items of 60, some of them twice, popular ones more often."""
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, N_ITEMS + 1)
    sequences = [random.choice(N_ITEMS, random.integers(3, 21), p=weights / weights.sum()) + 1 for _ in range(80)]
    return tiny.of_sequences(tmp_path_factory.mktemp("data") / "d", sequences, N_ITEMS)


@pytest.fixture(scope="module")
def drawn(data):
    return lists.draw(data, "test", seed=0, most=None, candidates=10)


def test_lists_are_of_the_target_among_strangers_and_say_what_is_in_the_history(data, drawn):
    assert sorted(drawn.users.tolist()) == list(range(1, 81))
    for row, user in enumerate(drawn.users.tolist()):
        history, target = data.history(user).tolist(), data.sequence(user)[-1]
        assert drawn.targets[row] == target
        assert drawn.repeats[row] == (target in history)
        last = {item: place for place, item in enumerate(history, start=1)}
        assert drawn.recency[row].tolist() == [last.get(item, 0) for item in drawn.candidates[row].tolist()]
        others = np.delete(drawn.candidates[row], drawn.column[row])
        assert not set(others.tolist()) & {*history, target}


def test_more_users_begin_with_the_same_ones_and_the_same_candidates(data, drawn):
    few = lists.draw(data, "test", seed=0, most=7, candidates=10)
    for name in ("users", "candidates", "column", "recency"):
        np.testing.assert_array_equal(getattr(few, name), getattr(drawn, name)[:7])
    assert (lists.draw(data, "test", seed=1, most=None, candidates=10).users != drawn.users).any()


def test_validation_lists_never_hold_a_test_item(data):
    of = lists.draw(data, "validation", seed=0, most=None, candidates=10)
    for row, user in enumerate(of.users.tolist()):
        *history, validation, test = data.sequence(user).tolist()
        assert of.targets[row] == validation
        assert of.repeats[row] == (validation in history)
        assert test == validation or test not in of.candidates[row]


def test_cold_users_are_tested_on_the_last_of_their_three_items(data, tmp_path):
    apart = dataclasses.replace(data, cold_items=np.array([[5, 9, 7], [3, 3, 8]], np.int32))
    users = np.array([82, 4, 81])
    candidates, column = draw_for_test(apart, users, seed=0, count=10)
    np.testing.assert_array_equal(candidates[np.arange(3), column], [8, data.sequence(4)[-1], 7])
    assert not set(np.delete(candidates[0], column[0]).tolist()) & {3, 8}
    np.testing.assert_array_equal(candidates[1], draw_for_test(data, users[1:2], seed=0, count=10)[0][0])
    np.testing.assert_array_equal(apart.histories(users[[0, 2]], 3), [[0, 3, 3], [0, 5, 9]])
    np.testing.assert_array_equal(apart.histories(users, 1)[:, 0], [3, data.history(4)[-1], 9])
    assert lists.recency(apart, users[:1], np.array([[3, 8, 1]]), "test").tolist() == [[2, 0, 0]]


def test_more_candidates_than_items_are_refused(data):
    with pytest.raises(UserError, match="61 candidates were asked for, but tiny has 60 items"):
        lists.draw(data, "test", seed=0, most=None, candidates=61)


def test_trivial_models_count_as_they_say(data, drawn):
    scores = baselines.score(data, drawn)
    assert tuple(scores) == baselines.NAMES
    train = [data.items[data.offsets[u] :][: data.n_train[u]].tolist() for u in range(1, 81)]
    count = np.bincount(np.concatenate(train), minlength=N_ITEMS + 1)

    def followed(before, after):
        return sum((a, b) == (before, after) for items in train for a, b in itertools.pairwise(items))

    for row in range(0, 80, 9):
        history = data.history(int(drawn.users[row])).tolist()
        last = {item: place for place, item in enumerate(history)}
        ways = {
            "popularity": lambda i: count[i],
            "repeat": lambda i, last=last: (last.get(i, -1), count[i]),
            "markov": lambda i, history=history: (followed(history[-1], i), count[i]),
            "leak-check": lambda i, history=history, last=last: (
                i in last,
                sum(followed(before, i) for before in history[-3:]),
                count[i],
            ),
        }
        for name, way in ways.items():
            expected = [way(item) for item in drawn.candidates[row].tolist()]
            found = scores[name][row].tolist()
            order = sorted(range(10), key=lambda k: found[k])
            assert [expected[k] for k in order] == sorted(expected), name
            for a, b in itertools.pairwise(order):
                assert (found[a] == found[b]) == (expected[a] == expected[b]), name


def test_cold_and_warm_items_are_rows_of_overall_with_their_bounds_and_the_rule(data, drawn):
    counts = data.train_counts()
    for name, by_rule in (("cold-items", counts <= 5), ("warm-items", counts > 5)):
        parts = scenarios.parts(data, name, drawn)
        assert list(parts) == [name, f"{name}-by-rule"]
        items = set(data.scenario(name).items.tolist())
        assert parts[name].rows.tolist() == [item in items for item in drawn.targets.tolist()]
        assert parts[f"{name}-by-rule"].rows.tolist() == by_rule[drawn.targets].tolist()
        facts = parts[name].facts | {"users": int(parts[name].rows.sum()), "repeats": 0}
        bounds = f"{min(counts[list(items)])} to {max(counts[list(items)])}"
        assert f"{len(items)} items of {bounds}" in scenario_title(name, facts, 10)
    assert scenarios.parts(data, "overall", drawn)["overall"].rows.all()


def test_new_items_only_leaves_out_who_comes_back(data, drawn):
    scores, everybody = baselines.score(data, drawn), np.ones(80, bool)
    found, differences = scenarios.figures(
        scores, drawn, everybody, [("leak-check", "popularity"), ("cf", "popularity")], seed=0, resamples=50
    )
    new = ~drawn.repeats
    assert 0 < new.sum() < 80
    for model, of in scores.items():
        ranks = metrics.target_ranks(of, drawn.column)
        assert found[model]["hit@1"]["value"] == pytest.approx((ranks == 0).mean())
        assert found[model][f"{NEW}hit@1"]["value"] == pytest.approx((ranks[new] == 0).mean())
        assert (found[model]["hit@1"]["n"], found[model][f"{NEW}hit@1"]["n"]) == (80, new.sum())
    assert found["repeat"][f"{NEW}mrr"] == found["popularity"][f"{NEW}mrr"]  # no old item to copy
    assert found["repeat"]["mrr"]["value"] > found["popularity"]["mrr"]["value"]
    assert list(differences) == ["leak-check"]  # nobody scored by cf
    difference = differences["leak-check"]["popularity"][f"{NEW}hit@1"]
    gap = found["leak-check"][f"{NEW}hit@1"]["value"] - found["popularity"][f"{NEW}hit@1"]["value"]
    assert difference["value"] == pytest.approx(gap)


def test_an_unknown_scenario_is_named():
    with pytest.raises(UserError, match="no scenario 'cold'; choose among overall, cold-items"):
        scenarios.asked(["overall", "cold"])
    assert scenarios.asked(["warm-items", "overall"]) == ("overall", "warm-items")
    assert scenarios.asked(["all"]) == scenarios.ALL


# ------------------------------------------------------------------------------------------------------------- fused


def world(rows: int, seed: int, *, llm_knows: float = 2.0):
    """A CF model that knows an item the better the more popular it is, an LLM that knows all alike."""
    random = np.random.default_rng(seed)
    all_counts = np.sort((np.exp(random.exponential(1.3, 3000)) - 1).astype(int))
    drawn = (all_counts + 1) ** 0.7
    target = random.choice(3000, rows, p=drawn / drawn.sum())
    candidates, column = random.integers(0, 3000, (rows, 20)), random.integers(0, 20, rows)
    candidates[np.arange(rows), column] = target
    hit = np.arange(20) == column[:, None]
    counts = all_counts[candidates]
    known = np.log1p(counts)
    cf = 5 * known * (1 + hit) + 5 * random.normal(size=hit.shape)
    llm = -3 + random.normal(size=(rows, 1)) + 0.4 * (llm_knows * hit + random.normal(size=hit.shape))
    return cf, llm, counts, column, {"cold": target < 1050, "warm": target >= 1950}, all_counts


def test_fused_is_not_worse_than_the_better_one_on_cold_warm_and_all_and_better_on_all():
    cf, llm, counts, column, groups, all_counts = world(1000, 0)
    fusion = fused.learn(cf, llm, counts, column, **groups, all_counts=all_counts)
    cf, llm, counts, column, groups, _ = world(6000, 1)
    scores = {"cf": cf, "llm": llm, "fused": fusion(cf, llm, counts)}
    ranks = {name: metrics.metrics_of(metrics.target_ranks(of, column)) for name, of in scores.items()}
    for group, rows in (groups | {"overall": np.ones(6000, bool)}).items():
        for metric in ("hit@1", "ndcg@5", "mrr"):
            of = {name: values[metric][rows] for name, values in ranks.items()}
            better = max(("cf", "llm"), key=lambda name: of[name].mean())
            assert (better == "llm") == (group == "cold")  # else this would show nothing
            difference = metrics.paired_difference(of["fused"], of[better], seed=0, resamples=500)
            assert difference.high > 0
            if group == "overall":
                assert difference.low > 0.01


def test_fused_ignores_scales_and_offsets_of_users_and_a_model_that_knows_nothing():
    cf, llm, counts, column, groups, all_counts = world(600, 2, llm_knows=0.0)
    learned = fused.learn(cf, llm, counts, column, **groups, all_counts=all_counts)
    again = fused.learn(100 * cf - 7, llm / 9, counts, column, **groups, all_counts=all_counts)
    np.testing.assert_allclose(again.theta, learned.theta, rtol=1e-5, atol=1e-8)
    offset = np.arange(600)[:, None]
    np.testing.assert_allclose(learned(cf + offset, llm - offset, counts), learned(cf, llm, counts), atol=1e-8)
    cf, llm, counts, column, _, _ = world(4000, 3, llm_knows=0.0)
    other = learned(cf, np.roll(llm, 1, axis=0), counts)
    hits = [metrics.target_ranks(of, column) == 0 for of in (learned(cf, llm, counts), other, cf)]
    assert abs(hits[0].mean() - hits[1].mean()) < 0.02
    assert hits[0].mean() > hits[2].mean() - 0.02


def test_the_fit_is_where_its_gradient_vanishes_and_ends_on_separable_data():
    random = np.random.default_rng(3)
    x, column = random.normal(size=(50, 6, 3)), random.integers(0, 6, 50)
    weight = random.uniform(0.5, 2, 50)

    def value(theta):
        logits = x @ theta
        own = logits[np.arange(50), column] - np.log(np.exp(logits).sum(1))
        return weight @ own - fused.RIDGE / 2 * theta @ theta

    theta = fused.fit(x, column, weight)
    for direction in np.eye(3):
        assert value(theta) > max(value(theta + 1e-3 * direction), value(theta - 1e-3 * direction))
    x[..., 0] = 10.0 * (np.arange(6) == column[:, None])
    assert np.isfinite(fused.fit(x, column, weight)).all()
    assert (np.argmax(x @ fused.fit(x, column, weight), axis=1) == column).all()


@pytest.mark.parametrize("nobody", ["cold", "warm"])
def test_fused_learns_where_nobody_has_a_cold_or_a_warm_target(nobody):
    cf, llm, counts, column, groups, all_counts = world(40, 4)
    groups[nobody] = np.zeros(40, bool)
    fusion = fused.learn(cf, llm, counts, column, **groups, all_counts=all_counts)
    assert np.isfinite(fusion(cf, llm, counts)).all()


# ------------------------------------------------------------------------------ by popularity, calibration, the paper


def test_hits_by_popularity_are_those_of_the_rows_in_each_bin(data, drawn):
    seen = data.train_counts()[drawn.targets]
    found = breakdown.by_popularity(baselines.score(data, drawn), drawn.column, seen, seed=0, resamples=50)
    assert sum(b["users"] for b in found["bins"]) == 80
    assert all(b["users"] >= breakdown.FEWEST for b in found["bins"])
    hits = metrics.target_ranks(baselines.score(data, drawn)["markov"], drawn.column) == 0
    for b, point in zip(found["bins"], found["models"]["markov"], strict=True):
        rows = (seen >= b["least"]) & (seen <= b["most"])
        assert (point["n"], point["value"]) == (rows.sum(), pytest.approx(hits[rows].mean()))


def test_fewer_users_than_a_bin_needs_are_one_bin():
    assert breakdown.popularity_bins(np.array([7, 3, 900])) == [(3, 900)]
    assert breakdown.popularity_bins(np.array([1] * 10 + [30])) == [(1, 30)]


def test_calibration_of_true_probabilities_has_no_error_and_of_sharper_ones_has():
    random = np.random.default_rng(5)
    logits = random.normal(size=(20_000, 5))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    column = (p.cumsum(1) < random.random((20_000, 1))).sum(1)
    found = breakdown.calibration({"true": logits + 7, "sharp": 4 * logits}, column)
    assert found["true"]["error"] < 0.01 < 0.05 < found["sharp"]["error"]
    assert all(abs(b["p"] - b["hit"]) < 0.05 for b in found["true"]["bins"])
    assert sum(b["n"] for b in found["sharp"]["bins"]) == 100_000
    assert found["sharp"]["bins"][-1]["hit"] < found["sharp"]["bins"][-1]["p"]


def test_the_paper_s_figures_stand_beside_ours_where_it_has_some():
    ours = {"hit@1": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}}
    models = {"popularity": ours, "cf": ours, "a-llmrec": ours, "a-llmrec-q": ours}
    table = paper.table({"overall": models, "cold-items": models}, cf="SASRec", data_name="amazon-2018-luxury-beauty")
    assert table["same"] == "Beauty"
    found = {(row["scenario"], row["model"]): row["paper"][2] for row in table["rows"]}
    assert found == {
        ("overall", "cf"): 0.5298,
        ("overall", "a-llmrec"): 0.5809,
        ("cold-items", "cf"): 0.1190,
        ("cold-items", "a-llmrec"): 0.5605,
        ("cold-items", "a-llmrec-q"): 0.5591,
    }
    assert paper.table({"overall": {"popularity": ours}}, cf="SASRec", data_name="x") is None
    assert paper.beside("overall", "cf", cf="mine", dataset="Beauty") is None
    assert paper.beside("few-shot-128", "a-llmrec", cf="SASRec", dataset="Movies and TV") == 0.2518


def test_csv_and_latex_hold_every_figure(data, drawn):
    found, _ = scenarios.figures(baselines.score(data, drawn), drawn, np.ones(80, bool), [], seed=0, resamples=50)
    rows = list(csv.DictReader(io.StringIO(tables.to_csv({"overall": found}))))
    assert len(rows) == sum(map(len, found.values()))
    for row in rows:
        assert float(row["value"]) == found[row["model"]][row["metric"]]["value"]
    facts = {"overall": {"users": 80, "repeats": 3}}
    text = tables.to_latex({"overall": found}, facts, {"labels": {"markov": "A & B_1 50 %"}})
    assert r"A \& B\_1 50 \%" in text
    best = max(of["mrr"]["value"] for of in found.values())
    assert rf"\textbf{{{best:.3f}}}" in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1
