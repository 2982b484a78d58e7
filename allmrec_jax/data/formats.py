"""The line formats: JSON lines, delimited values, and one user's sequence a line."""

import csv
import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from allmrec_jax.data.lines import Block, blocks
from allmrec_jax.data.raw import KINDS, Interactions, Lines, Skipped, reading
from allmrec_jax.errors import UserError


def json_object(line: bytes) -> dict[str, object]:
    """One line of JSON lines. Raises ValueError if it is not one JSON object."""
    try:
        record = json.loads(line, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at character {error.pos + 1})") from error
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def json_lines(columns: Mapping[str, str], optional: frozenset[str] = frozenset()) -> Lines:
    """JSON lines; `columns` says under which key each of `KINDS` is found."""
    schema = {key: KINDS[name] for name, key in columns.items()}
    renamed = {key: name for name, key in columns.items()}

    def parse_line(line: bytes) -> dict[str, object]:
        record = json_object(line)
        for name, key in columns.items():
            if record.get(key) is None and name not in optional:
                raise ValueError(f'it has no "{key}"')
        return {name: record.get(key) for name, key in columns.items()}

    return Lines(
        scan=lambda path: pl.scan_ndjson(glob.escape(str(path)), schema=schema).rename(renamed),
        parse=lambda data: pl.read_ndjson(data, schema=schema).rename(renamed),
        parse_line=parse_line,
        optional=optional,
    )


def delimited(
    columns: Mapping[str, int],
    *,
    width: int,
    separator: str,
    quote: str | None = None,
    header: int = 0,
    optional: frozenset[str] = frozenset(),
) -> Lines:
    """Values between separators; `columns` says at which position (from 0) each of `KINDS` is found.

    Args:
      width: number of values in a line.
      separator: one character, or two as in MovieLens 1M (`1::1193::5::978300760`).
      quote: the character that may stand around a value. A quoted value must not go over several lines here.
      header: lines to leave out at the beginning.
    """
    at = {position: name for name, position in columns.items()}
    names = [at.get(position, f"column_{position}") for position in range(width)]
    one = separator if len(separator) == 1 else "\x1f"

    def single(data: bytes) -> bytes:
        return data if one == separator else data.replace(separator.encode(), one.encode())

    options = {
        "has_header": False,
        "separator": one,
        "quote_char": quote,
        "schema": {name: KINDS.get(name, pl.String) for name in names},
        "encoding": "utf8",
    }

    def scan(path: Path) -> pl.LazyFrame:
        return pl.scan_csv(path, glob=False, skip_lines=header, **options).select(*columns)

    def parse(data: bytes) -> pl.DataFrame:
        return pl.read_csv(single(data), **options).select(*columns)

    def parse_line(line: bytes) -> dict[str, object]:
        try:
            text = single(line).decode().rstrip("\r")
        except UnicodeDecodeError:
            raise ValueError("it is not UTF-8 text") from None
        if quote is None:
            values = text.split(one)
        else:
            if text.count(quote) % 2:
                raise UserError(
                    "a quoted value goes over several lines, or a quotation mark is missing: "
                    f"{text[:60]!r}; save the table as Parquet or JSON lines"
                )
            values = csv_fields(text, one)
        if len(values) > width or any(position >= len(values) for position in columns.values()):
            raise ValueError(f"it has {len(values)} fields instead of {width}")
        return {name: values[position] for name, position in columns.items()}

    return Lines(scan if one == separator else None, parse, parse_line, header, optional)


def csv_fields(line: str, separator: str) -> list[str]:
    """The values of one line of CSV. Raises ValueError if it is none."""
    csv.field_size_limit(1 << 30)
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error as error:
        raise ValueError(f"it is no delimited line ({error})") from error


def read_sequences(path: Path, skipped: Skipped, console=None) -> pl.DataFrame:
    """`user item item ...`, one user's items in time order a line, between white space; as `Raw.interactions`.

    A user may come on several lines (`user item` pairs are such a file). There are no times: the order counts.
    """
    builder = Interactions(path)
    with reading(path, console) as at:
        for block in blocks(path):
            at(block.read)
            builder.add(_sequences(path, block, skipped))
    return builder.frame(skipped)


def _sequences(path: Path, block: Block, skipped: Skipped) -> pl.DataFrame:
    try:
        words = pl.Series(block.data.decode().split("\n"), dtype=pl.String)
    except UnicodeDecodeError as error:
        line = block.first + block.data[: error.start].count(b"\n")
        raise UserError(f"{path} line {line:,}: it is not UTF-8 text") from error
    table = words.str.strip_chars().str.replace_all(r"\s+", " ").str.split(" ").to_frame("words")
    table = table.with_columns(pl.col("words").list.len().alias("length"), pl.col("words").list.first().alias("user"))
    for row in table.select(((pl.col("length") < 2) & (pl.col("user") != "")).arg_true()).to_series():
        skipped.add(path, block.first + row, "it has a user and no item")
    table = table.filter(pl.col("length") >= 2)
    return table.select("user", pl.col("words").list.slice(1).alias("item")).explode("item")


def first_keys(path: Path) -> list[str]:
    """Every key of the JSON objects in the first lines of a file, in order of appearance; [] if none is sound."""
    keys: dict[str, None] = {}
    for block in blocks(path, 1 << 18):
        for _, line in block:
            try:
                keys.update(dict.fromkeys(json_object(line)))
            except ValueError:
                continue
        break
    return list(keys)


def table_columns(path: Path, kind: str, separator: str) -> list[str]:
    """The names of a table's columns, to find those we need: of the header, or the keys of the first lines."""
    if kind == "parquet":
        return list(read_parquet(path, None).columns)
    if kind == "json":
        keys = first_keys(path)
        if not keys:
            raise UserError(f"{path} does not begin with JSON objects, one a line")
        return keys
    for block in blocks(path, 1 << 16):
        for number, line in block:
            try:
                return csv_fields(line.decode("utf-8-sig").rstrip("\r"), separator)
            except ValueError as error:  # also UnicodeDecodeError
                raise UserError(f"{path} line {number:,}: {error}") from error
    raise UserError(f"{path} is empty")


def read_json_table(path: Path, skipped: Skipped) -> pl.DataFrame:
    """JSON lines as one table, whatever their keys. Unusable lines are counted (`Skipped.of_items`) and left out."""
    bad, parts = Skipped(skipped.limit), []
    for block in blocks(path):
        try:
            parts.append(pl.read_ndjson(block.data, infer_schema_length=None))
        except pl.exceptions.PolarsError:
            good = []
            for number, line in block:
                try:
                    json_object(line)
                    good.append(line)
                except ValueError as error:
                    bad.add(path, number, str(error))
            if good:
                parts.append(pl.read_ndjson(b"\n".join(good), infer_schema_length=None))
    if not parts:
        raise UserError(f"{path} holds no items")
    skipped.add_items(bad)
    return pl.concat(parts, how="diagonal_relaxed")


def read_parquet(path: Path, columns: Sequence[str] | None) -> pl.DataFrame:
    """Columns of a Parquet file; None: no rows of any, for their names."""
    try:
        frame = pl.scan_parquet(path, glob=False)
        return frame.limit(0).collect() if columns is None else frame.select(*columns).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path} is not a sound Parquet file: get it again") from error
