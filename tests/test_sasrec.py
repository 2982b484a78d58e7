"""SASRec sees the past only, each row by itself, and nothing in the padding."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from allmrec_jax.models import collaborative, params, sasrec, sequential

C = tiny.SASREC
WINDOWS = np.array([[0, 0, 0, 1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]], np.int32)


@pytest.fixture(scope="module")
def weights():
    """Random everywhere, so that no bias or scale hides what it should not."""
    leaves, tree = jax.tree.flatten(params.init(jax.random.key(0), sasrec.describe(C)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten(x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True))


features = jax.jit(sasrec.features, static_argnums=1)
loss_terms = jax.jit(functools.partial(sequential.loss_terms, sasrec), static_argnums=1)


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
    x_u = collaborative.user_representation(weights, C, jnp.asarray(empty))
    np.testing.assert_allclose(x_u, np.tile(weights["last_norm"]["bias"], (2, 1)), atol=1e-6)

    @jax.jit
    def gradient(w, windows, positives):
        return jax.grad(lambda w: loss_terms(w, C, windows, positives, positives)[0])(w)

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


# ------------------------------------------------------------------------------------------------------ short windows

SHORT = 4
LENGTHS = np.array([0, 1, 2, 4, 3])
PADS = jnp.asarray(C.maxlen - LENGTHS)


def _left_padded(seed: int = 0) -> np.ndarray:
    items = np.random.default_rng(seed).integers(1, C.n_items + 1, (len(LENGTHS), C.maxlen))
    return np.where(np.arange(C.maxlen)[None] >= C.maxlen - LENGTHS[:, None], items, 0).astype(np.int32)


def test_short_windows_give_the_features_of_the_whole_window(weights):
    """One virtual key stands for all the padded ones."""
    whole = _left_padded()
    expected = np.asarray(features(weights, C, whole))[:, -SHORT:]
    found = np.asarray(features(weights, C, whole[:, -SHORT:], None, PADS))
    real = whole[:, -SHORT:] > 0
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-4, atol=1e-5)
    at_full_width = np.asarray(features(weights, C, whole, None, PADS))[:, -SHORT:]
    np.testing.assert_allclose(at_full_width[real], expected[real], rtol=1e-4, atol=1e-5)
    no_pads = features(weights, C, WINDOWS[1:], None, jnp.zeros(1, jnp.int32))
    np.testing.assert_allclose(no_pads, features(weights, C, WINDOWS[1:]), rtol=1e-5, atol=1e-6)


def test_short_windows_give_the_loss_and_the_gradients_of_the_whole_window(weights):
    windows = _left_padded()
    positives, negatives = (np.where(windows > 0, _left_padded(seed) + 0, 0) for seed in (1, 2))

    @functools.partial(jax.jit, static_argnums=4)
    def both(w, windows, positives, negatives, short):
        pads = PADS if short else None
        return jax.value_and_grad(lambda w: loss_terms(w, C, windows, positives, negatives, None, pads)[0])(w)

    whole = both(weights, windows, positives, negatives, False)
    short = both(weights, *(ids[:, -SHORT:] for ids in (windows, positives, negatives)), True)
    for ours, theirs in zip(jax.tree.leaves(short), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-4)


def test_dropout_of_short_windows_is_right_in_distribution(weights):
    """Mean and spread over many masks: the virtual key's share varies as all the pads' would."""
    row, masks = 3, 4000  # four items, six pads
    windows = np.repeat(_left_padded()[row : row + 1], masks, axis=0)
    one_block = dataclasses.replace(C, blocks=1)
    w = weights | {"blocks": jax.tree.map(lambda leaf: leaf[:1], weights["blocks"])}
    keys = jax.random.split(jax.random.key(0), 2 * masks)
    whole = np.asarray(features(w, one_block, windows, keys[:masks]))[:, -1]
    short = np.asarray(features(w, one_block, windows[:, -SHORT:], keys[masks:], jnp.full(masks, C.maxlen - 4)))[:, -1]
    standard_error = whole.std(0) / np.sqrt(masks)
    assert (np.abs(short.mean(0) - whole.mean(0)) < 6 * standard_error).all()
    np.testing.assert_allclose(short.std(0), whole.std(0), rtol=0.08)


@pytest.mark.parametrize("pads", [1, 4, 9])
def test_the_pads_that_dropout_keeps_are_binomial(pads):
    c = dataclasses.replace(C, dropout=0.3)
    keys = jax.random.split(jax.random.key(pads), 3)
    share = np.asarray(sasrec._kept_share(c, keys, 1, jnp.full(3, pads), (2, 4000)))
    kept = np.rint(share * pads * 0.7).astype(int)
    np.testing.assert_allclose(kept, share * pads * 0.7, atol=1e-4)
    found = np.bincount(kept.ravel(), minlength=pads + 1) / kept.size
    expected = [math.comb(pads, k) * 0.7**k * 0.3 ** (pads - k) for k in range(pads + 1)]
    np.testing.assert_allclose(found, expected, atol=0.012)
