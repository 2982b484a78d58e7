"""Stage 1 is the same computation in JAX and in PyTorch: the four losses, their gradients, one Adam step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")

from parity import assert_trees_close, gradients_of, load, randomised, weights_of  # noqa: E402

from allmrec_jax.data import batches  # noqa: E402
from allmrec_jax.models import alignment, text_encoder  # noqa: E402
from allmrec_jax.torch_baseline.alignment import AutoEncoder, SentenceEncoder, in_transformers, losses, train_batch  # noqa: E402
from allmrec_jax.training import align_step  # noqa: E402
from allmrec_jax.training.align_batches import with_texts  # noqa: E402
from allmrec_jax.training.state import create  # noqa: E402

D, JOINT, TEXT, BATCH = 10, 6, 16, 8
RATE = 1e-4
F_I, F_T = alignment.describe(D, JOINT), alignment.describe(TEXT, JOINT)
ENCODER = text_encoder.EncoderConfig(
    vocab_size=60,
    hidden_size=TEXT,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=20,
    dropout=0.0,
)


@pytest.fixture(scope="module")
def auto_encoders():
    """Ours and theirs, f_I and f_T, with the same weights."""
    ours = {"f_I": randomised(jax.random.key(1), F_I), "f_T": randomised(jax.random.key(2), F_T)}
    return ours, load(AutoEncoder(D, JOINT), F_I, ours["f_I"]), load(AutoEncoder(TEXT, JOINT), F_T, ours["f_T"])


def _inputs() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    widths = {"x_u": D, "E_positive": D, "E_negative": D, "Q_positive": TEXT, "Q_negative": TEXT}
    return {name: random.normal(size=(BATCH, width)).astype(np.float32) for name, width in widths.items()}


WEIGHTS = {
    "all": {"match": 1.0, "item": 0.5, "text": 0.2, "rec": 1.0},
    "reconstructions": {"match": 0.0, "item": 1.0, "text": 1.0, "rec": 0.0},
    "match": {"match": 1.0, "item": 0.0, "text": 0.0, "rec": 0.0},
    "rec": {"match": 0.0, "item": 0.0, "text": 0.0, "rec": 1.0},
}
# s of L_rec, and whether negatives enter the other terms: the paper's and the public code's
RECIPES = {"paper": ("dot", False), "reference": ("mean", True)}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("which", WEIGHTS)
def test_each_loss_and_its_gradients_are_equal(auto_encoders, which, recipe):
    """Gradients of the parameters and of Q, through which the sentence encoder learns."""
    ours, f_I, f_T = auto_encoders
    inputs, weights, (score, both) = _inputs(), WEIGHTS[which], RECIPES[recipe]
    terms = align_step.Terms(weights, score, both)
    data = {"x_u": inputs["x_u"], "E": np.concatenate([inputs["E_positive"], inputs["E_negative"]])}
    rows = np.arange(BATCH)
    drawn = {"who": rows, "positive": rows, "negative": rows + BATCH, "real": np.ones(BATCH, bool)}

    def loss(trees, Q):
        items = jnp.arange(len(Q))
        of_items, found = terms.of_items(trees, jnp.asarray(data["E"])[items], Q, jnp.full(len(Q), 1 / BATCH))
        arrays = jax.tree.map(jnp.asarray, (data, drawn))
        of_users, rec = terms.of_users(trees["f_I"], *arrays, jax.random.key(0), jnp.int32(0), jnp.int32(BATCH))
        return of_items + of_users, found | rec | {"loss": of_items + of_users}

    names = ("Q_positive", "Q_negative") if both else ("Q_positive",)
    Q = np.concatenate([inputs[name] for name in names])
    (_, values), (gradients, Q_gradient) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(ours, Q)
    tensors = {name: torch.tensor(array, requires_grad=name in names) for name, array in inputs.items()}
    if not both:
        tensors.pop("Q_negative")
    for model in (f_I, f_T):
        model.zero_grad(set_to_none=False)
    theirs = losses(f_I, f_T, **tensors, weights=weights, score=score)
    theirs["loss"].backward()
    assert values.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(values[name], value.item(), rtol=1e-5, err_msg=name)
    assert_trees_close(gradients["f_I"], gradients_of(f_I, F_I))
    assert_trees_close(gradients["f_T"], gradients_of(f_T, F_T))
    expected = np.concatenate([tensors[name].grad.numpy() for name in names])
    np.testing.assert_allclose(Q_gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def bert():
    pytest.importorskip("transformers", reason="transformers is not installed")
    return in_transformers(ENCODER)


def _without_key_bias(tree):
    """The key bias shifts all logits of a query alike: its gradient is rounding, which Adam makes a whole step of."""
    layers = {**tree["layers"], "k": {"kernel": tree["layers"]["k"]["kernel"]}}
    return {**tree, "layers": layers}


class _World:
    """Data, and a batch whose last two rows are not real; some items stand in it twice."""

    def __init__(self, auto_encoders, bert):
        self.trees, self.f_I, self.f_T = auto_encoders
        self.description = text_encoder.describe(ENCODER)
        self.encoder = text_encoder.build(ENCODER, randomised(jax.random.key(3), self.description), None)
        load(self.f_I, F_I, self.trees["f_I"])
        load(self.f_T, F_T, self.trees["f_T"])
        self.theirs = SentenceEncoder(load(bert, self.description, self.encoder.weights["weights"])).eval()
        random = np.random.default_rng(1)
        self.lengths = random.integers(3, 13, 12)
        self.data = {
            "E": random.normal(size=(12, D)).astype(np.float32),
            "x_u": random.normal(size=(BATCH, D)).astype(np.float32),
            "tokens": random.integers(1, ENCODER.vocab_size, (12, 12)).astype(np.int32),
            "lengths": self.lengths,
        }
        self.positive, self.negative = random.integers(1, 12, BATCH), random.integers(1, 12, BATCH)

    def batch(self, rows: np.ndarray, both: bool, devices: int, shapes) -> dict[str, np.ndarray]:
        """What `align_step.make_step` reads of these rows."""
        drawn = {
            "who": rows,
            "positive": self.positive[rows],
            "negative": self.negative[rows],
            "real": rows < BATCH - 2,
        }
        return with_texts(drawn, self.lengths, shapes, both=both, devices=devices)[0]

    def their_terms(self, rows: np.ndarray, score: str, both: bool):
        rows = rows[rows < BATCH - 2]
        tokens, mask = self.data["tokens"], np.arange(12)[None] < self.lengths[:, None]

        def Q(items):
            return self.theirs(torch.tensor(tokens[items]).long(), torch.tensor(mask[items]))

        positive, negative = self.positive[rows], self.negative[rows]
        return losses(
            self.f_I,
            self.f_T,
            x_u=torch.tensor(self.data["x_u"][rows]),
            E_positive=torch.tensor(self.data["E"][positive]),
            E_negative=torch.tensor(self.data["E"][negative]),
            Q_positive=Q(positive),
            Q_negative=Q(negative) if both else None,
            weights=WEIGHTS["all"],
            score=score,
        )


@pytest.mark.parametrize(
    ("recipe", "chunk", "devices"),
    [("paper", None, 8), ("reference", None, 1), ("reference", 4, 2)],
    ids=["paper", "reference", "chunks"],
)
def test_a_batch_with_the_encoder_in_it_is_equal(auto_encoders, bert, recipe, chunk, devices):
    """The mapped step in groups of texts, against one Adam step in PyTorch, or one for each chunk of the batch."""
    world, (score, both) = _World(auto_encoders, bert), RECIPES[recipe]
    steps = align_step.spans(BATCH, BATCH, chunk)
    optimiser = optax.adam(RATE, b1=0.9, b2=0.98, eps=1e-8)
    if chunk:
        optimiser = optax.chain(align_step.keep_gradients(steps, BATCH), optimiser)
    before = jax.device_get({**world.trees, "encoder": world.encoder.weights})
    shapes = ((3, 8), (1, 16), (2, 16))  # some rows hold several texts
    step = align_step.make_step(
        world.encoder.graph,
        optimiser,
        jax.devices()[:devices],
        terms=align_step.Terms(WEIGHTS["all"], score, both),
        shapes=shapes,
    )
    state, found = create(before, optimiser), []
    for start, stop in steps:
        batch = world.batch(np.arange(start, stop), both, devices, shapes)
        state, values = step(state, world.data, batch, jax.random.key(0))
        found.append(jax.device_get(values))

    modules = torch.nn.ModuleList([world.f_I, world.f_T, world.theirs])
    adam = torch.optim.Adam(modules.parameters(), lr=RATE, betas=(0.9, 0.98), eps=1e-8)
    terms = []

    def loss_of(rows: slice):
        terms.append(world.their_terms(np.arange(BATCH)[rows], score, both))
        return terms[-1]["loss"]

    train_batch(adam, loss_of, BATCH, chunk or BATCH)
    assert len(found) == len(terms) == len(steps)
    for ours, theirs in zip(found, terms, strict=True):
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value.item(), rtol=1e-4, err_msg=name)

    def plain(tree):
        return {**tree, "encoder": _without_key_bias(tree["encoder"]["weights"])}

    def of(read):
        parts = (world.f_I, F_I), (world.f_T, F_T), (world.theirs.transformer, world.description)
        f_I, f_T, encoder = (read(*part) for part in parts)
        return {"f_I": f_I, "f_T": f_T, "encoder": _without_key_bias(encoder)}

    # What PyTorch is left with are the gradients of all chunks together. Without chunks the first Adam step keeps a
    # tenth of the gradient as its mean, so the optimiser's state shows it.
    kept = state.opt_state[0][1] if chunk else jax.tree.map(lambda m: m / np.float32(0.1), state.opt_state[0].mu)
    assert_trees_close(plain(jax.device_get(kept)), of(gradients_of), rtol=1e-3, atol=2e-4 if chunk else 1e-5)
    moved, expected = (
        jax.tree.map(lambda a, b: (np.asarray(a) - b) / RATE, tree, plain(before))
        for tree in (plain(jax.device_get(state.params)), of(weights_of))
    )
    assert_trees_close(moved, expected, rtol=1e-2, atol=1e-2)
    assert np.abs(expected["encoder"]["embeddings"]["word"]).max() > 0.9  # the encoder did learn


@pytest.mark.parametrize(("recipe", "chunk"), [("paper", None), ("reference", 3)])
def test_an_epoch_with_all_Q_given_is_equal(auto_encoders, recipe, chunk):
    """Users in file order, batches of 8, the last of which is partial; one scanned program."""
    trees, f_I, f_T = auto_encoders
    load(f_I, F_I, trees["f_I"])
    load(f_T, F_T, trees["f_T"])
    (score, both), random, n = RECIPES[recipe], np.random.default_rng(2), 20
    steps = align_step.spans(n, 8, chunk)
    optimiser = optax.sgd(0.1)
    if chunk:
        optimiser = optax.chain(align_step.keep_gradients(steps, 8), optimiser)
    data = {
        "E": random.normal(size=(12, D)).astype(np.float32),
        "Q": random.normal(size=(12, TEXT)).astype(np.float32),
        "x_u": random.normal(size=(n, D)).astype(np.float32),
        "positives": random.integers(1, 12, n).astype(np.int32),
        "users": np.arange(1, n + 1, dtype=np.int32),
        "seen": batches.seen_items(np.full(n, 3), np.concatenate([[0], np.arange(n + 1)]), 11),
    }
    epoch = align_step.make_epoch(
        optimiser,
        jax.devices()[:1],
        terms=align_step.Terms(WEIGHTS["all"], score, both),
        steps=steps,
        rows=chunk or 8,
    )
    key, order = jax.random.key(4), jnp.arange(n, dtype=jnp.int32)
    state, found = epoch(create(jax.device_get(trees), optimiser), data, order, (key, key))

    sgd = torch.optim.SGD([*f_I.parameters(), *f_T.parameters()], lr=0.1)
    E, Q, values, step = torch.tensor(data["E"]), torch.tensor(data["Q"]), [], 0
    for first in range(0, n, 8):

        def loss_of(rows: slice, first=first):
            nonlocal step
            who = np.arange(n)[first : min(first + 8, n)][rows]
            drawn = batches.draw_negatives(key, step, len(who), data["users"][who], data["seen"])
            positive, negative, step = data["positives"][who], np.array(drawn)[:, 0], step + 1
            return losses(
                f_I,
                f_T,
                x_u=torch.tensor(data["x_u"][who]),
                E_positive=E[positive],
                E_negative=E[negative],
                Q_positive=Q[positive],
                Q_negative=Q[negative] if both else None,
                weights=WEIGHTS["all"],
                score=score,
            )["loss"]

        values += train_batch(sgd, loss_of, min(8, n - first), chunk or 8)
    assert len(values) == len(steps) == int(state.step)
    np.testing.assert_allclose(found["loss"], values, rtol=1e-4)
    assert_trees_close(state.params["f_I"], weights_of(f_I, F_I), rtol=1e-3, atol=1e-4)
    assert_trees_close(state.params["f_T"], weights_of(f_T, F_T), rtol=1e-3, atol=1e-4)
