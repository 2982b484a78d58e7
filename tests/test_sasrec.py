"""SASRec sees the past only, each row by itself, and nothing in the padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from allmrec_jax.models import params, sasrec

C = tiny.SASREC
WINDOWS = np.array([[0, 0, 0, 1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]], np.int32)


@pytest.fixture(scope="module")
def weights():
    """Random everywhere, so that no bias or scale hides what it should not."""
    leaves, tree = jax.tree.flatten(params.init(jax.random.key(0), sasrec.describe(C)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten(x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True))


features = jax.jit(sasrec.features, static_argnums=1)
loss_terms = jax.jit(sasrec.loss_terms, static_argnums=1)


def _keys(*rows: int) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(5)))(jnp.array(rows))


@pytest.mark.parametrize("dropout", [False, True])
def test_a_feature_depends_on_no_later_item_and_on_no_other_row(weights, dropout):
    keys = _keys(0, 1) if dropout else None
    probe = jax.random.normal(jax.random.key(2), (C.width,))  # a plain sum would vanish behind the layer norm

    @jax.jit
    def jacobian(E):
        return jax.jacrev(lambda E: sasrec.features(weights | {"E": E}, C, jnp.asarray(WINDOWS), keys) @ probe)(E)

    size = np.abs(np.asarray(jacobian(weights["E"]))).sum(-1)  # (row, time, item)
    for row in range(2):
        for t in range(C.maxlen):
            visible = set(WINDOWS[row, : t + 1].tolist()) - {0} if WINDOWS[row, t] else set()
            used = set(np.flatnonzero(size[row, t]).tolist())
            assert used <= visible
            if not dropout:
                assert used == visible


def test_padding_is_read_from_no_table_row(weights):
    other = weights | {"E": weights["E"].at[0].set(1e3)}
    np.testing.assert_array_equal(features(weights, C, WINDOWS), features(other, C, WINDOWS))


def test_rows_are_the_same_alone_and_together(weights):
    together = features(weights, C, WINDOWS)
    for row in range(2):
        alone = features(weights, C, WINDOWS[row : row + 1])
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-5, atol=1e-5)


def test_dropout_is_a_function_of_key_and_row_alone(weights):
    windows = np.repeat(WINDOWS[1:], 4, axis=0)
    dropped = np.asarray(features(weights, C, windows, _keys(0, 1, 2, 3)))
    np.testing.assert_array_equal(dropped, features(weights, C, windows, _keys(0, 1, 2, 3)))
    permuted = features(weights, C, windows, _keys(3, 1, 0, 2))
    np.testing.assert_allclose(permuted, dropped[[3, 1, 0, 2]], rtol=1e-5, atol=1e-5)
    for a in range(4):
        for b in range(a):
            assert np.abs(dropped[a] - dropped[b]).max() > 0.1
    none = features(weights, dataclasses.replace(C, dropout=0.0), windows, _keys(0, 1, 2, 3))
    np.testing.assert_array_equal(none, features(weights, C, windows))


def test_an_empty_history_gives_the_last_bias_and_finite_gradients(weights):
    empty = np.zeros((2, C.maxlen), np.int32)
    x_u = sasrec.user_representation(weights, C, jnp.asarray(empty))
    np.testing.assert_allclose(x_u, np.tile(weights["last_norm"]["bias"], (2, 1)), atol=1e-6)

    @jax.jit
    def gradient(w, windows, positives):
        return jax.grad(lambda w: sasrec.loss_terms(w, C, windows, positives, positives)[0])(w)

    mixed = np.concatenate([empty[:1], WINDOWS[1:]])
    for positives in (mixed, np.roll(WINDOWS, 1, axis=0)):
        gradients = gradient(weights, mixed, positives)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_the_loss_counts_real_positions_only(weights):
    positives = np.roll(WINDOWS, -1, axis=1)
    positives[:, -1] = 8
    positives[0, :3] = 0
    negatives = np.where(positives != 0, 30, 0)
    total, count = loss_terms(weights, C, WINDOWS, positives, negatives)
    assert int(count) == 17
    elsewhere = np.where(positives != 0, 30, 35)
    assert float(loss_terms(weights, C, WINDOWS, positives, elsewhere)[0]) == float(total)
    f, E = np.asarray(features(weights, C, WINDOWS), np.float64), np.asarray(weights["E"], np.float64)
    by_hand = 0.0
    for row, t in zip(*np.nonzero(positives), strict=True):
        up, down = f[row, t] @ E[positives[row, t]], f[row, t] @ E[30]
        by_hand += np.log1p(np.exp(-up)) + np.log1p(np.exp(down))
    np.testing.assert_allclose(total, by_hand, rtol=1e-5)


def test_a_padding_position_gives_the_last_bias(weights):
    # Whatever stands before the padding ends, its features carry no information.
    f = np.asarray(features(weights, C, WINDOWS))[0, :3]
    np.testing.assert_allclose(f, np.tile(weights["last_norm"]["bias"], (3, 1)), atol=1e-6)


def test_the_paper_s_size_has_the_public_code_s_parameters():
    described = params.shapes(sasrec.describe(sasrec.SASRecConfig(6141)))
    assert described["E"].shape == (6142, 50)
    # E, positions, 2 blocks of (LN, packed in-projection, out, LN, two convolutions), the last LN
    block = 2 * 50 + 3 * 50 * 51 + 50 * 51 + 2 * 50 + 2 * 50 * 51
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(described)) == 6142 * 50 + 50 * 50 + 2 * block + 100
