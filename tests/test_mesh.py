"""The number of devices, and how they are mapped, change nothing but the order of summation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from allmrec_jax.errors import UserError
from allmrec_jax.models import alignment, params, sasrec
from allmrec_jax.models.losses import Objective
from allmrec_jax.training import align_step, cf, mesh
from allmrec_jax.training.align_batches import with_texts
from allmrec_jax.training.state import create

TIERS = ((8, 8), (10, 8))
WAYS = [("shard_map", 8), ("pmap", 8), ("shard_map", 2)]


def assert_close(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6), a, b)


def on(devices: int) -> list:
    return jax.devices()[:devices]


@pytest.fixture(scope="module")
def epoch(tmp_path_factory):
    """`epoch(how, devices)`: the state and losses after an epoch of stage 0 from a fixed start."""
    dataset = tiny.dataset(tmp_path_factory.mktemp("data") / "tiny")
    c = sasrec.SASRecConfig(dataset.n_items, width=8, blocks=1, heads=1, maxlen=10, dropout=0.3)
    optimiser = optax.sgd(1.0, momentum=0.9)  # Adam would blow up the rounding of gradients that are 0
    data = cf.training_data(dataset)

    def run(how: str, devices: int, tiers: tuple = TIERS, dropout: float = 0.3, optimiser=optimiser, **options):
        config = dataclasses.replace(c, dropout=dropout)
        state = cf.initial_state(jax.random.key(0), c, optimiser)
        options = {"l2_emb": 1e-3} | options
        made = cf.make_epoch(config, optimiser, on(devices), batch=16, steps=3, tiers=tiers, how=how, **options)
        return jax.device_get(made(state, data, jax.random.key(1)))

    return run


@pytest.fixture(scope="module")
def one_device_epoch(epoch):
    return epoch("shard_map", 1)


@pytest.mark.parametrize(("how", "devices"), WAYS)
def test_an_epoch_of_stage_0(epoch, one_device_epoch, how, devices):
    state, losses = epoch(how, devices)
    expected_state, expected_losses = one_device_epoch
    assert losses["loss"].shape == (3,)
    assert int(state.step) == 3
    assert_close(losses, expected_losses)
    assert_close(state, expected_state)


def test_tiers_change_nothing_without_dropout(epoch):
    in_tiers, whole = (epoch("shard_map", 2, tiers, 0.0) for tiers in (TIERS, ()))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), in_tiers, whole)


def test_a_batch_that_fits_no_tiers_is_computed_at_full_width(epoch):
    too_narrow, whole = (epoch("shard_map", 2, tiers) for tiers in (((1, 8), (2, 8)), ()))
    assert_close(too_narrow, whole)
    fitting = epoch("shard_map", 2)[1]["loss"]  # other masks: these did go another way
    assert (np.abs(fitting - whole[1]["loss"]) > 1e-4).any()


OBJECTIVES = {
    "bce": Objective(),
    "gbce": Objective(negatives=3, calibration=0.75),
    "sampled": Objective("softmax", 8),
}


@pytest.mark.parametrize(("name", "lazy"), [("bce", False), ("gbce", False), ("sampled", True)])
def test_a_table_cut_by_rows_learns_as_the_whole_one(epoch, name, lazy):
    options = {"objective": OBJECTIVES[name], "lazy": lazy, "l2_emb": 0.0, "tiers": TIERS if lazy else ()}
    assert_close(epoch("shard_map", 4, shards=2, **options), epoch("shard_map", 1, **options))


def test_all_items_need_the_whole_table_on_each_device(epoch):
    options = {"objective": Objective("softmax", 0), "l2_emb": 0.0, "tiers": ()}
    assert_close(epoch("pmap", 2, **options), epoch("shard_map", 1, **options))
    for wrong in ({"shards": 2}, {"lazy": True}):
        with pytest.raises(UserError, match="reads all of E"):
            epoch("shard_map", 2, **options, **wrong)
    for devices, shards in ((6, 3), (5, 2)):  # no power of two; not a divisor of the devices
        with pytest.raises(UserError, match=f"devices.items is {shards}"):
            epoch("shard_map", devices, shards=shards, tiers=(), l2_emb=0.0)


def test_each_device_holds_its_own_rows_of_a_table_cut_by_rows(tmp_path):
    dataset = tiny.dataset(tmp_path / "tiny")
    c = sasrec.SASRecConfig(dataset.n_items, width=8, blocks=1, maxlen=10)
    optimiser = optax.adam(1e-3)
    made = cf.make_epoch(c, optimiser, on(8), batch=16, steps=1, lazy=True, shards=4)
    state, _ = made(cf.initial_state(jax.random.key(0), c, optimiser), cf.training_data(dataset), jax.random.key(1))
    adam = state.opt_state[0]
    for E in (state.params["E"], adam.mu["E"], adam.nu["E"]):
        assert {shard.data.shape for shard in E.addressable_shards} == {(E.shape[0] // 4, 8)}
    assert len({shard.data.shape for shard in state.params["positions"].addressable_shards}) == 1


def test_lazy_updates_are_dense_ones_where_nothing_moves_by_itself(epoch):
    """Plain SGD leaves rows without gradient alone: moving only the rows looked up is then the same."""
    options = {"optimiser": optax.sgd(0.5), "l2_emb": 0.0, "tiers": ()}
    assert_close(epoch("shard_map", 1, lazy=True, **options), epoch("shard_map", 1, lazy=False, **options))


def test_lazy_adam_moves_the_rows_looked_up_alone(epoch):
    options = {"optimiser": optax.adam(1e-2), "l2_emb": 0.0, "tiers": ()}
    state, _ = epoch("shard_map", 1, lazy=True, **options)
    dense, _ = epoch("shard_map", 1, lazy=False, **options)
    start = cf.initial_state(jax.random.key(0), sasrec.SASRecConfig(tiny.N_ITEMS, 8, 1, maxlen=10), optax.adam(1e-2))
    moved = (np.asarray(start.params["E"]) != state.params["E"]).any(1)
    assert moved[1 : tiny.N_ITEMS + 1].sum() > 20
    assert not moved[0]
    assert not moved[tiny.N_ITEMS + 1 :].any()
    np.testing.assert_array_equal(moved, (state.opt_state[0].nu["E"] > 0).any(1))
    assert np.abs(state.params["E"] - dense.params["E"]).max() < 0.1  # the same direction, not the same steps


@pytest.fixture(scope="module")
def align_step_of():
    """`align_step_of(how, devices)`: the state and losses after a step of stage 1, the last three rows not real."""
    encoder, model = tiny.encoder(), tiny.cf_model()
    trained = {
        "f_I": params.init(jax.random.key(0), alignment.describe(model.config.width, 6)),
        "f_T": params.init(jax.random.key(1), alignment.describe(encoder.config.hidden_size, 6)),
        "encoder": encoder.weights,
    }
    optimiser = optax.sgd(0.1)
    random = np.random.default_rng(0)
    n, lengths = tiny.N_ITEMS + 1, random.integers(3, 17, tiny.N_ITEMS + 1)
    data = {
        "tokens": random.integers(2, 280, (n, 16)).astype(np.int32),
        "lengths": lengths,
        "x_u": random.normal(size=(20, model.config.width)).astype(np.float32),
        "E": model.E,
    }
    batch = {
        "who": np.arange(16),
        "positive": random.integers(1, n, 16).astype(np.int32),
        "negative": random.integers(1, n, 16).astype(np.int32),
        "real": np.arange(16) < 13,
    }
    terms = align_step.Terms({"match": 1.0, "item": 0.5, "text": 0.2, "rec": 1.0}, both=True)
    shapes = ((1, 16), (2, 40))

    def run(how: str, devices: int, **changes):
        step = align_step.make_step(encoder.graph, optimiser, on(devices), terms=terms, shapes=shapes, how=how)
        state = jax.tree.map(jnp.array, create(trained, optimiser))  # a copy: the step takes its buffers
        used = batch | changes
        used, _ = with_texts(used, lengths, shapes, both=True, devices=devices)
        return jax.device_get(step(state, data, used, jax.random.key(3)))

    run.batch = batch
    return run


@pytest.fixture(scope="module")
def one_device_align(align_step_of):
    return align_step_of("shard_map", 1)


@pytest.mark.parametrize(("how", "devices"), WAYS)
def test_a_step_of_stage_1(align_step_of, one_device_align, how, devices):
    assert_close(align_step_of(how, devices), one_device_align)


def test_rows_that_fill_up_a_batch_of_stage_1_change_nothing(align_step_of, one_device_align):
    changes = {name: align_step_of.batch[name].copy() for name in ("who", "positive", "negative")}
    for value in changes.values():
        value[13:] = 7
    jax.tree.map(np.testing.assert_array_equal, align_step_of("shard_map", 1, **changes), one_device_align)


def test_every_batch_size_finds_devices_that_divide_it():
    assert [len(mesh.data_devices(batch)) for batch in (1, 2, 4, 6, 7, 8, 12, 20, 32)] == [1, 2, 4, 6, 7, 8, 6, 5, 8]
    assert mesh.data_devices(6, jax.devices()[2:6]) == jax.devices()[2:5]
    assert [len(mesh.data_devices(batch, None, 2)) for batch in (8, 12, 20, 7)] == [8, 6, 4, 1]


def test_meshes_that_the_devices_cannot_make_are_refused():
    assert dict(mesh.make_mesh(2, 4).shape) == {"data": 2, "model": 4}
    assert dict(mesh.make_mesh(model=2).shape) == {"data": 4, "model": 2}
    assert dict(mesh.make_mesh(model=3).shape) == {"data": 2, "model": 3}
    assert dict(mesh.make_mesh(devices=jax.devices()[:1]).shape) == {"data": 1, "model": 1}
    for arguments in ({"data": 3, "model": 3}, {"model": 9}, {"data": 0}, {"model": 0}, {"model": -1}):
        with pytest.raises(UserError, match="devices"):
            mesh.make_mesh(**arguments)
