"""NCF: the same scores, loss and gradients as in PyTorch; users by their rows, strangers by folding in."""

import jax
import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")

from parity import assert_trees_close, gradients_of, load, randomised  # noqa: E402

from allmrec_jax.config import CF  # noqa: E402
from allmrec_jax.evaluation import cf as evaluation  # noqa: E402
from allmrec_jax.models import collaborative, ncf, sequential  # noqa: E402
from allmrec_jax.torch_baseline.ncf import NCF  # noqa: E402
from allmrec_jax.training.cf import train_cf  # noqa: E402

C = ncf.NCFConfig(n_items=30, n_users=9, width=7, maxlen=6)


@pytest.fixture(scope="module")
def models():
    tree = randomised(jax.random.key(1), ncf.describe(C))
    return tree, load(NCF(C), ncf.describe(C), tree)


def batch() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    positives, negatives = random.integers(1, 31, (2, 4, 6))
    real = np.arange(6)[None] >= np.array([6, 3, 1, 0])[:, None]
    return [np.array([3, 9, 1, 2]), *(np.where(real, ids, 0).astype(np.int32) for ids in (positives, negatives))]


def test_scores_loss_and_gradients_are_equal(models):
    tree, baseline = models
    users, positives, negatives = batch()
    rows = tree["E"][positives]
    ours = collaborative.scores(tree, C, tree["P"][users], rows)
    with torch.no_grad():
        theirs = baseline(torch.tensor(users), torch.tensor(positives)).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)

    @jax.jit
    @jax.value_and_grad
    def loss(tree, users, positives, negatives):
        total, count = sequential.loss_terms(ncf, tree, C, positives, positives, negatives, users=users)
        return total / count

    value, gradients = loss(tree, users, positives, negatives)
    baseline.zero_grad()
    expected = baseline.loss(*map(torch.tensor, (users, positives, negatives)))
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    assert_trees_close(gradients, gradients_of(baseline, ncf.describe(C)), atol=1e-5)


def test_folding_in_finds_a_linear_rule():
    """Rows that ARE a linear function of the history's mean row are found again, and an empty history is finite."""
    random = np.random.default_rng(0)
    E = random.normal(size=(31, 7)).astype(np.float32)
    windows = random.integers(0, 31, (400, 6)).astype(np.int32)
    rule = random.normal(size=(8, 7)).astype(np.float32)
    P = np.concatenate([np.zeros((1, 7), np.float32), ncf.mean_rows(E, windows) @ rule])
    found = ncf.fold_in(E, P, windows, np.arange(1, 401), ridge=1e-6)
    np.testing.assert_allclose(found, rule, atol=1e-3)
    assert np.isfinite(ncf.mean_rows(E, np.zeros((1, 6), np.int32)) @ found).all()


def test_training_and_representations(tmp_path):
    data = tiny.dataset(tmp_path / "d")
    config = CF(model="ncf", width=8, maxlen=10, batch=16, epochs=3, evaluate_every=3, heads=1, dropout=0.0)
    model, _ = train_cf(config, data, tmp_path / "cf", seed=0, devices=jax.devices()[:1])
    windows = data.windows(data.history_end("test"), 10)
    users = np.arange(data.n_users + 1)
    known, folded = model.x_u(windows, users), model.x_u(windows)
    np.testing.assert_array_equal(known[1:], np.asarray(model.params["P"])[1:])
    assert known.shape == folded.shape
    assert np.isfinite(folded).all()
    beyond = model.x_u(windows[:2], np.array([data.n_users + 1, 1]))  # a cold user has no row
    np.testing.assert_allclose(beyond, [folded[0], known[1]], rtol=1e-5, atol=1e-6)
    found = evaluation.figures(model, data, seed=0)
    assert set(found) == {"reference"}
    assert 0 <= found["reference"]["hit@1"]["value"] <= 1
