"""Every collaborative filtering model on odd data, and models that come from a file."""

import dataclasses
import pickle

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console

from allmrec_jax.config import CF, Experiment, check
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import cf as evaluation
from allmrec_jax.training import cf

TRAINED = ["sasrec", "gru4rec", "nextitnet", "ncf"]
SMALL = CF(width=8, blocks=1, maxlen=1, batch=4, epochs=1, evaluate_every=1, dropout=0.2)


def odd_dataset(path) -> Dataset:
    """Users of one item, of two, and of all six there are: fewer items than candidates."""
    sequences = [[1], [2, 3], [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [3, 3, 3], [2, 4, 6]]
    return tiny.of_sequences(path, sequences, 6)


def train(config: CF, data: Dataset, folder) -> cf.CFModel:
    return cf.train_cf(config, data, folder, seed=0, devices=jax.devices()[:1], console=Console(quiet=True))[0]


@pytest.mark.parametrize("name", TRAINED)
def test_odd_data_and_windows_of_one_item(name, tmp_path):
    data = odd_dataset(tmp_path / "data")
    model = train(dataclasses.replace(SMALL, model=name), data, tmp_path / "cf")
    empty = np.zeros((2, model.config.maxlen), np.int32)
    for users in (None, np.array([1, 7])):  # 7 is nobody
        assert np.isfinite(model.x_u(empty, users)).all()
    found = evaluation.ranks_of_held_out_items(model, data, seed=0)
    tested = data.has_target("test").sum()
    assert all(len(ranks) == tested for ranks in found.values())
    everything = (data.n_train == 6)[data.has_target("test")]
    assert (found["reference"][everything] == 0).all()
    assert (found["reference"] < 20).all()


@pytest.mark.parametrize("item", [tiny.N_ITEMS + 1, -1])
def test_an_item_beyond_the_table_is_refused(item):
    model = tiny.cf_model()
    window = np.full((1, model.config.maxlen), item, np.int32)
    with pytest.raises(UserError, match=f"item {item} is not among the model's 1 to 40"):
        model.x_u(window)
    with pytest.raises(UserError, match=f"item {item}"):
        model.scores(model.x_u(np.zeros_like(window)), window)


def test_nobody_to_train_on_is_said(tmp_path):
    data = tiny.dataset(tmp_path / "d")
    alone = dataclasses.replace(data, offsets=np.arange(31)[: data.n_users + 2].clip(1) - 1, items=data.items[:30])
    with pytest.raises(UserError, match="no user has two training items"):
        train(SMALL, alone, tmp_path / "cf")


@pytest.mark.parametrize("loss", [{"loss": "softmax", "negatives": 0}, {"loss": "softmax", "negatives": 5}])
def test_ncf_has_no_softmax(loss, tmp_path):
    with pytest.raises(UserError, match="a model whose score"):
        train(dataclasses.replace(SMALL, model="ncf", **loss), tiny.dataset(tmp_path / "d"), tmp_path / "cf")


@pytest.mark.parametrize(
    ("field", "value"), [("negatives", 0), ("calibration", 1.5), ("weight_decay", -1.0), ("model", "given")]
)
def test_senseless_values_are_named(field, value):
    with pytest.raises(UserError, match=f"cf.{field if field != 'model' else 'file'} is"):
        check(Experiment(cf=dataclasses.replace(CF(), **{field: value})))


def test_other_objectives_train_and_choose_the_best_checkpoint(tmp_path):
    data = tiny.dataset(tmp_path / "d")
    config = dataclasses.replace(tiny.STAGE_0, loss="softmax", negatives=0, weight_decay=1e-3, dropout=0.0)
    console = Console(quiet=True)
    model, curves = cf.train_cf(config, data, tmp_path / "cf", seed=0, devices=jax.devices()[:1], console=console)
    assert curves["loss"][-1][1] < curves["loss"][0][1]
    assert {"ndcg@10", "hit@10", "hit@1"} <= set(curves)
    assert model.E.shape == (data.n_items + 1, config.width)


FIFTH = """
from dataclasses import dataclass
import jax.numpy as jnp
from allmrec_jax.models.sequential import item_table, rows_of

@dataclass(frozen=True)
class Config:
    n_items: int
    width: int
    maxlen: int
    decay: float = 0.5

def describe(c):
    return {"E": item_table(c.n_items, c.width)}

def features(params, c, windows, dropout_keys=None, pads=None, rows=None, users=None):
    rows = rows_of(params["E"], windows) if rows is None else rows
    at = jnp.arange(windows.shape[1])
    weights = jnp.where(at[:, None] >= at[None], c.decay ** (at[:, None] - at[None]), 0.0)
    return jnp.einsum("ts,bsd->btd", weights, jnp.where((windows != 0)[..., None], rows, 0))
"""


def test_a_fifth_model_is_one_file(tmp_path):
    data, path = tiny.dataset(tmp_path / "d"), tmp_path / "fading.py"
    path.write_text(FIFTH)
    config = check(Experiment(cf=dataclasses.replace(SMALL, model=str(path), maxlen=10))).cf
    model = train(config, data, tmp_path / "cf")
    assert model.config.decay == 0.5
    window = np.zeros((1, 10), np.int32)
    window[0, -2:] = 3, 7
    E = np.asarray(model.E)
    np.testing.assert_allclose(model.x_u(window)[0], E[7] + E[3] / 2, rtol=1e-4, atol=1e-6)
    assert 0 <= evaluation.figures(model, data, seed=0)["full"]["hit@10"]["value"] <= 1
    assert cf.name_of(config) == "fading"
    for name, message in (
        (tmp_path / "no.py", "there is no model"),
        ("sasrek", "there is no model 'sasrek'; choose sasrec"),
    ):
        with pytest.raises(UserError, match=message):
            train(dataclasses.replace(config, model=str(name)), data, tmp_path / "cf2")
    other = tmp_path / "other.py"
    for content, message in (("1 / 0", "ZeroDivisionError"), ("Config = int", "defines no describe")):
        other.write_text(content)
        with pytest.raises(UserError, match=message):
            train(dataclasses.replace(config, model=str(other)), data, tmp_path / "cf2")


def test_training_with_a_table_cut_by_rows_goes_on_where_it_stopped(tmp_path):
    """On four devices, two of which share each copy of E."""
    data, console = tiny.dataset(tmp_path / "d"), Console(quiet=True)

    def run(epochs: int, folder: str, devices: int, shards: int) -> cf.CFModel:
        config = dataclasses.replace(tiny.STAGE_0, epochs=epochs, select="last", dropout=0.0)
        some = jax.devices()[:devices]
        return cf.train_cf(config, data, tmp_path / folder, seed=0, devices=some, shards=shards, console=console)[0]

    run(2, "stopped", 4, 2)
    resumed, whole = run(4, "stopped", 4, 2), run(4, "whole", 1, 1)
    assert resumed.E.shape == whole.E.shape == (data.n_items + 1, 8)
    windows = data.windows(data.history_end("test"), 10)
    np.testing.assert_allclose(resumed.x_u(windows), whole.x_u(windows), rtol=5e-2, atol=5e-3)  # Adam: see test_mesh


def test_a_refitted_model_learns_from_validation_items_and_is_not_validated(tmp_path):
    data, console = tiny.dataset(tmp_path / "d"), Console(quiet=True)
    one = jax.devices()[:1]
    _, curves = cf.train_cf(
        dataclasses.replace(tiny.STAGE_0, refit=True), data, tmp_path / "cf", seed=0, devices=one, console=console
    )
    assert "loss" in curves
    assert "ndcg@10" not in curves
    plain, more = (cf.training_data(data, refit) for refit in (False, True))
    ends = dict(zip(more["users"].tolist(), more["end"].tolist(), strict=True))
    for user, end in zip(plain["users"].tolist(), plain["end"].tolist(), strict=True):
        assert ends[user] == end + 1
    assert len(ends) > len(plain["users"])  # who had one training item has two


# ---------------------------------------------------------------------------------------------------------- from files


def arrays(data: Dataset, d: int = 5) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {"E": random.normal(size=(data.n_items, d)), "P": random.normal(size=(data.n_users + 1, d))}


def test_a_given_table_is_used_as_it_is(tmp_path):
    data, path = tiny.dataset(tmp_path / "d"), tmp_path / "mine.npz"
    given = arrays(data)
    np.savez(path, E=given["E"])
    config = CF(model="given", file=str(path), maxlen=10)
    model = train(config, data, tmp_path / "cf")
    np.testing.assert_allclose(model.E[1:], given["E"], rtol=1e-6)
    window = np.zeros((2, 10), np.int32)
    window[0, -2:] = 3, 7
    np.testing.assert_allclose(model.x_u(window), [model.E[[3, 7]].mean(0), np.zeros(5)], rtol=1e-5)
    scores = model.scores(model.x_u(window), np.array([[3, 9], [3, 9]]))
    np.testing.assert_allclose(scores[0], model.E[[3, 9]] @ model.E[[3, 7]].mean(0), rtol=1e-5)
    path.unlink()  # the work directory keeps a copy
    np.testing.assert_array_equal(train(config, data, tmp_path / "cf").E, model.E)
    assert 0 <= evaluation.figures(model, data, seed=0)["full"]["hit@10"]["value"] <= 1


def test_given_users_have_their_rows_and_others_a_rule(tmp_path):
    from safetensors.numpy import save_file

    data, path = tiny.dataset(tmp_path / "d"), tmp_path / "mine.safetensors"
    given = arrays(data)
    windows = data.windows(data.history_end("test"), 10)
    save_file(given, path)
    model = train(CF(model="given", file=str(path), maxlen=10), data, tmp_path / "fitted")
    np.testing.assert_allclose(model.x_u(windows, np.arange(data.n_users + 1))[1:], given["P"][1:], rtol=1e-6)
    assert np.isfinite(model.x_u(windows)).all()
    save_file(given | {"A": np.eye(5) * 2}, path)
    model = train(CF(model="given", file=str(path), maxlen=10), data, tmp_path / "told")
    window = np.array([[0] * 9 + [4]], np.int32)
    np.testing.assert_allclose(model.x_u(window)[0], 2 * model.E[4], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"E": np.zeros((3, 5))}, "E is float64 .3, 5., but the data set has 40 items"),
        ({"E": np.zeros((40, 5), int)}, "E is int64"),
        ({"E": np.full((40, 5), np.nan)}, "not finite"),
        ({"E": np.full((40, 5), 1e39)}, "not finite"),
        ({"E": np.float64(3)}, "E has the shape"),
        ({"E": np.zeros((40, 0))}, "E has the shape"),
        ({"P": np.zeros((30, 4))}, "P is float64"),
        ({"E": np.array([{"a": 1}] * 40, object)}, "cannot be read"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, message, tmp_path):
    data, path = tiny.dataset(tmp_path / "d"), tmp_path / "mine.npz"
    np.savez(path, **(arrays(data) | change))
    with pytest.raises(UserError, match=message):
        train(CF(model="given", file=str(path)), data, tmp_path / "cf")
    assert not (tmp_path / "cf" / "given.npz").exists()


def test_files_that_are_no_tables_are_refused(tmp_path):
    data, path = tiny.dataset(tmp_path / "d"), tmp_path / "mine.npz"
    path.write_bytes(pickle.dumps({"E": 1}))
    for file, message in ((path, "cannot be read"), (tmp_path / "no.npz", "there is no file")):
        with pytest.raises(UserError, match=message):
            train(CF(model="given", file=str(file)), data, tmp_path / "cf")
    np.savez(path, items=np.zeros((40, 2)))
    with pytest.raises(UserError, match="holds items, but no array E"):
        train(CF(model="given", file=str(path)), data, tmp_path / "cf")
