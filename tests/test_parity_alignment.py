"""Stage 1 is the same computation in JAX and in PyTorch: the four losses, their gradients, one Adam step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")

from parity import assert_trees_close, gradients_of, load, randomised, weights_of  # noqa: E402

from allmrec_jax.models import alignment, text_encoder  # noqa: E402
from allmrec_jax.torch_baseline.alignment import AutoEncoder, SentenceEncoder, losses  # noqa: E402
from allmrec_jax.training import align  # noqa: E402
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
    widths = {"x_u": D, "E_positive": D, "E_negative": D, "Q_positive": TEXT}
    return {name: random.normal(size=(BATCH, width)).astype(np.float32) for name, width in widths.items()}


@pytest.mark.parametrize(
    "weights",
    [
        {"match": 1.0, "item": 0.5, "text": 0.2, "rec": 1.0},
        {"match": 0.0, "item": 1.0, "text": 1.0, "rec": 0.0},
        {"match": 1.0, "item": 0.0, "text": 0.0, "rec": 0.0},
        {"match": 0.0, "item": 0.0, "text": 0.0, "rec": 1.0},
    ],
    ids=["all", "reconstructions", "match", "rec"],
)
def test_each_loss_and_its_gradients_are_equal(auto_encoders, weights):
    """Gradients of the parameters and of Q, through which the sentence encoder learns."""
    ours, f_I, f_T = auto_encoders
    inputs = _inputs()

    def loss(trees, Q):
        arrays = {name: jnp.asarray(array) for name, array in inputs.items()}
        rows = alignment.loss_rows(**trees, **(arrays | {"Q_positive": Q}), weights=weights)
        means = jax.tree.map(jnp.mean, rows)
        return means["loss"], means

    (_, values), (gradients, Q_gradient) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        ours, inputs["Q_positive"]
    )
    tensors = {name: torch.tensor(array, requires_grad=name == "Q_positive") for name, array in inputs.items()}
    for model in (f_I, f_T):
        model.zero_grad(set_to_none=False)
    terms = losses(f_I, f_T, **tensors, weights=weights)
    terms["loss"].backward()
    assert values.keys() == terms.keys()
    for name, value in terms.items():
        np.testing.assert_allclose(values[name], value.item(), rtol=1e-5, err_msg=name)
    assert_trees_close(gradients["f_I"], gradients_of(f_I, F_I))
    assert_trees_close(gradients["f_T"], gradients_of(f_T, F_T))
    np.testing.assert_allclose(Q_gradient, tensors["Q_positive"].grad.numpy(), rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=ENCODER.vocab_size,
        hidden_size=ENCODER.hidden_size,
        intermediate_size=ENCODER.intermediate_size,
        num_hidden_layers=ENCODER.num_hidden_layers,
        num_attention_heads=ENCODER.num_attention_heads,
        max_position_embeddings=ENCODER.max_position_embeddings,
        layer_norm_eps=ENCODER.layer_norm_eps,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def _without_key_bias(tree):
    """The key bias shifts all logits of a query alike: its gradient is rounding, which Adam makes a whole step of."""
    layers = {**tree["layers"], "k": {"kernel": tree["layers"]["k"]["kernel"]}}
    return {**tree, "layers": layers}


def test_one_step_with_the_encoder_in_it_is_equal(auto_encoders, bert):
    """The mapped step on eight devices, its last two rows filling up the batch, against Adam in PyTorch."""
    trees, f_I, f_T = auto_encoders
    description = text_encoder.describe(ENCODER)
    encoder = text_encoder.build(ENCODER, randomised(jax.random.key(3), description), None)
    theirs = SentenceEncoder(load(bert, description, encoder.weights["weights"]))
    weights = {"match": 1.0, "item": 0.5, "text": 0.2, "rec": 1.0}
    random = np.random.default_rng(1)
    E = random.normal(size=(12, D)).astype(np.float32)
    lengths = random.integers(3, 13, BATCH)
    batch = {
        "tokens": random.integers(1, ENCODER.vocab_size, (BATCH, 12)).astype(np.int32),
        "mask": np.arange(12)[None] < lengths[:, None],
        "x_u": random.normal(size=(BATCH, D)).astype(np.float32),
        "positive": random.integers(1, 12, BATCH),
        "negative": random.integers(1, 12, BATCH),
        "real": np.arange(BATCH) < BATCH - 2,
    }
    batch["tokens"] *= batch["mask"]

    optimiser = optax.adam(RATE, b1=0.9, b2=0.98, eps=1e-8)
    before = jax.device_get({**trees, "encoder": encoder.weights})
    step = align.make_step(encoder.graph, optimiser, jax.devices(), weights=weights)
    state, values = step(create(before, optimiser), {"E": E}, batch, jax.random.key(0))

    modules = torch.nn.ModuleList([f_I, f_T, theirs])
    adam = torch.optim.Adam(modules.parameters(), lr=RATE, betas=(0.9, 0.98), eps=1e-8)
    adam.zero_grad()
    real = {name: torch.tensor(array[batch["real"]]) for name, array in batch.items()}
    terms = losses(
        f_I,
        f_T,
        x_u=real["x_u"],
        E_positive=torch.tensor(E)[real["positive"]],
        E_negative=torch.tensor(E)[real["negative"]],
        Q_positive=theirs(real["tokens"], real["mask"]),
        weights=weights,
    )
    terms["loss"].backward()
    adam.step()

    for name, value in terms.items():
        np.testing.assert_allclose(values[name], value.item(), rtol=1e-5, err_msg=name)
    after = {
        "f_I": weights_of(f_I, F_I),
        "f_T": weights_of(f_T, F_T),
        "encoder": _without_key_bias(weights_of(theirs.transformer, description)),
    }
    # The first Adam step keeps a tenth of the gradient as its mean, so the optimiser's state shows it.
    mean = jax.device_get(state.opt_state[0].mu)
    gradients = {
        "f_I": gradients_of(f_I, F_I),
        "f_T": gradients_of(f_T, F_T),
        "encoder": _without_key_bias(gradients_of(theirs.transformer, description)),
    }

    def plain(tree):
        return {**tree, "encoder": _without_key_bias(tree["encoder"]["weights"])}

    assert_trees_close(jax.tree.map(lambda m: m / np.float32(0.1), plain(mean)), gradients, atol=1e-5)
    moved, expected = (
        jax.tree.map(lambda a, b: (np.asarray(a) - b) / RATE, tree, plain(before))
        for tree in (plain(jax.device_get(state.params)), after)
    )
    assert_trees_close(moved, expected, rtol=1e-2, atol=1e-2)
    word = expected["encoder"]["embeddings"]["word"]
    assert np.abs(word).max() > 0.9  # the encoder did learn
