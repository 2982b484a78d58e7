"""SASRec is the same function in JAX and in PyTorch: features, scores, loss, gradients, training steps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")

from parity import assert_trees_close, gradients_of, load, randomised, weights_of  # noqa: E402

from allmrec_jax.models import params, sasrec, sequential  # noqa: E402
from allmrec_jax.models.losses import Objective  # noqa: E402
from allmrec_jax.torch_baseline.sasrec import SASRec  # noqa: E402

LENGTHS = [0, 1, 3, 9, 10, 10, 6, 2]  # of 10: an empty history, short ones, full ones


def _batch(c: sasrec.SASRecConfig, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows, positives and negatives; some items occur twice, and one negative is item 0."""
    random = np.random.default_rng(seed)
    windows, positives, negatives = random.integers(1, c.n_items + 1, (3, len(LENGTHS), c.maxlen))
    real = np.arange(c.maxlen)[None] >= c.maxlen - np.array(LENGTHS)[:, None]
    windows, positives, negatives = (np.where(real, ids, 0).astype(np.int32) for ids in (windows, positives, negatives))
    negatives[3, -1] = 0  # what a user who has every item gets
    return windows, positives, negatives


@pytest.fixture(scope="module", params=[(1, 50), (2, 12)], ids=["one head, width 50", "two heads"])
def models(request):
    heads, width = request.param
    c = sasrec.SASRecConfig(n_items=40, width=width, heads=heads, maxlen=10)
    tree = randomised(jax.random.key(heads), sasrec.describe(c))
    return c, tree, load(SASRec(c), sasrec.describe(c), tree)


_features = jax.jit(sasrec.features, static_argnums=1)


def test_features_are_equal_at_every_position(models):
    c, tree, baseline = models
    windows = _batch(c)[0]
    theirs = baseline.eval()(torch.tensor(windows)).detach().numpy()
    np.testing.assert_allclose(_features(tree, c, windows), theirs, rtol=1e-4, atol=1e-5)


def test_windows_shorter_than_the_position_table_use_its_end(models):
    c, tree, baseline = models
    windows = _batch(c)[0][:, -4:]
    theirs = baseline.eval()(torch.tensor(windows)).detach().numpy()
    np.testing.assert_allclose(_features(tree, c, windows), theirs, rtol=1e-4, atol=1e-5)


def test_user_representations_and_scores_are_equal(models):
    from allmrec_jax.training.cf import CFModel

    c, tree, baseline = models
    windows = _batch(c)[0]
    candidates = np.random.default_rng(1).integers(0, c.n_items + 1, (len(windows), 6))  # item 0 is read as it stands
    candidates[0, 0] = 0
    model = CFModel(c, tree)
    ours = model.x_u(windows)
    with torch.no_grad():
        theirs = baseline.eval().user_representation(torch.tensor(windows))
        scores = baseline.scores(theirs, torch.tensor(candidates))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours[0], tree["last_norm"]["bias"], rtol=1e-6)  # an empty history
    np.testing.assert_allclose(model.scores(ours, candidates), scores.numpy(), rtol=1e-4, atol=1e-4)


@partial(jax.jit, static_argnums=1)
@jax.value_and_grad
def _loss(tree, c, batch, l2_emb):
    total, count = sequential.loss_terms(sasrec, tree, c, *batch)
    return total / count + l2_emb * jnp.linalg.norm(tree["E"])


@pytest.mark.parametrize("l2_emb", [0.0, 0.01])
def test_loss_and_gradients_are_equal(models, l2_emb):
    c, tree, baseline = models
    batch = _batch(c)
    ours, gradients = _loss(tree, c, batch, l2_emb)
    baseline.eval().zero_grad()
    theirs = baseline.loss(*map(torch.tensor, batch), l2_emb=l2_emb)
    theirs.backward()
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    expected = gradients_of(baseline, sasrec.describe(c))
    # The gradient of the key bias is 0 (it shifts all logits of a query alike); what is left is rounding.
    for tree_ in (gradients, expected):
        key_bias = np.array(tree_["blocks"]["qkv"]["bias"])
        assert np.abs(key_bias[:, 1]).max() < 1e-6
        key_bias[:, 1] = 0
        tree_["blocks"]["qkv"]["bias"] = key_bias
    assert_trees_close(gradients, expected, atol=1e-5)
    if not l2_emb:
        assert not np.asarray(gradients["E"])[0].any()  # item 0 keeps its row for ever


@pytest.mark.parametrize(
    "objective", [Objective(negatives=3, calibration=0.75), Objective("softmax", 0), Objective("softmax", 7)]
)
def test_the_other_objectives_are_equal(models, objective):
    c, tree, baseline = models
    windows, positives, _ = _batch(c)
    random = np.random.default_rng(2)
    each = random.integers(1, c.n_items + 1, (*windows.shape, 3))
    shared = random.integers(1, c.n_items + 1, 7)
    shared[:2] = positives[positives != 0][:2]  # a positive is no rival of itself
    negatives = each if objective.loss == "bce" else None if objective.all_items else shared

    @jax.jit
    @jax.value_and_grad
    def loss(tree):
        ids = [None if part is None else jnp.asarray(part) for part in (windows, positives, negatives)]
        total, count = sequential.loss_terms(sasrec, tree, c, *ids, objective=objective)
        return total / count

    ours, gradients = loss(tree)
    baseline.eval().zero_grad()
    ids = [torch.tensor(part).long() for part in (windows, positives)]
    if objective.loss == "bce":
        theirs = baseline.gbce(*ids, torch.tensor(each), objective.beta(c.n_items))
    else:
        theirs = baseline.cross_entropy(*ids, None if objective.all_items else torch.tensor(shared))
    theirs.backward()
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(gradients["E"], gradients_of(baseline, sasrec.describe(c))["E"], rtol=1e-4, atol=1e-5)


def test_adam_steps_are_equal(models):
    """Three steps on different items: rows without a gradient go on moving by momentum."""
    c, tree, _ = models
    description, rate = sasrec.describe(c), 1e-3
    baseline = load(SASRec(c), description, tree).eval()
    theirs = torch.optim.Adam(baseline.parameters(), lr=rate, betas=(0.9, 0.98), eps=1e-8)
    optimiser = optax.adam(rate, b1=0.9, b2=0.98, eps=1e-8)
    state, ours = optimiser.init(tree), tree
    update = jax.jit(optimiser.update)
    for seed in range(3):
        batch = tuple(np.where(ids % 3 == seed, 0, ids) for ids in _batch(c, seed))
        updates, state = update(_loss(ours, c, batch, 0.0)[1], state)
        ours = optax.apply_updates(ours, updates)
        theirs.zero_grad()
        baseline.loss(*map(torch.tensor, batch)).backward()
        theirs.step()
    expected = weights_of(baseline, description)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b) / rate, ours, tree)
    expected = jax.tree.map(lambda a, b: np.asarray(a - b) / rate, expected, tree)
    for tree_ in (moved, expected):
        tree_["blocks"]["qkv"]["bias"] = np.delete(tree_["blocks"]["qkv"]["bias"], 1, axis=1)  # the key bias: see above
    assert_trees_close(moved, expected, rtol=1e-2, atol=1e-2)


def test_initial_values_have_the_same_spread():
    c = sasrec.SASRecConfig(n_items=300, width=256, maxlen=40)
    torch.manual_seed(0)
    theirs = {name: p.detach().numpy() for name, p in SASRec(c).named_parameters()}
    ours = params.to_torch(sasrec.describe(c), params.init(jax.random.key(0), sasrec.describe(c)))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(
            array.std(), theirs[name].std(), rtol=0.15 if array.ndim == 1 else 0.03, err_msg=name
        )
        np.testing.assert_allclose(array.mean(), theirs[name].mean(), atol=0.03, err_msg=name)
