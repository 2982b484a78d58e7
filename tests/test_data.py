"""From raw MovieLens files to the prepared data set: no row lost or invented, no leak, damage named by line."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from allmrec_jax.data import dataset as dataset_module
from allmrec_jax.data import movielens, sources, writer
from allmrec_jax.data.dataset import Dataset, open_dataset
from allmrec_jax.data.describe import describe, summary
from allmrec_jax.data.places import Archive
from allmrec_jax.data.prepare import prepare
from allmrec_jax.data.writer import write_dataset
from allmrec_jax.errors import UserError

TITLES = {
    1: "Toy Story (1995)",
    2: "unknown",
    3: "Caf\xe9 &amp; Sons (1999) ",
    4: '<span class="a-size',
    5: "Rare (2001)",
}
FLAGS = {1: ("Animation", "Comedy"), 2: ("unknown",), 3: ("Drama",), 4: (), 5: ("War",)}

# user, item, rating, time; in no order, as in the real file
ROWS = [
    (7, 3, 4, 30),
    (9, 1, 2, 5),
    (7, 1, 5, 10),
    (7, 2, 3, 20),
    (9, 2, 4, 5),
    (9, 4, 1, 5),
    (9, 3, 5, 4),
    (8, 1, 3, 1),
    (7, 4, 5, 30),
    (8, 2, 3, 2),
    (7, 1, 5, 10),  # an exact repeat
    (7, 3, 2, 40),  # the same item again, later
    (8, 5, 3, 3),  # an item of one interaction
]


def write_original(folder: Path, rows=ROWS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    lines = []
    for item, title in TITLES.items():
        flags = ["1" if genre in FLAGS[item] else "0" for genre in movielens.GENRES]
        lines.append("|".join([str(item), title, "01-Jan-1995", "", "http://x", *flags]))
    (folder / "u.item").write_bytes("\n".join([*lines, ""]).encode("latin-1"))
    return folder


def write_parquet(folder: Path, rows=ROWS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data, items = movielens.PARQUET
    frame = pl.DataFrame(rows, schema=["user_id", "movie_id", "rating", "timestamp"], orient="row")
    frame.write_parquet(folder / data)
    table = {"movie_id": list(TITLES), "movie_title": list(TITLES.values())}
    table |= {genre: [int(genre in FLAGS[item]) for item in TITLES] for genre in movielens.GENRES}
    pl.DataFrame(table).write_parquet(folder / items)
    return folder


def tiny(folder: Path, **options) -> Dataset:
    """The tiny data set, prepared in `folder / "out"`."""
    return prepare(str(write_original(folder / "raw")), folder / "out", **{"k_core": 2, **options})


def of_user(data: Dataset, key: str) -> list[str]:
    user = data.user_keys.index(key)
    return [data.item_keys[item] for item in data.items[data.offsets[user] : data.offsets[user + 1]]]


def from_lengths(path: Path, lengths: list[int], n_items: int = 50) -> Dataset:
    """A data set of random items with sequences of these lengths."""
    offsets = np.concatenate([[0, 0], np.cumsum(lengths)])
    return write_dataset(
        path,
        name="random",
        items=np.random.default_rng(0).integers(1, n_items + 1, offsets[-1]),
        offsets=offsets,
        times=None,
        ratings=None,
        user_keys=[f"u{user}" for user in range(1, len(lengths) + 1)],
        item_keys=[f"i{item}" for item in range(1, n_items + 1)],
        titles=[f"Title {item}" for item in range(1, n_items + 1)],
        descriptions=[None] * n_items,
        categories=[[]] * n_items,
    )


# ------------------------------------------------------------------------------------------------- prepared data


def test_order_ids_and_duplicates(tmp_path):
    data = tiny(tmp_path)
    # Time order; equal times as in the file: 3 before 4 for user 7 (time 30), 1 2 4 for user 9 (time 5).
    assert of_user(data, "7") == ["1", "2", "3", "4", "3"]
    assert of_user(data, "9") == ["3", "1", "2", "4"]
    assert of_user(data, "8") == ["1", "2"]
    # Ids by first appearance among the rows that stay.
    assert data.user_keys == ["", "7", "9", "8"]
    assert data.item_keys == ["", "3", "1", "2", "4"]
    assert (data.items.dtype, data.offsets.dtype) == (np.int32, np.int64)
    assert data.times[data.offsets[1] : data.offsets[2]].tolist() == [10, 20, 30, 30, 40]
    assert data.ratings[data.offsets[1] : data.offsets[2]].tolist() == [5, 3, 4, 5, 2]


def test_texts(tmp_path):
    data = tiny(tmp_path, strip_years=True)
    assert data.titles() == [None, "Café & Sons", "Toy Story", None, None]  # 3, 1, "unknown", scrape junk
    assert data.descriptions() == [None, "Drama", "Animation, Comedy", None, None]
    assert data.categories() == [[], ["Drama"], ["Animation", "Comedy"], [], []]
    assert data.manifest["texts"] == {
        "without_title": 2,
        "junk_titles": 1,
        "without_description": 2,
        "without_row": 0,
        "repeated_rows": 0,
        "unusable_lines": 0,
    }


def test_reference_recipe_leaves_rows_and_texts_as_they_are(tmp_path):
    rows = [(user, item, 5, time) for time, user in enumerate(range(1, 6)) for item in range(1, 6)]
    rows += [(1, 1, 5, 0), (6, 1, 5, 0)]  # an exact repeat stays; user 6 has too few
    raw = write_original(tmp_path / "raw", rows)
    data = prepare(str(raw), tmp_path / "out", recipe="reference")
    assert data.n_interactions == 26
    assert of_user(data, "1").count("1") == 2
    assert data.titles()[data.item_keys.index("3")] == "Caf\xe9 &amp; Sons (1999) "
    with pytest.raises(UserError, match="belongs to the clean recipe"):
        prepare(str(raw), tmp_path / "other", recipe="reference", min_positive_rating=4)


def test_original_and_parquet_files_give_the_same_data_set(tmp_path):
    one = prepare(str(write_original(tmp_path / "a")), tmp_path / "one", k_core=2)
    two = prepare(str(write_parquet(tmp_path / "b")), tmp_path / "two", k_core=2)
    assert one.fingerprint == two.fingerprint
    other = prepare(str(tmp_path / "a"), tmp_path / "three", k_core=2, strip_years=True)
    assert other.fingerprint != one.fingerprint
    one.verify()


def test_rows_add_up_and_describe_shows_them(tmp_path):
    data = tiny(tmp_path, min_positive_rating=2)
    rows = data.manifest["rows"]
    assert {entry["reason"]: entry["rows"] for entry in rows["dropped"]} == {
        "exact repeat of (user, item, time)": 1,
        "rating below 2": 1,
        "user with fewer than 2 interactions": 0,
        "item with fewer than 2 interactions": 2,  # item 5, and item 4 after its low rating has gone
    }
    assert rows["read"] == len(ROWS) == rows["kept"] + sum(entry["rows"] for entry in rows["dropped"])
    assert rows["kept"] == data.n_interactions
    console = Console(file=io.StringIO(), width=200)
    console.print(describe(data))
    shown = console.file.getvalue()
    assert "rating below 2" in shown
    assert "1970-01-01 to 1970-01-01" in shown


def test_summary_counts_repeats(tmp_path):
    figures = summary(tiny(tmp_path))
    assert figures["repeats"] == 1  # user 7, item 3
    assert figures["repeated_test_targets"] == 1
    assert (figures["test_users"], figures["users_with_training_only"]) == (2, 1)
    assert figures["equal_times"] == 3


def test_opening_needs_no_polars_and_reads_no_arrays(tmp_path):
    tiny(tmp_path)
    code = (
        "import sys; from allmrec_jax.data.dataset import open_dataset; import allmrec_jax.data.batches;"
        f"d = open_dataset({str(tmp_path / 'out')!r}); d.windows(d.history_end('test'), 5); d.train_counts();"
        "assert type(d.items).__name__ == 'memmap';"
        "assert not {'polars', 'torch', 'tyro', 'matplotlib', 'transformers'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------------------------------------------------------- leave-one-out


def test_splits_by_hand(tmp_path):
    data = from_lengths(tmp_path / "d", [5, 2, 3, 1])
    items, start = data.items, data.offsets
    assert data.n_train.tolist() == [0, 3, 2, 1, 1]
    assert data.has_target("test").tolist() == [False, True, False, True, False]
    assert data.has_target("train").tolist() == [False, True, True, False, False]
    assert data.targets("test").tolist() == [0, items[4], 0, items[start[4] - 1], 0]
    assert data.targets("validation").tolist() == [0, items[3], 0, items[start[4] - 2], 0]
    assert data.targets("train").tolist() == [0, items[2], items[6], 0, 0]
    assert data.history(1, "test").tolist() == items[:4].tolist()
    assert data.history(1, "validation").tolist() == items[:3].tolist()
    assert data.history(1, "train").tolist() == items[:2].tolist()
    assert data.history(2).tolist() == items[5:7].tolist()  # no targets: everything is history
    with pytest.raises(ValueError, match="split is one of"):
        data.targets("dev")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum), st.integers(1, 7))
def test_windows_equal_the_loop_and_never_leak(tmp_path_factory, lengths, length):
    data = from_lengths(tmp_path_factory.mktemp("d") / "d", lengths)
    for split in dataset_module.SPLITS:
        ends, windows = data.history_end(split), data.windows(data.history_end(split), length)
        assert windows.shape == (data.n_users + 1, length)
        assert not windows[0].any()
        for user in range(1, data.n_users + 1):
            history = data.items[data.offsets[user] : ends[user]].tolist()[-length:]
            assert windows[user].tolist() == [0] * (length - len(history)) + history
            if data.has_target(split)[user]:  # the history stops right before the target
                assert data.targets(split)[user] == data.items[ends[user]]
                assert ends[user] < data.offsets[user + 1]
    some = np.arange(data.n_users, 0, -1)
    whole = data.windows(data.history_end("test"), length)
    np.testing.assert_array_equal(data.windows(data.history_end("test")[some], length, some), whole[some])


def test_training_counts_and_distinct_items_know_nothing_of_held_out_items(tmp_path):
    data = from_lengths(tmp_path / "d", [6, 2, 3, 9], n_items=7)
    train = [data.items[data.offsets[u] : data.offsets[u] + data.n_train[u]].tolist() for u in range(1, 5)]
    counts = [sum(items.count(item) for items in train) for item in range(8)]
    assert data.train_counts().tolist() == counts
    for split, more in (("train", 0), ("validation", 1), ("test", 2)):
        flat, offsets = data.distinct(split)
        for user in range(1, 5):
            n = data.lengths[user]
            owned = data.items[data.offsets[user] :][: data.n_train[user] + (more if n >= 3 else 0)]
            assert flat[offsets[user] : offsets[user + 1]].tolist() == sorted(set(owned.tolist()))


def test_windows_refuse_users_that_do_not_go_with_the_ends(tmp_path):
    data = from_lengths(tmp_path / "d", [5, 2])
    with pytest.raises(ValueError, match="one user"):
        data.windows(np.array([3]), 4, np.array([3]))


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("7\t3\t4", "line 14: it has 3 fields instead of 4"),
        ("7\t3\tx\t1", "line 14: 'x' is not a valid rating"),
        ("7\t3\tNaN\t1", "line 14: 'NaN' is not a valid rating"),
        ("7\t3\t4\t-5", "line 14: '-5' is not a valid time"),
        ("7\t3\t4\tNaN", "line 14: 'NaN' is not a valid time"),
        ("7\t3\t4\t5\t6", "line 14: it has 5 fields"),
        ("7\t77\t4\t5", r"line 14 names item '77', which u.item does not have \(1 such rows\)"),
        ("7\t3\t4\t5\n\t3\t4\t5", "line 15: the user is empty"),
    ],
)
def test_a_damaged_interaction_file_is_named_by_line(line, complaint, tmp_path):
    raw = write_original(tmp_path / "raw")
    with open(raw / "u.data", "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=complaint):
        prepare(str(raw), tmp_path / "out", k_core=1)
    assert not (tmp_path / "out").exists()


def test_damaged_item_files(tmp_path):
    raw = write_original(tmp_path / "raw")
    whole = (raw / "u.item").read_bytes()
    for content, complaint in (
        (whole[:-8], "line 5 has 21 fields instead of 24"),
        (whole.replace(b"|1|", b"|2|", 1), "line 1 is not"),
        (whole + whole, "item '1' twice"),
        (b"", "holds no items"),
    ):
        (raw / "u.item").write_bytes(content)
        with pytest.raises(UserError, match=complaint):
            movielens.read(raw)
    (raw / "u.item").unlink()
    with pytest.raises(UserError, match=r"has no u\.item"):
        movielens.read(raw)


def test_damaged_parquet_files(tmp_path):
    raw = write_parquet(tmp_path / "raw")
    data = raw / movielens.PARQUET[0]
    whole = data.read_bytes()
    pl.read_parquet(data).drop("timestamp").write_parquet(data)
    with pytest.raises(UserError, match="has no column timestamp; it has user_id"):
        movielens.read(raw)
    data.write_bytes(whole[:-20])
    with pytest.raises(UserError, match="not a sound Parquet file"):
        movielens.read(raw)
    write_parquet(raw, [(1, 1, 5, float("nan")), (1, 2, 5, 3.0)])
    with pytest.raises(UserError, match="row 1: nan is not a valid time"):
        movielens.read(raw)
    write_parquet(raw, [(1, 1, 5, 3), (2**40, 2, 5, 3)])  # ids beyond 2^31 are names like any other
    assert movielens.read(raw).interactions["user"].cast(pl.String).to_list() == ["1", str(2**40)]


def test_empty_inputs_and_results(tmp_path):
    with pytest.raises(UserError, match=r"none of the 13 rows is left.*12: user with fewer than 50"):
        tiny(tmp_path, k_core=50)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="holds no interactions"):
        prepare(str(write_original(tmp_path / "none", [])), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("ml100k", "did you mean ml-100k"),
        ("all-minilm-l6-v2", "there is no data set called 'all-minilm-l6-v2'"),
        ("some/where", "does not exist; known data sets are ml-100k"),
        (".", "holds no data set that is known"),
    ],
)
def test_unknown_data_sets(name, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint):
        prepare(name, tmp_path / "out")


def test_a_raw_file_that_cannot_be_opened(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied", "u.item")

    monkeypatch.setattr(movielens, "_check_items_known", refuse)
    with pytest.raises(UserError, match=r"cannot read u\.item: Permission denied"):
        tiny(tmp_path)


def test_bad_settings(tmp_path):
    with pytest.raises(UserError, match="choose clean, reference, as-is"):
        tiny(tmp_path, recipe="best")
    with pytest.raises(UserError, match="at least 1"):
        tiny(tmp_path, k_core=0)


# ------------------------------------------------------------------------------------------- existing and damaged


def test_a_prepared_data_set_is_used_again_and_never_overwritten(tmp_path):
    first = tiny(tmp_path)
    stamp = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert tiny(tmp_path).fingerprint == first.fingerprint
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="prepared with k_core=2: choose another --out"):
        tiny(tmp_path, k_core=1)
    with pytest.raises(UserError, match="prepared with recipe=clean"):
        tiny(tmp_path, recipe="reference", k_core=None)
    write_original(tmp_path / "raw", ROWS[:-1])
    with pytest.raises(UserError, match="other contents"):
        prepare(str(tmp_path / "raw"), tmp_path / "out", k_core=2)
    assert open_dataset(tmp_path / "out").fingerprint == first.fingerprint


def test_a_named_data_set_prepared_before_needs_no_source(tmp_path, monkeypatch):
    write_original(tmp_path / "cache" / "tiny")
    place = Archive("nowhere", "http://127.0.0.1:9/d.zip", ("md5", ""), {"u.data": "u.data", "u.item": "u.item"})
    source = sources.Source("tiny", "data", "t", "none", "https://example.org", (place,))
    monkeypatch.setitem(sources.KNOWN, "tiny", source)
    log = Console(file=io.StringIO())
    first = prepare("tiny", tmp_path / "out", k_core=2, cache=tmp_path / "cache", console=log)
    again = prepare("tiny", tmp_path / "out", k_core=2, cache=tmp_path / "empty", console=log)
    assert (first.name, again.fingerprint) == ("tiny", first.fingerprint)


def test_something_else_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="is in use"):
        tiny(tmp_path)
    assert os.listdir(tmp_path / "out") == ["diary.txt"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write_table", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        tiny(tmp_path)
    assert os.listdir(tmp_path) == ["raw"]


def test_damaged_prepared_data_sets(tmp_path):
    with pytest.raises(UserError, match=r"does not exist.*allmrec data prepare"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a prepared data set"):
        open_dataset(tmp_path)
    data = tiny(tmp_path)
    items = tmp_path / "out" / "items.npy"
    whole = items.read_bytes()
    for content in (whole[:-4], whole[:20], b""):
        items.unlink()  # a new file: `data` still maps the old one
        items.write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged.*prepare it again"):
            open_dataset(tmp_path / "out")
    items.unlink()
    items.write_bytes(whole[:-4] + b"\1\0\0\0")
    with pytest.raises(UserError, match="was altered"):
        open_dataset(tmp_path / "out").verify()
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(json.dumps({**data.manifest, "format": 99}))
    with pytest.raises(UserError, match="has data format 99"):
        open_dataset(tmp_path / "out")


def test_arrays_that_do_not_fit_together_are_refused(tmp_path):
    good = from_lengths(tmp_path / "d", [3, 2], n_items=4)
    fields = {
        "name": "x",
        "items": np.asarray(good.items),
        "offsets": good.offsets,
        "times": None,
        "ratings": None,
        "user_keys": ["a", "b"],
        "item_keys": list("abcd"),
        "titles": [None] * 4,
        "descriptions": [None] * 4,
        "categories": [[]] * 4,
    }
    for bad in (
        {"items": np.array([1, 2, 3, 4, 5])},
        {"user_keys": ["a"]},
        {"titles": []},
        {"offsets": good.offsets[::-1]},
    ):
        with pytest.raises(ValueError, match=r"do not fit together|differ in number"):
            write_dataset(tmp_path / "bad", **{**fields, **bad})
    assert not (tmp_path / "bad").exists()


# ------------------------------------------------------------------------------------------------------ real data


def test_the_real_movielens(test_data, tmp_path):
    data = prepare(str(test_data("ml-100k")), tmp_path / "full", k_core=1)
    assert (data.n_users, data.n_items, data.n_interactions) == (943, 1682, 100_000)
    figures = summary(data)
    assert figures["repeats"] == 0
    assert figures["items_sharing_a_title"] == 18
    assert data.titles()[data.item_keys.index("267")] is None
    core = prepare(str(test_data("ml-100k")), tmp_path / "core", strip_years=True)
    assert (core.n_users, core.n_items, core.n_interactions) == (943, 1349, 99_287)
    assert core.titles()[core.item_keys.index("1")] == "Toy Story"
    assert (np.diff(core.times)[np.diff(core.users_of_items()) == 0] >= 0).all()


def test_the_real_movielens_is_the_same_from_its_named_source(test_data, weights, tmp_path):
    weights("ml-100k")  # any named source, not weights alone
    named = prepare("ml-100k", tmp_path / "named")
    files = prepare(str(test_data("ml-100k")), tmp_path / "files")
    assert named.fingerprint == files.fingerprint
