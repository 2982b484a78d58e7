"""MovieLens, the public code's files, and real raw files through every reader."""

import gzip
import json
import os
import pickle
from pathlib import Path

import pytest
from raw_files import keys_of, public_rule, write_lines

from allmrec_jax.cli import main
from allmrec_jax.data import movielens
from allmrec_jax.data.prepare import Files, prepare
from allmrec_jax.data.public_files import sequence_text, text_dict, write_public
from allmrec_jax.errors import UserError

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
