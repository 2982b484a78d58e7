"""Tables of one's own: what is read, what is left out and counted, and what is refused with its line."""

import gzip
import tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from raw_files import block_of, keys_of, pairs, write_lines

from allmrec_jax.cli import main
from allmrec_jax.data import lines, tables
from allmrec_jax.data.prepare import Files, prepare
from allmrec_jax.data.public_files import sequence_text
from allmrec_jax.data.raw import Skipped
from allmrec_jax.errors import UserError

ROWS = [("ann", "pen", 4.0, 30), ("bob", "ink", 2.0, 5), ("ann", "ink", 5.0, 10), ("bob", "pen", 1.0, 7)]
SORTED = {"ann": ["ink", "pen"], "bob": ["ink", "pen"]}


def write_table(folder: Path, kind: str) -> Path:
    frame = pl.DataFrame(ROWS, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    path = folder / f"mine.{kind}"
    if kind.startswith("csv"):
        content = frame.write_csv(quote_style="always").encode()
    elif kind.startswith("tsv"):
        content = frame.write_csv(separator="\t").encode()
    elif kind.startswith("jsonl"):
        content = frame.write_ndjson().encode()
    elif kind.startswith("parquet"):
        frame.write_parquet(path)
        return path
    else:
        content = b"ann ink pen\nbob  ink\n\nbob\tpen\n"
    path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    return path


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "jsonl", "jsonl.gz", "parquet", "txt", "txt.gz"])
def test_tables_of_every_kind(kind, tmp_path):
    path = write_table(tmp_path, kind)
    items = tmp_path / "items.csv"
    items.write_text('item_id,title,genres\npen,"A ""pen"",\nblue",Tools|Office\nink,Ink,\nrope,Rope,\n')
    data = prepare(Files(interactions=path, items=items), tmp_path / "out", k_core=1)
    assert keys_of(data) == SORTED
    assert {key: data.titles()[i] for i, key in enumerate(data.item_keys) if i} == {
        "pen": 'A "pen", blue',
        "ink": "Ink",
    }
    assert data.categories()[data.item_keys.index("pen")] == ["Tools", "Office"]
    assert (data.times is None) == kind.startswith("txt")
    if data.ratings is not None:
        assert data.ratings.tolist() == [5.0, 4.0, 2.0, 1.0]


def test_quoted_values_may_go_over_several_lines_of_a_sound_file(tmp_path):
    (tmp_path / "m.csv").write_text('user,item,note\na,x,"two\nlines"\nb,x,\n')
    raw = tables.read(tmp_path / "m.csv", None, Skipped())
    assert pairs(raw.interactions) == [("a", "x", None, None), ("b", "x", None, None)]


def test_columns_may_be_called_anything(tmp_path, capsys):
    (tmp_path / "m.csv").write_text("who,what\na,x\na,y\n")
    with pytest.raises(UserError, match=r"has no column for the user; it has who, what: say --columns user=ITS_NAME"):
        tables.read(tmp_path / "m.csv", None, Skipped())
    with pytest.raises(UserError, match="did you mean user"):
        tables.read(tmp_path / "m.csv", None, Skipped(), columns={"users": "who"})
    with pytest.raises(UserError, match="there is no column 'when'"):
        tables.read(tmp_path / "m.csv", None, Skipped(), columns={"user": "who", "item": "what", "time": "when"})
    out = ["--recipe", "as-is", "--out", str(tmp_path / "out")]
    columns = ["--columns", "user=who", "item=what"]
    assert main(["data", "prepare", "--interactions", str(tmp_path / "m.csv"), *columns, *out]) == 0
    assert "2 / 2" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("m.csv", "user,item,time\na,x,1\na,y\nb,x,3\n", "line 3: it has 2 fields instead of 3"),
        ("m.csv", "user,item,note\na,x,n\n,x\nb,y\n", "line 3: the user is empty"),
        ("m.csv", "user,item,time\na,x,1\na,y,2,9\nb,x,3\n", "line 3: it has 4 fields instead of 3"),
        (
            "m.csv",
            "user,item,time\na,x,1\na,y,soon\nb,x,3\n",
            "line 3: 'soon' is not a valid time (whole seconds or finer since 1970)",
        ),
        ("m.csv", "user,item,time\na,x,1\n,y,2\nb,x,3\n", "line 3: the user is empty"),
        ("m.tsv", "user\titem\trating\na\tx\t1\na\ty\tnan\nb\tx\t3\n", "line 3: 'nan' is not a valid rating"),
        ("m.txt", "a x\nlonely\nb x\n", "line 2: it has a user and no item"),
        (
            "m.jsonl",
            '{"user": "a", "item": "x"}\n{"user": "b"}\n{"user": "b", "item": "x"}\n',
            'line 2: it has no "item"',
        ),
    ],
)
def test_unusable_rows_of_tables(name, content, problem, tmp_path):
    (tmp_path / name).write_text(content)
    data = prepare(Files(interactions=tmp_path / name), tmp_path / "out", recipe="as-is")
    assert (data.n_interactions, data.manifest["rows"]["read"]) == (2, 3)
    assert data.manifest["unusable_lines"] == [f"{name} {problem}"]


def test_unusable_rows_of_parquet_are_counted(tmp_path):
    frame = pl.DataFrame({"user": ["a", None, "b"], "item": [1, 2, 2**33], "time": [1.0, 2.0, float("nan")]})
    frame.write_parquet(tmp_path / "m.parquet")
    raw = tables.read(tmp_path / "m.parquet", None, Skipped())
    assert pairs(raw.interactions) == [("a", "1", None, 1)]
    assert raw.skipped.examples == [
        "m.parquet row 2: None is not a valid user",
        "m.parquet row 3: nan is not a valid time (whole seconds or finer since 1970)",
    ]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("m.xls", b"x", "none of .csv"),
        ("m.csv", b"", "is empty"),
        ("m.csv", b"user,item\n", "holds no interactions"),
        ("m.csv", b"user,item\na,\n", "holds no interactions; the first unusable: m.csv line 2: the item is empty"),
        ("m.csv", b"user,item\ra,x\rb,y\r", "line 1: it is no delimited line"),
        ("m.csv", b'user,item,note\na,x,"two\nlines"\n,,\n', "line 2: a quoted value goes over several lines"),
        ("m.parquet", b"PAR1", "not a sound Parquet file"),
        ("m.txt", b"a \xff\n", "line 1: it is not UTF-8 text"),
        ("m.jsonl", b"{\n", "does not begin with JSON objects"),
    ],
)
def test_files_that_are_no_tables(name, content, problem, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        tables.read(tmp_path / name, None, Skipped())


def test_ratings_may_be_missing_here_and_there_and_keys_may_come_late(tmp_path):
    (tmp_path / "m.csv").write_text("user,item,rating\na,x,4\na,y,\nb,x,2\n")
    data = prepare(Files(interactions=tmp_path / "m.csv"), tmp_path / "csv", recipe="as-is")
    np.testing.assert_array_equal(data.ratings, np.array([4, np.nan, 2], np.float32))
    data.verify()
    rows = [{"user": "a", "item": "x", "time": 3}, {"user": "a", "item": "y", "time": 1, "rating": 5}]
    write_lines(tmp_path / "m.jsonl", rows, compress=False)
    items = write_lines(tmp_path / "i.jsonl", [{"item": "x"}, {"item": "y", "title": "Y"}], compress=False)
    data = prepare(Files(interactions=tmp_path / "m.jsonl", items=items), tmp_path / "json", recipe="as-is")
    assert keys_of(data) == {"a": ["y", "x"]}
    np.testing.assert_array_equal(data.ratings, np.array([5, np.nan], np.float32))
    assert data.titles() == [None, None, "Y"]


def test_one_broken_line_of_an_item_table_is_left_out_and_counted(tmp_path):
    (tmp_path / "m.txt").write_text("a x y\n")
    items = write_lines(tmp_path / "i.jsonl", [{"item": "x", "title": "X"}, "{broken"], compress=False)
    data = prepare(Files(interactions=tmp_path / "m.txt", items=items), tmp_path / "out", recipe="as-is")
    assert data.titles() == [None, "X", None]
    assert data.manifest["texts"]["unusable_lines"] == 1
    assert data.manifest["unusable_lines"][0].startswith("i.jsonl line 2: it is not JSON")


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"title": "nmae"}, r"there is no column 'nmae' \(title\) in m.csv or i.csv"),
        ({"user": "item"}, "its column 'item' cannot be both user and item"),
    ],
)
def test_columns_that_are_nowhere_or_taken(columns, problem, tmp_path):
    (tmp_path / "m.csv").write_text("user,item\na,x\n")
    (tmp_path / "i.csv").write_text("item,name\nx,X\n")
    with pytest.raises(UserError, match=problem):
        tables.read(tmp_path / "m.csv", tmp_path / "i.csv", Skipped(), columns=columns)


def test_one_name_may_be_of_one_file_alone(tmp_path):
    (tmp_path / "m.csv").write_text("who,product\na,x\n")
    (tmp_path / "i.csv").write_text("id,name\nx,X\n")
    raw = tables.read(tmp_path / "m.csv", tmp_path / "i.csv", Skipped(), columns={"user": "who", "item": "product"})
    assert raw.items(pl.Series(["x"]))["title"].to_list() == ["X"]


@pytest.mark.parametrize("units", [1, 10**3, 10**6, 10**9])
def test_times_of_any_fineness_become_seconds(units, tmp_path):
    times = [1_500_000_000 * units, 1_500_000_001 * units]
    pl.DataFrame({"user": ["a", "a"], "item": ["x", "y"], "time": times}).write_parquet(tmp_path / "m[1].parquet")
    data = prepare(Files(interactions=tmp_path / "m[1].parquet"), tmp_path / "out[1]", recipe="as-is")
    assert data.times.tolist() == [1_500_000_000, 1_500_000_001]
    assert data.item_keys == ["", "x", "y"]


@pytest.mark.parametrize("kind", [pl.Duration("ms"), pl.List(pl.Int64)])
def test_parquet_columns_of_kinds_that_cannot_be_used(kind, tmp_path):
    frame = pl.DataFrame({"user": ["a"], "item": ["x"], "time": pl.Series([None], dtype=kind)})
    frame.write_parquet(tmp_path / "m.parquet")
    with pytest.raises(UserError, match=r"columns of kinds that cannot be used|is not a valid time|no interactions"):
        tables.read(tmp_path / "m.parquet", None, Skipped())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"seed": -1}, "must be at least 0"),
        ({"min_positive_rating": float("nan")}, "it must be a number"),
        ({"name": "../up"}, "cannot be the name"),
        ({"name": "a/b"}, "cannot be the name"),
    ],
)
def test_settings_that_cannot_be(options, problem, tmp_path):
    (tmp_path / "m.txt").write_text("a x\n")
    with pytest.raises(UserError, match=problem):
        prepare(Files(interactions=tmp_path / "m.txt"), tmp_path / "out", **options)


def test_other_columns_are_another_request(tmp_path):
    (tmp_path / "m.csv").write_text("user,buyer,item\na,b,x\n")
    files = {"interactions": tmp_path / "m.csv"}
    prepare(Files(**files), tmp_path / "out", recipe="as-is")
    with pytest.raises(UserError, match="prepared with columns=None"):
        prepare(Files(**files, columns={"user": "buyer"}), tmp_path / "out", recipe="as-is")


def test_names_with_brackets_are_shown_as_they_are(tmp_path, capsys):
    (tmp_path / "m.txt").write_text("a x y z\n")
    arguments = [
        "data",
        "prepare",
        "--interactions",
        str(tmp_path / "m.txt"),
        "--recipe",
        "as-is",
        "--as",
        "x[bold] [old]",
    ]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "x[bold] [old]" in capsys.readouterr().out


def test_as_is_keeps_rows_texts_and_numbers(tmp_path):
    (tmp_path / "m.txt").write_text("2 3 1\n1 2 2 3\n")
    write_lines(tmp_path / "i.jsonl", [{"id": 2, "title": "<b>Two</b>"}], compress=False)
    data = prepare(Files(interactions=tmp_path / "m.txt", items=tmp_path / "i.jsonl"), tmp_path / "out", recipe="as-is")
    assert sequence_text(data) == "1 2\n1 2\n1 3\n2 3\n2 1\n"
    assert data.titles() == [None, None, "<b>Two</b>", None]
    assert data.user_keys == ["", "1", "2"]


def test_memory_does_not_grow_with_the_texts_of_a_file(tmp_path):
    """Ten times the review text, the same rows: nothing of it is kept."""

    def peak(words: int) -> int:
        rows = [{**entry, "reviewText": "word " * words} for entry in block_of(40)]
        path = write_lines(tmp_path / f"{words}.json.gz", rows)
        tracemalloc.start()
        for block in lines.blocks(path, 1 << 16):
            assert len(block.data) < 1 << 18
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(2000) < 3 * peak(200) + (1 << 20)
