"""Amazon's raw files of every year: what is read, what is left out and counted, and what is refused with its line."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_files import block_of, pairs, public_rule, review, write_lines

from allmrec_jax.data import amazon
from allmrec_jax.data.prepare import Files, prepare
from allmrec_jax.data.public_files import sequence_text
from allmrec_jax.data.raw import Skipped
from allmrec_jax.errors import UserError


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
