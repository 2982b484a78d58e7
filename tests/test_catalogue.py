"""Ranks and best items in the whole catalogue: exactly those of the full score matrix, whole or in shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from allmrec_jax.evaluation import catalogue, cf
from allmrec_jax.training import mesh
from allmrec_jax.training.cf import CFModel


def tables(n: int, users: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Small whole numbers, so that there are ties."""
    random = np.random.default_rng(seed)
    return (random.integers(-2, 3, shape).astype(np.float32) for shape in ((users, 3), (n + 1, 3)))


@settings(max_examples=30, deadline=None)
@given(st.integers(12, 40), st.sampled_from([4, 16, 64]), st.integers(0, 10**6))
def test_ranks_are_those_of_the_full_matrix(n, block, seed):
    x_u, E = tables(n, seed=seed)
    random = np.random.default_rng(seed)
    targets, others = random.integers(1, n + 1, 5), random.integers(0, n + 1, (5, 6))
    found = catalogue.ranks(*map(jnp.asarray, (x_u, E, targets, others)), block)
    scores = x_u @ E.T
    for user in range(5):
        rivals = set(range(1, n + 1)) - {int(targets[user])}
        for ranks, left_out in zip(found, (set(), set(others[user].tolist())), strict=True):
            above = sum(scores[user, i] >= scores[user, targets[user]] for i in rivals - left_out)
            assert int(ranks[user]) == above


def test_equal_rows_are_ties_whatever_the_rounding():
    """Each item has a twin of the same embedding: never above, always a tie; left out where it is in the history."""
    random = np.random.default_rng(0)
    n, users = 3000, 64
    E = np.zeros((n + 1, 50), np.float32)
    E[1 : n // 2 + 1] = random.normal(size=(n // 2, 50))
    E[n // 2 + 1 :] = E[1 : n // 2 + 1]
    targets = random.integers(1, n // 2 + 1, users)
    x_u = 0.1 * random.normal(size=(users, 50)).astype(np.float32) + E[targets]  # the target's pair stands first
    full, new = catalogue.ranks(*map(jnp.asarray, (x_u, E, targets, (targets + n // 2)[:, None])), 512)
    np.testing.assert_array_equal(full, 1)
    np.testing.assert_array_equal(new, 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(12, 40), st.sampled_from([4, 16, 64]), st.integers(0, 10**6))
def test_the_best_are_those_of_the_full_matrix(n, block, seed):
    x_u, E = tables(n, seed=seed)
    scores, ids = catalogue.top_k(jnp.asarray(x_u), jnp.asarray(E), 7, block)
    full = x_u @ E.T
    for user in range(5):
        order = sorted(range(1, n + 1), key=lambda item: (-full[user, item], item))[:7]
        assert ids[user].tolist() == order
        np.testing.assert_array_equal(scores[user], full[user, order])


@pytest.mark.parametrize("shards", [2, 8])
def test_the_best_of_a_table_cut_by_rows_equal_those_of_the_whole(shards):
    x_u, E = map(jnp.asarray, tables(63))
    over = mesh.make_mesh(1, shards)
    rows = jax.device_put(E, jax.sharding.NamedSharding(over, jax.sharding.PartitionSpec("model", None)))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(64 // shards, 3)}
    cut, whole = catalogue.sharded_top_k(x_u, rows, 7, over, 4), catalogue.top_k(x_u, E, 7, 16)
    for ours, theirs in zip(cut, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_no_matrix_of_users_and_items_is_in_memory():
    n = 200_000
    shapes = [jax.ShapeDtypeStruct(*spec) for spec in (((512, 8), jnp.float32), ((n + 1, 8), jnp.float32))]
    ids = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((512,), (512, 4))]
    for compiled in (catalogue.ranks.lower(*shapes, *ids).compile(), catalogue.top_k.lower(*shapes, 10).compile()):
        assert compiled.memory_analysis().temp_size_in_bytes < 512 * n * 4 / 5


def test_ranks_of_a_models_test_items(tmp_path):
    data, model = tiny.dataset(tmp_path / "d"), tiny.cf_model()
    found = cf.ranks_of_held_out_items(model, data, seed=0, batch=7)
    users = np.flatnonzero(data.has_target("test"))
    E = np.asarray(model.E)
    for row, user in enumerate(users.tolist()):
        history = data.history(user)
        window = np.zeros((1, model.config.maxlen), np.int32)
        window[0, -len(history[-model.config.maxlen :]) :] = history[-model.config.maxlen :]
        scores = model.x_u(window)[0] @ E.T
        target = int(data.targets("test")[user])
        others = set(range(1, data.n_items + 1)) - {target}
        assert abs(int(found["full"][row]) - sum(scores[i] >= scores[target] for i in others)) <= 1  # rounding
        if target in history:
            assert found["new"][row] == -1
        else:
            expected = sum(scores[i] >= scores[target] for i in others - set(history.tolist()))
            assert abs(int(found["new"][row]) - expected) <= 1
        assert 0 <= found["reference"][row] < 20
    report = cf.figures(model, data, seed=0)
    assert report["full"]["hit@10"]["value"] == pytest.approx((found["full"] < 10).mean())
    assert report["reference"]["hit@1"]["n"] == len(users)


def test_user_representations_do_not_depend_on_how_they_are_batched():
    random = np.random.default_rng(0)
    model: CFModel = tiny.cf_model()
    lengths = random.integers(0, 11, 60)
    windows = random.integers(1, tiny.N_ITEMS + 1, (60, 10))
    windows = np.where(np.arange(10)[None] >= 10 - lengths[:, None], windows, 0).astype(np.int32)
    one_by_one = np.concatenate([model.x_u(windows[row : row + 1]) for row in range(60)])
    np.testing.assert_allclose(model.x_u(windows, batch=8), one_by_one, rtol=1e-4, atol=1e-5)
    assert np.isfinite(one_by_one).all()
