"""Amazon reviews and their metadata, of 2014, 2018 and 2023: one JSON object a line, gzip or plain.

            reviews                                        metadata
    2014    reviewerID, asin, overall, unixReviewTime      asin, title, description, categories (nested), brand
    2018    as 2014                                        asin, title, description (list), category, brand
    2023    user_id, parent_asin, rating, timestamp (ms)   parent_asin, title, description (list), categories, store

The metadata files of 2014 are Python literals rather than JSON. Only the items asked for are kept, so that metadata of
millions of items do not fill the memory.
"""

import ast
import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from allmrec_jax.data.formats import first_keys, json_lines, json_object
from allmrec_jax.data.lines import Block, blocks
from allmrec_jax.data.raw import ITEMS, Raw, Skipped, no_items, read_interactions, reading
from allmrec_jax.errors import UserError

REVIEWS: tuple[Mapping[str, str], ...] = (
    {"user": "reviewerID", "item": "asin", "rating": "overall", "time": "unixReviewTime"},
    {"user": "user_id", "item": "parent_asin", "rating": "rating", "time": "timestamp"},
)


@dataclass(frozen=True)
class Metadata:
    """How one year's metadata say it: the keys, and whether categories are lists of lists."""

    item: str
    categories: str
    brand: str
    nested: bool = False
    literal: bool = False  # Python literals
    paragraphs: bool = True  # descriptions are lists


_2018 = Metadata("asin", "category", "brand")
_2023 = Metadata("parent_asin", "categories", "store")
_2014 = Metadata("asin", "categories", "brand", nested=True, literal=True, paragraphs=False)
_2014_JSON = Metadata("asin", "categories", "brand", nested=True, paragraphs=False)


def find(folder: Path) -> tuple[Path, Path | None] | None:
    """The review file and the metadata file of a folder, None if it holds no such pair (the metadata may be missing).

    Raises `UserError` if there are several categories in it.
    """
    endings = ("json.gz", "jsonl.gz", "json", "jsonl")
    files = sorted(file for end in endings for file in folder.glob(f"[!.]*.{end}"))
    reviews = [file for file in files if not file.name.startswith("meta_")]
    metadata = [file for file in files if file.name.startswith("meta_")]
    if not reviews:
        return None
    if len(reviews) > 1 or len(metadata) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{folder} holds {names}: say which with --reviews FILE --metadata FILE")
    return reviews[0], metadata[0] if metadata else None


def read(reviews: Path, metadata: Path | None, skipped: Skipped, console=None) -> Raw:
    """Reads a review file and, when the items' texts are asked for, its metadata.

    Raises:
      UserError: a damaged file, too many unusable lines, or files that are not Amazon's.
    """
    keys = first_keys(reviews)
    known = [columns for columns in REVIEWS if columns["user"] in keys]
    if not known and keys:
        raise UserError(
            f"{reviews} has the keys {', '.join(keys)}, which no Amazon review file has; a table of your own is read "
            "with --interactions FILE --columns user=KEY item=KEY time=KEY"
        )
    interactions = read_interactions(reviews, json_lines((known or REVIEWS)[0]), skipped, console)
    if metadata is None:
        return Raw(interactions, no_items, skipped)
    return Raw(interactions, lambda wanted: read_metadata(metadata, wanted, skipped, console), skipped)


def read_metadata(path: Path, wanted: pl.Series, skipped: Skipped, console=None) -> pl.DataFrame:
    """The rows of a metadata file about the wanted items, with the columns `ITEMS`.

    A line that cannot be used counts as skipped, but not as a row: rows are interactions.
    """
    bad = Skipped(skipped.limit)
    parts: list[pl.DataFrame] = []
    with reading(path, console) as at:
        dialect = _dialect(path, next(blocks(path, 1 << 18), Block(b"", 1, 0, 0)))
        whole = None if dialect.literal else _whole(path, dialect, wanted)
        if whole is not None:
            return whole
        for block in blocks(path):
            at(block.read)
            read = _literals if dialect.literal else _json
            parts.append(read(path, block, dialect, wanted, bad))
    skipped.add_items(bad)
    return pl.concat([no_items(wanted), *parts])


def _whole(path: Path, dialect: Metadata, wanted: pl.Series) -> pl.DataFrame | None:
    """The wanted rows of a file of JSON lines, None if any line of it is amiss."""
    item = pl.col(dialect.item)
    scanned = pl.scan_ndjson(glob.escape(str(path)), schema=_schema(dialect))
    try:
        found = scanned.filter(item.is_in(wanted.implode()) | item.is_null()).collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError):
        return None
    return None if found[dialect.item].null_count() else _columns(found, dialect)


def _schema(dialect: Metadata) -> dict[str, Any]:
    words = pl.List(pl.String)
    return {
        dialect.item: pl.String(),
        "title": pl.String(),
        "description": words if dialect.paragraphs else pl.String(),
        dialect.categories: pl.List(words) if dialect.nested else words,
        dialect.brand: pl.String(),
    }


def _dialect(path: Path, block: Block) -> Metadata:
    line = next((line for _, line in block), b"{}").lstrip()
    if line.startswith((b"{'", b"{u'", b'{u"')):
        return _2014
    if b'"parent_asin"' in block.data:
        return _2023
    if b'"asin"' not in block.data:
        raise UserError(f"{path} holds no Amazon metadata: no line has an asin")
    return _2014_JSON if b'"categories": [[' in block.data else _2018


def _json(path: Path, block: Block, dialect: Metadata, wanted: pl.Series, bad: Skipped) -> pl.DataFrame:
    try:
        frame = pl.read_ndjson(block.data, schema=_schema(dialect))
        if frame.height == block.lines and not frame[dialect.item].null_count():
            return _columns(frame.filter(pl.col(dialect.item).is_in(wanted.implode())), dialect)
    except pl.exceptions.PolarsError:
        pass
    return _rows(path, block, json_object, dialect, wanted, bad)


def _literals(path: Path, block: Block, dialect: Metadata, wanted: pl.Series, bad: Skipped) -> pl.DataFrame:
    """Python literals take long to read: only lines in which a wanted id stands are."""
    lines = pl.Series([line for _, line in block], dtype=pl.Binary)
    numbers = pl.Series([number for number, _ in block], dtype=pl.Int64)
    try:
        text = lines.cast(pl.String)
    except pl.exceptions.PolarsError:
        return _rows(path, block, _literal, dialect, wanted, bad)
    named = text.str.extract_all(r"'asin': '[^']+'").list.eval(pl.element().str.slice(9).str.head(-1))
    frame = pl.DataFrame({"line": text, "number": numbers, "named": named})
    maybe = pl.col("named").list.set_intersection(wanted.implode()).list.len() > 0
    frame = frame.filter((pl.col("named").list.len() == 0) | maybe)
    chosen = [(number, line.encode()) for line, number in frame.select("line", "number").iter_rows()]
    return _rows(path, chosen, _literal, dialect, wanted, bad)


def _literal(line: bytes) -> dict[str, object]:
    try:
        record = ast.literal_eval(line.decode().strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"it is not a Python literal ({error.__class__.__name__})") from error
    if not isinstance(record, dict):
        raise ValueError("it is not a Python dict")
    return record


def _rows(path, lines, parse, dialect: Metadata, wanted: pl.Series, bad: Skipped) -> pl.DataFrame:
    keep, rows = set(wanted), []
    for number, line in lines:
        try:
            record = parse(line)
            if not isinstance(record.get(dialect.item), str):
                raise ValueError(f'it has no "{dialect.item}"')
        except ValueError as error:
            bad.add(path, number, str(error))
            continue
        if record[dialect.item] in keep:
            rows.append(_row(record, dialect))
    return pl.DataFrame(rows, schema=ITEMS, orient="row")


def _row(record: Mapping[str, object], dialect: Metadata) -> tuple:
    description = record.get("description")
    plain = isinstance(description, str)
    categories = record.get(dialect.categories)
    flat = [entry for part in _list(categories) for entry in (part if isinstance(part, list) else [part])]
    return (
        record[dialect.item],
        _text(record.get("title")),
        [description] if plain else None if description is None else [str(part) for part in _list(description)],
        plain,
        list(dict.fromkeys(str(entry) for entry in flat)),
        _text(record.get(dialect.brand)),
    )


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def _text(value: object) -> str | None:
    return None if value is None else str(value).encode(errors="replace").decode()


def _columns(frame: pl.DataFrame, dialect: Metadata) -> pl.DataFrame:
    description, categories = pl.col("description"), pl.col(dialect.categories)
    if not dialect.paragraphs:
        description = pl.when(description.is_not_null()).then(pl.concat_list(description))
    if dialect.nested:
        categories = categories.list.eval(pl.element().list.explode())
    return frame.select(
        pl.col(dialect.item).alias("item"),
        "title",
        description.alias("description"),
        pl.lit(not dialect.paragraphs).alias("plain"),
        categories.list.unique(maintain_order=True).alias("categories"),
        pl.col(dialect.brand).alias("brand"),
    )
