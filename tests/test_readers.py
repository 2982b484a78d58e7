"""Raw files of every kind: what is read, what is left out and counted, and what is refused with its line."""

import gzip
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allmrec_jax.cli import main
from allmrec_jax.data import amazon, lines, movielens, tables
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.data.prepare import Files, prepare
from allmrec_jax.data.public_files import sequence_text, text_dict, write_public
from allmrec_jax.data.raw import Skipped
from allmrec_jax.errors import UserError


def review(user: str, item: str, rating: float = 5.0, time: int = 0) -> dict:
    return {"overall": rating, "reviewerID": user, "asin": item, "reviewText": 'a "b"\n', "unixReviewTime": time}


def write_lines(path: Path, entries: list, *, compress: bool = True) -> Path:
    """Each entry a line: dicts as JSON, strings as they are."""
    text = "".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries)
    path.write_bytes(gzip.compress(text.encode()) if compress else text.encode())
    return path


def block_of(n: int = 3) -> list[dict]:
    """n users with n items each, in time order."""
    return [review(f"u{user}", f"i{item}", 5.0, 10 * item + user) for user in range(n) for item in range(n)]


def pairs(frame: pl.DataFrame) -> list[tuple]:
    return frame.with_columns(pl.col("user", "item").cast(pl.String)).rows()


# -------------------------------------------------------------------------------------------------- blocks of lines


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_blocks_hold_every_line_once_with_its_number(compress, size, tmp_path):
    text = "".join(f"line {number}\n" for number in range(1, 40)) + "\n\nlast"
    (tmp_path / "f").write_bytes(gzip.compress(text.encode()) if compress else text.encode())
    found = list(lines.blocks(tmp_path / "f", size))
    assert b"".join(block.data for block in found).decode() == text
    numbered = [pair for block in found for pair in block]
    assert numbered == [(number, f"line {number}".encode()) for number in range(1, 40)] + [(42, b"last")]
    assert sum(block.lines for block in found) == 42
    assert found[-1].read == (tmp_path / "f").stat().st_size


def test_gzip_files_of_several_members_are_read_whole(tmp_path):
    (tmp_path / "f.gz").write_bytes(gzip.compress(b"a\nb") + gzip.compress(b"c\nd\n"))
    assert b"".join(block.data for block in lines.blocks(tmp_path / "f.gz")) == b"a\nbc\nd\n"


def test_damaged_gzip_files_are_refused(tmp_path):
    whole = gzip.compress("".join(f"{n}\n" for n in range(10_000)).encode())
    (tmp_path / "torn.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut short: its.* data end in line [\d,]{4,}; get it again"):
        list(lines.blocks(tmp_path / "torn.gz", 100))
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 255
    (tmp_path / "broken.gz").write_bytes(bytes(broken))
    with pytest.raises(UserError, match=r"is damaged \(.*in line|cut short"):
        list(lines.blocks(tmp_path / "broken.gz", 100))


def test_a_file_without_line_feeds_is_no_text_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST_LINE", 100)
    (tmp_path / "f").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="it is no text file"):
        list(lines.blocks(tmp_path / "f", 10))


# ----------------------------------------------------------------------------------------------------------- Amazon


def test_reviews_of_2018_and_2023_give_the_same_rows(tmp_path):
    old = block_of()
    new = [
        {
            "rating": r["overall"],
            "user_id": r["reviewerID"],
            "parent_asin": r["asin"],
            "timestamp": r["unixReviewTime"] * 1000 + 1_600_000_000_123,
        }
        for r in old
    ]
    shifted = [{**r, "unixReviewTime": r["unixReviewTime"] + 1_600_000_000} for r in old]
    one = prepare(Files(reviews=write_lines(tmp_path / "a.json.gz", shifted)), tmp_path / "one", k_core=3)
    two = prepare(Files(reviews=write_lines(tmp_path / "b.jsonl", new, compress=False)), tmp_path / "two", k_core=3)
    assert one.fingerprint == two.fingerprint
    assert one.times.min() == 1_600_000_000


META = {
    "i0": {
        "title": "Salt &amp; Co",
        "description": ["<b>One</b>", "two"],
        "category": ["A", "B &amp; C"],
        "brand": "X",
    },
    "i1": {"title": '<span class="a-size', "description": [], "category": []},
    "i2": {"title": "No description"},
    "i9": {"title": "Nobody bought it", "description": ["x"], "category": ["Z"]},
}


def metadata(year: str) -> list:
    rows = []
    for item, texts in [*META.items(), ("i0", {**META["i0"], "title": "Salt &amp; Co"})]:
        key = "parent_asin" if year == "2023" else "asin"
        row = {key: item, **texts}
        if year != "2018" and "category" in row:
            row["categories"] = [row.pop("category")] if year == "2014" else row.pop("category")
        if year == "2014" and "description" in row:
            row["description"] = " ".join(row["description"])
        if year == "2023" and "brand" in row:
            row["store"] = row.pop("brand")
        rows.append(repr(row) if year == "2014" else row)
    return rows


@pytest.mark.parametrize("year", ["2014", "2018", "2023"])
def test_metadata_of_every_year_give_the_same_texts(year, tmp_path):
    reviews = write_lines(tmp_path / "r.json.gz", block_of())
    meta = write_lines(tmp_path / "meta_r.json.gz", metadata(year))
    data = prepare(Files(reviews=reviews, metadata=meta), tmp_path / "out", k_core=3)
    assert data.item_keys == ["", "i0", "i1", "i2"]
    assert data.titles() == [None, "Salt & Co", None, "No description"]
    assert data.descriptions() == [None, "One two", None, None]
    assert data.categories() == [[], ["A", "B & C"], [], []]
    assert data.brands() == [None, "X", None, None]
    assert data.manifest["texts"] == {
        "without_title": 1,
        "junk_titles": 1,
        "without_description": 2,
        "without_row": 0,
        "repeated_rows": 1,
        "unusable_lines": 0,
    }


def test_texts_of_the_reference_recipe(tmp_path):
    meta = [
        {"asin": "i0", "title": "Old", "description": ["old"]},
        {
            "asin": "i0",
            "title": "A &amp; B",
            "description": ["", "second"],
        },  # the last row wins; its first entry counts
        {"asin": "i1", "title": "Empty list", "description": []},
        {"asin": "i2", "title": "A string", "description": "Word"},
        {"asin": "i3", "title": "No description key"},
        {"asin": "i4", "description": ["no title key"]},
        {"asin": "i6", "title": "An empty string", "description": ""},
    ]
    reviews = write_lines(tmp_path / "r.json.gz", block_of(7))
    data = prepare(
        Files(reviews=reviews, metadata=write_lines(tmp_path / "m.json.gz", meta)), tmp_path / "out", recipe="reference"
    )
    assert data.item_keys[1:] == [f"i{item}" for item in range(7)]
    assert data.titles()[1:] == ["A &amp; B", "Empty list", "A string", None, None, None, "An empty string"]
    descriptions = ["", "Empty description", "W", None, "no title key", None, "Empty description"]
    assert data.descriptions()[1:] == descriptions


BROKEN = [
    ('{"overall": 5.0, "reviewerID": "u', "it is not JSON"),
    ("[1, 2]", "it is not a JSON object"),
    ('{"overall": 5.0, "reviewerID": "u1", "unixReviewTime": 1}', 'it has no "asin"'),
    ('{"overall": 5.0, "reviewerID": "u1", "asin": "", "unixReviewTime": 1}', "the item is empty"),
    ('{"overall": NaN, "reviewerID": "u1", "asin": "i1", "unixReviewTime": 1}', "NaN is not a number"),
    ('{"overall": 5.0, "reviewerID": "u1", "asin": "i1", "unixReviewTime": NaN}', "NaN is not a number"),
    ('{"overall": 5.0, "reviewerID": "u1", "asin": "i1", "unixReviewTime": -1}', "-1 is not a valid time"),
    ('{"overall": 5.0, "reviewerID": "u1", "asin": "i1", "unixReviewTime": 1.5}', "1.5 is not a valid time"),
    ('{"overall": true, "reviewerID": "u1", "asin": "i1", "unixReviewTime": 1}', "True is not a valid rating"),
    ('{"overall": 5.0, "reviewerID": ["u1"], "asin": "i1", "unixReviewTime": 1}', "['u1'] is not a valid user"),
    ('{"overall": 5.0, "reviewerID": "u1", "asin": {"a": 1}, "unixReviewTime": 1}', "{'a': 1} is not a valid item"),
    ('{"overall": 5.0, "reviewerID": "u\\ud800", "asin": "i1", "unixReviewTime": 1}', "'utf-8' codec can't encode"),
    (f'{{"overall": {"9" * 400}, "reviewerID": "u", "asin": "i", "unixReviewTime": 1}}', "9999"),
    ("[" * 100_000, "it is "),
]


@pytest.mark.parametrize(("line", "problem"), BROKEN)
def test_an_unusable_line_is_counted_named_and_left_out(line, problem, tmp_path):
    good = block_of()
    path = write_lines(tmp_path / "r.json.gz", [*good[:4], line, *good[4:]])
    data = prepare(Files(reviews=path), tmp_path / "out", k_core=3)
    assert data.n_interactions == 9
    assert data.manifest["rows"]["read"] == 10
    assert data.manifest["rows"]["dropped"][0] == {"reason": "line that cannot be used", "rows": 1}
    (example,) = data.manifest["unusable_lines"]
    assert example.startswith(f"r.json.gz line 5: {problem}")
    with pytest.raises(UserError, match="line 5: "):
        prepare(Files(reviews=path), tmp_path / "strict", max_bad_lines=0)


def test_too_many_unusable_lines_are_an_error_with_a_way_out(tmp_path):
    path = write_lines(tmp_path / "r.json.gz", [*block_of(), *["broken"] * 5])
    with pytest.raises(UserError, match=r"line 13: it is not JSON.*3 unusable lines before it; --max-bad-lines allows"):
        prepare(Files(reviews=path), tmp_path / "out", max_bad_lines=3)
    assert prepare(Files(reviews=path), tmp_path / "out", max_bad_lines=5, k_core=3).n_interactions == 9


def test_odd_but_sound_lines_lose_nothing(tmp_path):
    odd = [
        '  {"overall": "5.0", "reviewerID": "u0", "asin": "i0", "unixReviewTime": "7"}\r',
        "",
        '{"overall": 5, "reviewerID": 4294967299, "asin": 12, "unixReviewTime": 8.0}',
        '{"overall": 5.0, "reviewerID": "\\u00e9", "asin": "i0", "unixReviewTime": 9, "style": {"a": [1, {}]}}',
    ]
    raw = amazon.read(write_lines(tmp_path / "r", odd), None, Skipped())
    assert pairs(raw.interactions) == [("u0", "i0", 5.0, 7), ("4294967299", "12", 5.0, 8), ("é", "i0", 5.0, 9)]
    assert (raw.rows, raw.skipped.count) == (3, 0)


def test_broken_metadata_lines_are_named_and_left_out(tmp_path):
    reviews = write_lines(tmp_path / "r.json.gz", block_of())
    meta = write_lines(tmp_path / "m.json.gz", [{"asin": "i0", "title": "T"}, "{broken", {"title": "no id"}])
    data = prepare(Files(reviews=reviews, metadata=meta), tmp_path / "out", k_core=3)
    assert data.titles() == [None, "T", None, None]
    assert [example[:19] for example in data.manifest["unusable_lines"]] == [
        "m.json.gz line 2: i",
        "m.json.gz line 3: i",
    ]
    assert data.manifest["rows"]["read"] == 9
    with pytest.raises(UserError, match="holds no Amazon metadata"):
        prepare(Files(reviews=reviews, metadata=write_lines(tmp_path / "x.gz", [{"a": 1}])), tmp_path / "o", k_core=3)


def test_a_first_line_that_is_broken_does_not_hide_the_year(tmp_path):
    rows = [{"rating": 5, "user_id": "u", "parent_asin": f"i{n}", "timestamp": n} for n in range(200)]
    raw = amazon.read(write_lines(tmp_path / "r.jsonl", ["{broken", *rows]), None, Skipped())
    assert (raw.interactions.height, raw.rows) == (200, 201)


def test_named_amazon_data_and_folders_know_the_rule_for_beauty(tmp_path):
    """From files put into the cache by hand to a prepared data set, with Beauty's thresholds whatever it is called."""
    folder = tmp_path / "amazon-2018-luxury-beauty"
    folder.mkdir()
    write_lines(folder / "Luxury_Beauty.json.gz", block_of(4))
    write_lines(folder / "meta_Luxury_Beauty.json.gz", metadata("2018"))
    for number, source in enumerate(["amazon-2018-luxury-beauty", str(folder)]):
        data = prepare(source, tmp_path / str(number), recipe="reference", name="mine", cache=tmp_path)
        assert data.n_interactions == 16
        assert (data.name, data.titles()[1]) == ("mine", "Salt &amp; Co")
    assert prepare(str(folder), tmp_path / "clean").manifest["settings"]["k_core"] == 4
    assert prepare(str(folder), tmp_path / "clean2").name == "Luxury_Beauty"
    with pytest.raises(UserError, match="is a file: name it with --reviews or --interactions"):
        prepare(str(folder / "Luxury_Beauty.json.gz"), tmp_path / "file")


def test_files_that_are_not_amazons(tmp_path):
    with pytest.raises(UserError, match=r"has the keys a, b, which no Amazon review file has.*--interactions"):
        amazon.read(write_lines(tmp_path / "x.json", [{"a": 1, "b": 2}]), None, Skipped())
    with pytest.raises(UserError, match="holds no interactions"):
        amazon.read(write_lines(tmp_path / "y.json", []), None, Skipped())
    with pytest.raises(UserError, match="does not exist"):
        prepare(Files(reviews=tmp_path / "nowhere.json"), tmp_path / "out")


_raw = st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 7), st.sampled_from([1.0, 2.0, 3.0, 5.0]), st.integers(0, 5)),
    min_size=1,
    max_size=120,
)


def public_rule(rows: list[tuple], special: bool) -> str | None:
    """The public code's rule, row by row."""
    users, items = {}, {}
    for user, item, rating, _ in rows:
        counts = 1 if not special or rating >= 3 else 0
        users[user], items[item] = users.get(user, 0) + counts, items.get(item, 0) + counts
    threshold, user_ids, item_ids, sequences = (4 if special else 5), {}, {}, {}
    for user, item, _, time in rows:
        if users[user] >= threshold and items[item] >= threshold:
            u, i = user_ids.setdefault(user, len(user_ids) + 1), item_ids.setdefault(item, len(item_ids) + 1)
            sequences.setdefault(u, []).append((time, i))
    for sequence in sequences.values():
        sequence.sort(key=lambda entry: entry[0])
    return "".join(f"{u} {i}\n" for u, sequence in sequences.items() for _, i in sequence)


@settings(max_examples=40, deadline=None)
@given(_raw, st.booleans())
def test_the_reference_recipe_gives_the_public_codes_file(tmp_path_factory, rows, special):
    folder = tmp_path_factory.mktemp("reference")
    name = "All_Beauty" if special else "Games"
    path = write_lines(folder / f"{name}.json.gz", [review(f"u{u}", f"i{i}", r, t) for u, i, r, t in rows])
    expected = public_rule(rows, special)
    if not expected:
        with pytest.raises(UserError, match="none of the"):
            prepare(Files(reviews=path), folder / "out", recipe="reference")
        return
    data = prepare(Files(reviews=path), folder / "out", recipe="reference")
    assert sequence_text(data) == expected
    account = data.manifest["rows"]
    assert account["read"] == len(rows) == account["kept"] + sum(entry["rows"] for entry in account["dropped"])


# ------------------------------------------------------------------------------------------------- tables of one's own

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


def keys_of(data: Dataset) -> dict[str, list[str]]:
    sequences = np.split(data.items, data.offsets[2:-1])
    return {key: [data.item_keys[i] for i in items] for key, items in zip(data.user_keys[1:], sequences, strict=True)}


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


# -------------------------------------------------------------------------------------------------------- MovieLens


def write_movielens(folder: Path, release: str) -> Path:
    folder.mkdir()
    ratings = [(7, 3, 4, 30), (9, 1, 2, 5), (7, 1, 5, 10), (9, 3, 5, 4)]
    films = [(1, "Toy Story (1995)", ["Animation", "Comedy"]), (3, "Amélie, or not (2001)", ["(no genres listed)"])]
    if release == "1m":
        (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in ratings))
        text = "".join(f"{key}::{title}::{'|'.join(genres)}\n" for key, title, genres in films)
        (folder / "movies.dat").write_bytes(text.encode("latin-1"))
    else:
        rows = "".join(",".join(map(str, row)) + "\n" for row in ratings)
        (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + rows)
        text = "".join(f'{key},"{title}",{"|".join(genres)}\n' for key, title, genres in films)
        (folder / "movies.csv").write_text("movieId,title,genres\n" + text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("release", ["1m", "20m"])
def test_other_movielens_releases(release, tmp_path):
    data = prepare(str(write_movielens(tmp_path / "raw", release)), tmp_path / "out", k_core=2)
    assert data.item_keys == ["", "3", "1"]
    assert data.titles() == [None, "Amélie, or not (2001)", "Toy Story (1995)"]
    assert data.descriptions() == [None, None, "Animation, Comedy"]
    assert keys_of(data) == {"7": ["1", "3"], "9": ["3", "1"]}
    with open(tmp_path / "raw" / ("ratings.dat" if release == "1m" else "ratings.csv"), "a") as file:
        file.write("1::x\n" if release == "1m" else "1,x\n")
    with pytest.raises(UserError, match=rf"line {5 if release == '1m' else 6}: it has 2 fields instead of 4"):
        movielens.read(tmp_path / "raw")


# ------------------------------------------------------------------------------------------- the public code's files


def test_the_public_codes_files(tmp_path):
    (tmp_path / "m.txt").write_text("1 1 2\n2 2\n")
    write_lines(tmp_path / "i.jsonl", [{"id": 1, "title": "T", "description": ""}], compress=False)
    data = prepare(
        Files(interactions=tmp_path / "m.txt", items=tmp_path / "i.jsonl"), tmp_path / "out", recipe="as-is", name="X"
    )
    assert main(["data", "export", str(tmp_path / "out"), "--to", "public", "--out", str(tmp_path / "public")]) == 0
    assert (tmp_path / "public" / "X.txt").read_text() == "1 1\n1 2\n2 2\n"
    texts = pickle.loads((tmp_path / "public" / "X_text_name_dict.json.gz").read_bytes())
    assert texts == text_dict(data) == {"title": {1: "T"}, "description": {1: ""}}
    with pytest.raises(UserError, match="exists already"):
        write_public(data, tmp_path / "public")
    assert sorted(os.listdir(tmp_path / "public")) == ["X.txt", "X_text_name_dict.json.gz"]


# -------------------------------------------------------------------------------------------------------- real data

REAL = {
    "amazon18-raw-gift-cards": ("Gift_Cards_5.json.gz", "meta_Gift_Cards.json.gz", (458, 147, 2968), (454, 147, 2949)),
    "amazon18-raw-magazine-subscriptions": (
        "Magazine_Subscriptions_5.json.gz",
        "meta_Magazine_Subscriptions.json.gz",
        (347, 146, 2348),
        (304, 134, 2095),
    ),
    "amazon18-raw-all-beauty": ("All_Beauty_5.json.gz", None, (957, 56, 5040), None),
}


@pytest.mark.parametrize("folder", REAL)
def test_real_raw_files_through_both_recipes(folder, test_data, tmp_path):
    reviews, meta, reference, clean = REAL[folder]
    where = test_data(folder)
    files = Files(reviews=where / reviews, metadata=where / meta if meta else None)
    data = prepare(files, tmp_path / "reference", recipe="reference")
    assert (data.n_users, data.n_items, data.n_interactions) == reference
    # Line by line, by the rule as it is written down.
    with gzip.open(where / reviews) as file:
        raw = [json.loads(line) for line in file]
    rows = [(r["reviewerID"], r["asin"], r["overall"], r["unixReviewTime"]) for r in raw]
    assert sequence_text(data) == public_rule(rows, "Beauty" in reviews)
    if meta:
        assert text_dict(data) == public_texts(where / meta, data.item_keys)
    if clean:
        data = prepare(files, tmp_path / "clean")
        assert (data.n_users, data.n_items, data.n_interactions) == clean
        assert data.manifest["texts"]["junk_titles"] == (128 if "magazine" in folder else 0)
        assert not any("<" in title for title in data.titles() if title)
    account = data.manifest["rows"]
    assert account["read"] == len(raw) == account["kept"] + sum(entry["rows"] for entry in account["dropped"])


def public_texts(path: Path, item_keys: list[str]) -> dict[str, dict[int, str]]:
    rows, texts = {}, {"title": {}, "description": {}}
    with gzip.open(path) as file:
        for line in file:
            row = json.loads(line)
            rows[row["asin"]] = row
    for item, key in enumerate(item_keys):
        row = rows.get(key)
        if item and row is not None and "description" in row:
            texts["description"][item] = row["description"][0] if row["description"] else "Empty description"
            if "title" in row:
                texts["title"][item] = row["title"]
    return texts


def test_real_tables(test_data, tmp_path):
    where = test_data("luxury-beauty")
    files = Files(interactions=where / "interactions.txt.gz", items=where / "items.jsonl.gz")
    beauty = prepare(files, tmp_path / "beauty", recipe="as-is", name="Luxury_Beauty")
    assert (beauty.n_users, beauty.n_items, beauty.n_interactions) == (9930, 6141, 63_953)
    with gzip.open(where / "interactions.txt.gz", "rt") as file:
        assert sequence_text(beauty) == file.read()
    assert sum(title is not None for title in beauty.titles()) == 6136
    assert len(beauty.scenario("cold-users").users) == 148
    where = test_data("amazon18-games")
    games = prepare(
        Files(interactions=where / "games.seq.txt.gz", items=where / "games.items.jsonl.gz"), tmp_path / "games"
    )
    assert (games.n_users, games.n_items, games.n_interactions) == (50_546, 16_859, 452_989)
