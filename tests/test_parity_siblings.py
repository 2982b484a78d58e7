"""GRU4Rec and NextItNet: the same functions in JAX and in PyTorch, blind to the future and to padding."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")

from parity import assert_trees_close, gradients_of, load, randomised  # noqa: E402

from allmrec_jax.models import collaborative, gru4rec, nextitnet, params, sequential  # noqa: E402
from allmrec_jax.torch_baseline.gru4rec import GRU4Rec  # noqa: E402
from allmrec_jax.torch_baseline.nextitnet import NextItNet  # noqa: E402

LENGTHS = np.array([0, 1, 3, 9, 12, 6])
SIZES = {"n_items": 40, "width": 8, "blocks": 2, "maxlen": 12}
CASES = {
    "gru4rec": (gru4rec.GRU4RecConfig(**SIZES), GRU4Rec),
    "nextitnet": (nextitnet.NextItNetConfig(**SIZES), NextItNet),
}


def batch(seed: int = 0) -> list[np.ndarray]:
    ids = np.random.default_rng(seed).integers(1, 41, (3, len(LENGTHS), 12))
    real = np.arange(12)[None] >= 12 - LENGTHS[:, None]
    return [np.where(real, part, 0).astype(np.int32) for part in ids]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    c, kind = CASES[request.param]
    module = collaborative.module_of(c)
    tree = randomised(jax.random.key(1), module.describe(c))
    return c, module, tree, load(kind(c), module.describe(c), tree)


def test_features_loss_and_gradients_are_equal(case):
    c, module, tree, baseline = case
    windows, positives, negatives = batch()
    ours = np.asarray(jax.jit(module.features, static_argnums=1)(tree, c, windows))
    theirs = baseline.eval()(torch.tensor(windows)).detach().numpy()
    real = windows > 0
    np.testing.assert_allclose(ours[real], theirs[real], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours[:, -1], theirs[:, -1], rtol=1e-4, atol=1e-5)  # x_u, of an empty history, too
    assert np.isfinite(ours).all()

    @jax.jit
    @jax.value_and_grad
    def loss(tree, *ids):
        total, count = sequential.loss_terms(module, tree, c, *ids)
        return total / count

    value, gradients = loss(tree, windows, positives, negatives)
    baseline.zero_grad()
    expected = baseline.loss(*map(torch.tensor, (windows, positives, negatives)))
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    assert_trees_close(gradients, gradients_of(baseline, module.describe(c)), atol=1e-5)


def test_initial_values_have_the_same_spread(case):
    c, module, _, baseline = case
    c = dataclasses.replace(c, width=64)
    torch.manual_seed(0)
    theirs = {name: p.detach().numpy() for name, p in type(baseline)(c).named_parameters()}
    ours = params.to_torch(module.describe(c), params.init(jax.random.key(0), module.describe(c)))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array.std(), theirs[name].std(), rtol=0.15, err_msg=name)


def test_a_feature_sees_no_later_item_and_no_padding(case):
    c, module, tree, _ = case
    features = jax.jit(module.features, static_argnums=1)
    windows = batch()[0]
    base = np.asarray(features(tree, c, windows))
    for t in range(1, 12):
        later = np.where((np.arange(12)[None] >= t) & (windows > 0), windows % 40 + 1, windows)
        np.testing.assert_array_equal(np.asarray(features(tree, c, later))[:, :t], base[:, :t])
    other = tree | {"E": tree["E"].at[0].set(1e3)}
    real = windows > 0
    np.testing.assert_array_equal(np.asarray(features(other, c, windows))[real], base[real])


def test_short_windows_give_the_features_of_the_whole_window(case):
    c, module, tree, _ = case
    features = jax.jit(module.features, static_argnums=1)
    windows = batch()[0]
    rows = LENGTHS <= 6
    short = np.asarray(features(tree, c, windows[rows, -6:], None, np.asarray(12 - LENGTHS[rows])))
    whole = np.asarray(features(tree, c, windows[rows]))[:, -6:]
    real = windows[rows, -6:] > 0
    np.testing.assert_allclose(short[real], whole[real], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(short[:, -1], whole[:, -1], rtol=1e-5, atol=1e-6)


def test_dropout_is_a_function_of_key_and_row_alone(case):
    c, module, tree, _ = case
    windows = np.repeat(batch()[0][4:5], 3, axis=0)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(5)))(np.arange(3))
    features = jax.jit(module.features, static_argnums=1)
    dropped = np.asarray(features(tree, c, windows, keys))
    np.testing.assert_allclose(features(tree, c, windows, keys[::-1])[::-1], dropped, rtol=1e-5, atol=1e-6)
    assert np.abs(dropped[0] - dropped[1]).max() > 1e-3
