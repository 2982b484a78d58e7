"""Every collaborative filtering model on odd data, and models that come from a file."""

import dataclasses
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console

from allmrec_jax.config import CF, Experiment, check
from allmrec_jax.config import Data as DataConfig
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import cf as evaluation
from allmrec_jax.pipeline import Pipeline
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


def example() -> str:
    """The model of one's own that the docs show."""
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    return text.partition("```python\n")[2].partition("```")[0]


def pipeline(tmp_path: Path, **changes) -> Pipeline:
    """An experiment on tiny data in `tmp_path / "run"`, stage 0 on one device."""
    if not (tmp_path / "d").exists():
        tiny.dataset(tmp_path / "d")
    config = dataclasses.replace(SMALL, maxlen=10, batch=1, **changes)
    experiment = check(Experiment(data=DataConfig(name=str(tmp_path / "d")), cf=config))
    return Pipeline(experiment, tmp_path / "run", console=Console(quiet=True))


def test_the_model_that_the_docs_show_is_trained_and_evaluated(tmp_path):
    path = tmp_path / "fading.py"
    path.write_text(example())
    run = pipeline(tmp_path, model=str(path))
    model = run.cf
    assert cf.name_of(run.experiment.cf) == "fading"
    window = np.zeros((1, 10), np.int32)
    window[0, -2:] = 3, 7
    E, W, b = (np.asarray(model.params[name]) for name in ("E", "W", "b"))
    assert np.abs(b).max() > 0  # learnt
    np.testing.assert_allclose(model.x_u(window)[0], (E[7] + 0.8 * E[3]) @ W + b, rtol=1e-4, atol=1e-6)
    assert 0 <= evaluation.figures(model, run.dataset, seed=0)["full"]["hit@10"]["value"] <= 1


@pytest.mark.parametrize("kind", ["model", "given"])
def test_the_work_directory_keeps_the_users_file_and_refuses_another(kind, tmp_path, monkeypatch):
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    other.mkdir()
    name = {"model": "mine.py", "given": "mine.npz"}[kind]
    changes = {"model": {"model": name}, "given": {"model": "given", "file": name}}[kind]

    def write(number: float) -> None:
        if kind == "model":
            (home / name).write_text(example().replace("0.8", str(number)))
        else:
            np.savez(home / name, E=np.full((40, 8), number))

    write(0.5)
    monkeypatch.chdir(home)
    first = np.asarray(pipeline(tmp_path, **changes).cf.E)
    write(0.25)
    with pytest.raises(UserError, match=rf"run.cf was made with cf\.sha256\.{name}='\w+', but now it is '\w+'; choose"):
        pipeline(tmp_path, **changes).cf  # noqa: B018
    monkeypatch.chdir(other)  # where no such file is
    np.testing.assert_array_equal(pipeline(tmp_path, **changes).cf.E, first)
    write(0.5)
    elsewhere = {field: str(home / value) if value == name else value for field, value in changes.items()}
    np.testing.assert_array_equal(pipeline(tmp_path, **elsewhere).cf.E, first)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("from dataclasses", "1 / 0\nfrom dataclasses", "the file fails: ZeroDivisionError"),
        ("def describe", "def describes", "mine.py defines no describe"),
        ("(frozen=True)", "", r"Config must be a class with @dataclass\(frozen=True\)"),
        ("def describe", "from allmrec_jax.models.ncf import NCFConfig as Config\ndef describe", "a class of its own"),
        ("n_items: int", "depth: int\n    n_items: int", "nothing fills Config.depth"),
        ("    maxlen: int\n", "", "Config has no field maxlen"),
        ('"E":', '"F":', 'gives no "E"'),
        ("c.n_items,", "c.n_items - 1,", r"E, the table of items, is \(40, 8\), but must be \(41, 8\)"),
        ('"b": Parameter', '"P": Parameter', r"P, the table of users, is \(8,\), but must be \(31, 8\)"),
        ("constant(0.0)", "lambda key, shape: jnp.zeros(3)", r"the initial b is \(3,\), but must be \(8,\)"),
        ("    }\n", '        "c": 3,\n    }\n', "a dict of Parameter, but c is int"),
        (", dropout_keys=None, pads=None, rows=None, users=None", "", "takes 3 positional arguments"),
        (" if rows is None else rows", "", "params without E, rows instead.* fails: KeyError: 'E'"),
        ("    return jnp", "    return rows[:, -1]\n    return jnp", r"is \(7, 8\), but must be \(7, 10, 8\)"),
        ("    return jnp", "    return rows.astype(int)\n    return jnp", "is int32, but must be floats"),
        (
            "def features",
            "def score(params, c, f, rows):\n    return f * rows\n\ndef features",
            r"score.* is \(7, 4, 8\)",
        ),
    ],
)
def test_a_mistake_in_ones_own_model_is_one_line_and_leaves_nothing(old, new, message, tmp_path):
    path = tmp_path / "mine.py"
    assert old in example()
    path.write_text(example().replace(old, new))
    with pytest.raises(UserError, match=message) as caught:
        pipeline(tmp_path, model=str(path)).cf  # noqa: B018
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_config_may_know_the_number_of_users(tmp_path):
    """Only a table of users, P, makes a model of users."""
    path = tmp_path / "mine.py"
    path.write_text(example().replace("n_items: int", "n_items: int\n    n_users: int"))
    model = pipeline(tmp_path, model=str(path)).cf
    assert model.config.n_users == 30
    assert np.abs(model.x_u(np.arange(20, dtype=np.int32).reshape(2, 10), np.array([1, 2]))).max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no.py"}, "there is no model 'no.py'; choose sasrec"),
        ({"model": "sasrek"}, "there is no model 'sasrek'; choose sasrec"),
        ({"model": "given", "file": "no.npz"}, "there is no file no.npz"),
        ({"model": "ncf", "loss": "softmax", "negatives": 0}, "a model whose score"),
    ],
)
def test_a_start_that_fails_leaves_the_work_directory_free(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        pipeline(tmp_path, **changes).cf  # noqa: B018
    assert not (tmp_path / "run").exists()


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
        ({"E": np.zeros((3, 5))}, r"E has the shape \(3, 5\), but the data set has 40 items: \(40, 5\) or \(41, 5\)$"),
        ({"E": np.zeros((40, 5), int)}, "E holds int64, but must hold float32"),
        ({"E": np.full((40, 5), np.nan)}, "not finite"),
        ({"E": np.full((40, 5), 1e39)}, "not finite"),
        ({"E": np.float64(3)}, "E has the shape"),
        ({"E": np.zeros((40, 0))}, "E has the shape"),
        ({"P": np.zeros((30, 4))}, "30 users and E is 5 wide"),
        ({"A": np.zeros((4, 5))}, r"A has the shape \(4, 5\), but E is 5 wide: \(5, 5\) or \(6, 5\)$"),
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
