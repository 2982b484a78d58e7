"""People's own data: interactions and items as CSV, TSV, JSON lines or Parquet with named columns, or as sequences.

    .csv .tsv            a header line names the columns
    .json .jsonl         one object a line
    .parquet
    .txt                 no names: `user item item ...`, in time order, between white space; one or more lines a user

each of the text files plain or gzip. Columns are found by the names people use for them, or by those they give.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path

import polars as pl
from rich.console import Console

from allmrec_jax.data import formats
from allmrec_jax.data.lines import blocks
from allmrec_jax.data.raw import (
    ITEMS,
    Interactions,
    Raw,
    Skipped,
    check_rows,
    no_items,
    read_interactions,
)
from allmrec_jax.errors import UserError

NAMES = {
    "user": ("user", "user_id", "userId", "reviewerID", "uid", "customer_id"),
    "item": ("item", "item_id", "itemId", "parent_asin", "asin", "movieId", "movie_id", "iid", "id"),
    "rating": ("rating", "overall", "stars", "score"),
    "time": ("time", "timestamp", "unixReviewTime", "unix_time", "date"),
    "title": ("title", "name", "movie_title", "product_title"),
    "description": ("description", "text"),
    "categories": ("categories", "category", "genres"),
    "brand": ("brand", "store"),
}
_NEEDED = {"interactions": ("user", "item"), "items": ("item",)}
_OPTIONAL = {"interactions": ("rating", "time"), "items": ("title", "description", "categories", "brand")}


def read(
    interactions: Path, items: Path | None, skipped: Skipped, *, columns: Mapping[str, str] | None = None, console=None
) -> Raw:
    """Reads a pair of tables.

    Args:
      columns: our name (of `NAMES`) -> the name in the files, where they call it something unexpected.
    Raises:
      UserError: a column that is not there, a damaged file, too many unusable rows.
    """
    given = dict(columns or {})
    if unknown := [name for name in given if name not in NAMES]:
        close = difflib.get_close_matches(unknown[0], NAMES, n=1)
        hint = f": did you mean {close[0]}?" if close else ""
        raise UserError(f"there is no column {unknown[0]!r} to name{hint} (known: {', '.join(NAMES)})")
    used: set[str] = set()
    frame = _interactions(interactions, given, used, skipped, console)
    table = None if items is None else _items(items, given, used, skipped)
    if unused := sorted(set(given) - used):
        files = " or ".join(path.name for path in (interactions, items) if path is not None)
        raise UserError(f"there is no column {given[unused[0]]!r} ({unused[0]}) in {files}")
    if table is None:
        return Raw(frame, no_items, skipped)
    return Raw(frame, lambda wanted: table.filter(pl.col("item").is_in(wanted.implode())), skipped)


def _kind(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    endings = {".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
    endings |= {".parquet": "parquet", ".txt": "sequences", ".inter": "tsv", ".item": "tsv"}
    kind = endings.get(Path(name).suffix)
    if kind is None:
        raise UserError(f"{path}: the ending of its name is none of {', '.join(endings)} (or one of these and .gz)")
    return kind


def _found(path: Path, what: str, there: list[str], given: Mapping[str, str], used: set[str]) -> dict[str, str]:
    """Our column name -> its name in the file; notes in `used` which of the given names are found."""
    bare = {column.split(":")[0]: column for column in reversed(there)}  # RecBole writes `user_id:token`
    bare |= {column: column for column in there}
    found: dict[str, str] = {}
    for name in (*_NEEDED[what], *_OPTIONAL[what]):
        if given.get(name) in bare:
            used.add(name)
            found[name] = bare[given[name]]
        elif name not in given or what == "items":  # one --columns serves two files: the name may be of the other
            match = next((bare[usual] for usual in NAMES[name] if usual in bare), None)
            if match is not None:
                found[name] = match
        if name in _NEEDED[what] and name not in found:
            asked = f"{given[name]!r}" if name in given else f"for the {name}"
            raise UserError(f"{path} has no column {asked}; it has {', '.join(there)}: say --columns {name}=ITS_NAME")
    for column in found.values():
        if len(twice := [name for name in found if found[name] == column]) > 1:
            raise UserError(f"{path}: its column {column!r} cannot be both {' and '.join(twice)}")
    return found


def _interactions(
    path: Path, given: Mapping[str, str], used: set[str], skipped: Skipped, console: Console | None
) -> pl.DataFrame:
    kind = _kind(path)
    if kind == "sequences":
        return formats.read_sequences(path, skipped, console)
    separator = "\t" if kind == "tsv" else ","
    there = formats.table_columns(path, kind, separator)
    found = _found(path, "interactions", there, given, used)
    optional = frozenset({"rating"})
    if kind == "parquet":
        builder = Interactions(path)
        frame = formats.read_parquet(path, list(found.values()))
        frame = frame.rename({theirs: ours for ours, theirs in found.items()})
        if "time" in found and isinstance(frame["time"].dtype, pl.Datetime | pl.Date):
            frame = frame.with_columns(pl.col("time").cast(pl.Datetime("ms")).dt.epoch("ms"))
        builder.add(check_rows(path, frame, skipped, optional=optional))
        return builder.frame(skipped)
    if kind == "json":
        lines = formats.json_lines(found, optional)
    else:
        positions = {ours: there.index(theirs) for ours, theirs in found.items()}
        lines = formats.delimited(
            positions, width=len(there), separator=separator, quote='"', header=1, optional=optional
        )
    return read_interactions(path, lines, skipped, console)


def _items(path: Path, given: Mapping[str, str], used: set[str], skipped: Skipped) -> pl.DataFrame:
    kind = _kind(path)
    if kind == "sequences":
        raise UserError(f"{path}: an item table needs names for its columns; .csv, .tsv, .jsonl and .parquet have them")
    separator = "\t" if kind == "tsv" else ","
    try:
        if kind == "parquet":
            frame = formats.read_parquet(path, formats.table_columns(path, kind, separator))
        elif kind == "json":
            frame = formats.read_json_table(path, skipped)
        else:
            frame = pl.read_csv(_whole(path), separator=separator, infer_schema=False)
        found = _found(path, "items", frame.columns, given, used)
        frame = frame.select(pl.col(theirs).alias(ours) for ours, theirs in found.items())
        missing = [pl.lit(None, kind).alias(name) for name, kind in ITEMS.items() if name not in frame.columns]
        frame = frame.with_columns(*missing)
        columns = [pl.col(name).cast(pl.String) for name in ("item", "title", "brand")]
        columns.append(_as_list(frame, "description", None).alias("description"))
        columns.append(_as_list(frame, "categories", "|" if kind != "json" else None).alias("categories"))
        return frame.select(*columns, plain=pl.lit(False)).select(*ITEMS).filter(pl.col("item").is_not_null())
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as {kind}: {(str(error).splitlines() or ['?'])[0]}") from error


def _as_list(frame: pl.DataFrame, name: str, separator: str | None) -> pl.Expr:
    column = pl.col(name)
    if isinstance(frame[name].dtype, pl.List):
        return column.cast(pl.List(pl.String))
    text = column.cast(pl.String)
    return text.str.split(separator) if separator else pl.when(text.is_not_null()).then(pl.concat_list(text))


def _whole(path: Path) -> bytes:
    return b"".join(block.data for block in blocks(path))
