"""Who is in which scenario: by the rules, seeded, stored, and never in a training example where that is the point."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allmrec_jax.cli import main
from allmrec_jax.data import batches, recipes, scenarios
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.data.prepare import Files, prepare
from allmrec_jax.data.writer import write_dataset
from allmrec_jax.errors import UserError
from allmrec_jax.training.cf import training_data


def make(path, lengths, n_items=20, *, texts=True, seed=0) -> Dataset:
    offsets = np.concatenate([[0, 0], np.cumsum(lengths)])
    weights = 1 / np.arange(1, n_items + 1)
    items = np.random.default_rng(1).choice(n_items, offsets[-1], p=weights / weights.sum()) + 1
    return write_dataset(
        path,
        name="d",
        items=items,
        offsets=offsets,
        times=None,
        ratings=None,
        user_keys=[f"u{user}" for user in range(len(lengths))],
        item_keys=[f"i{item}" for item in range(n_items)],
        titles=[f"T{item}" if texts else None for item in range(n_items)],
        descriptions=[None] * n_items,
        categories=[["c"] if texts else []] * n_items,
        seed=seed,
    )


def test_cold_and_warm_items_by_the_rule_as_it_is_written(tmp_path):
    data = make(tmp_path / "d", [8] * 30)
    counts = data.train_counts()
    ranked = sorted(range(1, 21), key=lambda item: (counts[item], item))
    targets = data.targets("test")
    for name, items in (("cold-items", ranked[:7]), ("warm-items", ranked[-7:])):
        scenario = data.scenario(name)
        assert scenario.items.tolist() == sorted(items)
        assert scenario.users.tolist() == [user for user in range(1, 31) if targets[user] in items]
        assert (scenario.facts["least"], scenario.facts["most"]) == (counts[items].min(), counts[items].max())
        few = [i for i in range(1, 21) if (counts[i] <= 5) == (name == "cold-items")]
        assert scenario.facts["items_by_rule"] == len(few)
        assert scenario.facts["users_by_rule"] == int(np.isin(targets[1:], few).sum())


def test_few_shot_users_are_seeded_nested_and_can_be_trained_on(tmp_path):
    data = make(tmp_path / "a", [2, 3] * 20 + [6] * 300)
    large, small = data.scenario("few-shot-256").users, data.scenario("few-shot-128").users
    assert (len(set(large.tolist())), len(set(small.tolist()))) == (256, 128)
    assert set(small.tolist()) < set(large.tolist())
    assert data.has_target("train")[large].all()
    again = make(tmp_path / "b", [2, 3] * 20 + [6] * 300)
    np.testing.assert_array_equal(again.scenario("few-shot-256").users, large)
    other = make(tmp_path / "c", [2, 3] * 20 + [6] * 300, seed=1)
    assert (other.scenario("few-shot-256").users != large).any()
    assert other.fingerprint == data.fingerprint


def test_few_shot_training_sees_its_users_alone_and_tests_everybody(tmp_path):
    data = make(tmp_path / "d", [6, 3, 2] * 70)
    few, chosen = data.few_shot(128), set(data.scenario("few-shot-128").users.tolist())
    train = [data.items[data.offsets[u] :][: data.n_train[u]] for u in sorted(chosen)]
    np.testing.assert_array_equal(few.train_counts(), np.bincount(np.concatenate(train), minlength=21))
    assert few.n_trained == 128
    assert set(few.examples()[0].tolist()) == chosen
    assert set(np.asarray(training_data(few)["users"]).tolist()) == chosen
    assert set(np.asarray(training_data(few, refit=True)["users"]).tolist()) == chosen
    for split in ("train", "validation"):
        assert set(np.flatnonzero(few.has_target(split)).tolist()) <= chosen
        assert set(np.flatnonzero(few.targets(split)).tolist()) <= chosen
    # What is asked, and what is known of who is asked, is the same.
    np.testing.assert_array_equal(few.targets("test"), data.targets("test"))
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(few.distinct(split)[0], data.distinct(split)[0])
    np.testing.assert_array_equal(few.histories(np.arange(1, 211), 4), data.histories(np.arange(1, 211), 4))
    with pytest.raises(UserError, match="few-shot-256 does not apply to d: only 140 users can be trained on"):
        data.few_shot(256)


def test_scenarios_that_do_not_apply_say_why(tmp_path, capsys):
    data = make(tmp_path / "d", [2, 2], texts=False)
    why = {name: entry["reason"] for name, entry in data.manifest["scenarios"].items()}
    assert tuple(why) == scenarios.NAMES
    assert why == {
        "overall": "no user has three interactions",
        "cold-items": "no test item is among them",
        "warm-items": "no test item is among them",
        "cold-users": "no user has exactly 3 interactions",
        "few-shot-256": "only 2 users can be trained on",
        "few-shot-128": "only 2 users can be trained on",
        "cross-domain": "no item has a text",
        "genres": "no item has a category",
    }
    with pytest.raises(UserError, match="genres does not apply to d: no item has a category"):
        data.scenario("genres")
    with pytest.raises(UserError, match="choose among overall, cold-items"):
        data.scenario("cold")
    assert main(["data", "describe", str(tmp_path / "d")]) == 0
    assert "not applicable: no item has a category" in " ".join(capsys.readouterr().out.split())


def test_cold_users_of_unfiltered_data_are_in_no_training_example(tmp_path):
    data = make(tmp_path / "d", [3, 6, 3, 5])
    cold = data.scenario("cold-users").users
    assert cold.tolist() == [1, 3]
    assert not np.isin(cold, np.asarray(training_data(data)["users"])).any()
    assert not data.has_target("train")[cold].any()
    assert data.history(1).tolist() == data.items[:2].tolist()


def write_reviews(path, sequences: dict[str, str]) -> Files:
    """`{"u1": "abc"}`: a letter is an item; times go up."""
    rows = [f"{user},{item},{time}" for user, items in sequences.items() for time, item in enumerate(items)]
    path.write_text("user,item,time\n" + "\n".join(rows) + "\n")
    return Files(interactions=path)


def test_cold_users_of_the_clean_recipe_are_kept_apart(tmp_path):
    core = {f"u{n}": "abcde" for n in range(5)}
    sequences = {**core, "cold": "cab", "four": "abcd", "lost": "abz", "two": "ab", "late": "ecd"}
    data = prepare(write_reviews(tmp_path / "r.csv", sequences), tmp_path / "out")
    assert (data.n_users, data.n_items, data.n_interactions) == (5, 5, 25)
    assert data.user_keys[6:] == ["cold", "late"]
    scenario = data.scenario("cold-users")
    assert scenario.users.tolist() == [6, 7]
    letters = [[data.item_keys[item] for item in items] for items in data.cold_items]
    assert letters == [list("cab"), list("ecd")]
    assert [data.item_keys[item] for item in data.history(6)] == ["c", "a"]
    # Nothing that counts or draws sees them.
    assert data.train_counts().sum() == 15
    assert data.distinct("test")[1].shape == (7,)
    assert data.manifest["rows"]["kept"] == 25
    low = prepare(write_reviews(tmp_path / "r3.csv", sequences), tmp_path / "low", k_core=3)
    with pytest.raises(UserError, match="with k_core 3 a user of three interactions belongs to the core"):
        low.scenario("cold-users")


_rows = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=120)


@settings(max_examples=60, deadline=None)
@given(_rows, st.integers(2, 5))
def test_cold_users_by_the_rule_as_it_is_written(rows, k):
    users, items, times = (np.array(column) for column in zip(*rows, strict=True))
    keep, _, cleaned = recipes.clean(users, items, times, None, k_core=k)
    cold = recipes.cold_rows(users, items, cleaned, keep)
    survivors, core = set(items[keep].tolist()), set(users[keep].tolist())
    for user in set(users.tolist()):
        own = [n for n in range(len(rows)) if users[n] == user and cleaned[n]]
        expected = user not in core and len(own) == 3 and {int(items[n]) for n in own} <= survivors
        assert cold[own].all() if expected else not cold[users == user].any()
    assert not (cold & keep).any()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=12),
    st.integers(0, 1000),
    st.booleans(),
    st.sampled_from([None, 3]),
)
def test_leave_one_out_never_leaks(tmp_path_factory, lengths, step, refit, crop):
    """No validation or test item's POSITION is ever a window, a positive, or training history.

    Where the model is refitted, a validation item's may be.
    """
    if max(lengths) < 4:
        lengths = [*lengths, 4]
    total = sum(lengths)
    offsets = np.concatenate([[0, 0], np.cumsum(lengths)])
    data = write_dataset(  # every position is an item of its own, so that a position can be told from its item
        tmp_path_factory.mktemp("leak") / "d",
        name="d",
        items=np.arange(1, total + 1),
        offsets=offsets,
        times=None,
        ratings=None,
        user_keys=[str(user) for user in range(len(lengths))],
        item_keys=[str(item) for item in range(total)],
        titles=[None] * total,
        descriptions=[None] * total,
        categories=[[]] * total,
    )
    import jax

    held = set(data.targets("test")[1:].tolist())
    if not refit:
        held |= set(data.targets("validation")[1:].tolist())
    rows = batches.training_rows(jax.random.key(0), step, 16, training_data(data, refit), 5, 1, crop)
    users, windows, positives, negatives = (np.asarray(part) for part in rows)
    negatives = negatives[..., 0]
    held.discard(0)
    assert not held & set(windows.ravel().tolist())
    assert not held & set(positives.ravel().tolist())
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    real = positives > 0
    assert (owner[positives[real] - 1] == np.repeat(users[:, None], 5, 1)[real]).all()
    n_train = data.n_train
    for user, row in zip(users.tolist(), negatives.tolist(), strict=True):
        last = offsets[user] + n_train[user] + (refit and data.has_target("validation")[user])
        trained = set(range(offsets[user] + 1, last + 1))
        assert not trained & set(row)
    for split in ("train", "validation", "test"):
        for user in np.flatnonzero(data.has_target(split)).tolist():
            assert data.targets(split)[user] not in data.history(user, split)


def test_a_cold_user_s_sequence_and_history(tmp_path):
    core = {f"u{n}": "abcde" for n in range(5)}
    data = prepare(write_reviews(tmp_path / "r.csv", {**core, "cold": "cab"}), tmp_path / "out")
    assert data.sequence(6).tolist() == data.cold_items[0].tolist()
    assert data.history(6).tolist() == data.sequence(6)[:2].tolist()
    assert data.sequence(1).tolist() == data.items[:5].tolist()
