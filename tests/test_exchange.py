"""A prepared data set as TensorFlow Datasets: there and back, and for people who have TFDS alone."""

import subprocess
import sys

import numpy as np
import pytest

from allmrec_jax.cli import main
from allmrec_jax.data.builder import read_tfds, write_tfds
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.data.prepare import prepare
from allmrec_jax.data.writer import write_dataset
from allmrec_jax.errors import UserError


def make(path, **changed) -> Dataset:
    fields = {
        "name": "tiny",
        "items": np.array([3, 1, 2, 2, 1]),
        "offsets": np.array([0, 0, 3, 5]),
        "times": np.array([1, 2, 3, 2**40, 2**41]),
        "ratings": np.array([1, 2.5, 3, 4, 5]),
        "user_keys": ["ann", "bób"],
        "item_keys": ["x", "y", "z"],
        "titles": ["Ünï", None, ""],
        "descriptions": [None, "D", ""],
        "categories": [["a", "b"], [], ["ç"]],
        "brands": [None, "B", None],
        "cold_items": np.array([[1, 2, 2]]),
        "cold_keys": ["cold"],
        "seed": 3,
        "manifest": {"rows": {"read": 5, "dropped": [], "kept": 5}, "settings": {"recipe": "as-is"}},
    }
    return write_dataset(path, **{**fields, **changed})


@pytest.mark.parametrize(
    "changed",
    [{}, {"times": None, "ratings": None}, {"cold_items": None, "cold_keys": []}],
    ids=["all", "bare", "core"],
)
def test_there_and_back_nothing_changes(changed, tmp_path):
    data = make(tmp_path / "d", **changed)
    write_tfds(data, tmp_path / "tfds")
    back = read_tfds(tmp_path / "tfds", tmp_path / "back")
    assert back.fingerprint == data.fingerprint
    back.verify()
    files = sorted(path.relative_to(data.path) for path in data.path.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(back.path) for path in back.path.rglob("*") if path.is_file())
    assert all((data.path / file).read_bytes() == (back.path / file).read_bytes() for file in files)


def test_somebody_with_tfds_alone_can_read_it(tmp_path):
    write_tfds(make(tmp_path / "d"), tmp_path / "tfds")
    code = f"""
import sys, tensorflow_datasets as tfds
users = tfds.builder_from_directory(r"{tmp_path}/tfds/allmrec_users/tiny/1.0.0")
source = users.as_data_source("users")
row = source[1]
print(len(source), row["id"], row["key"] == "bób".encode())
print(list(map(int, row["items"])), list(map(int, row["times"])))
items = tfds.builder_from_directory(r"{tmp_path}/tfds/allmrec_items/tiny/1.0.0").as_data_source("items")
print(items[1]["description"], list(items[1]["missing"]), list(items[0]["categories"]))
print([name for name in sys.modules if name in ("tensorflow", "allmrec_jax")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "2 2 True",
        "[2, 1] [1099511627776, 2199023255552]",
        "b'D' [b'title'] [b'a', b'b']",
        "[]",
    ], done.stderr


def test_several_data_sets_in_one_folder_and_damage(tmp_path, capsys):
    write_tfds(make(tmp_path / "a"), tmp_path / "tfds")
    write_tfds(make(tmp_path / "b", name="other"), tmp_path / "tfds")
    with pytest.raises(UserError, match="already"):
        write_tfds(make(tmp_path / "c"), tmp_path / "tfds")
    assert main(["data", "prepare", "--tfds", str(tmp_path / "tfds"), "--out", str(tmp_path / "x")]) == 1
    assert "several data sets (other, tiny): say --as NAME" in capsys.readouterr().err
    arguments = ["data", "prepare", "--tfds", str(tmp_path / "tfds"), "--as", "other", "--out", str(tmp_path / "x")]
    assert main(arguments) == 0
    with pytest.raises(UserError, match="holds no data set of allmrec"):
        read_tfds(tmp_path / "nowhere", tmp_path / "y")
    (records,) = (tmp_path / "tfds" / "allmrec_users" / "tiny").rglob("*users-users.array_record*")
    records.write_bytes(records.read_bytes()[:100])
    with pytest.raises(UserError, match="holds no sound data set 'tiny'"):
        read_tfds(tmp_path / "tfds", tmp_path / "y", name="tiny")
    assert not (tmp_path / "y").exists()


def test_an_altered_copy_is_refused(tmp_path):
    write_tfds(make(tmp_path / "a"), tmp_path / "one")
    write_tfds(make(tmp_path / "b", user_keys=["ann", "eve"]), tmp_path / "two")
    for part in ("allmrec_users",):
        (old,) = (tmp_path / "one" / part).rglob("*users-users.array_record*")
        (new,) = (tmp_path / "two" / part).rglob("*users-users.array_record*")
        old.write_bytes(new.read_bytes())
    with pytest.raises(UserError, match="was altered"):
        read_tfds(tmp_path / "one", tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_the_real_movielens_there_and_back(test_data, tmp_path):
    data = prepare(str(test_data("ml-100k")), tmp_path / "d")
    write_tfds(data, tmp_path / "tfds")
    assert read_tfds(tmp_path / "tfds", tmp_path / "back").fingerprint == data.fingerprint
