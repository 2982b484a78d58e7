"""What every reader gives: the rows of the input, unfiltered, in the input's order."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from allmrec_jax.errors import UserError

INTERACTIONS = {"user": pl.String, "item": pl.String, "rating": pl.Float32, "time": pl.Int64}
ITEMS = {"item": pl.String, "title": pl.String, "description": pl.String, "categories": pl.List(pl.String)}


@dataclass(frozen=True, eq=False)
class Raw:
    """One raw data set.

    interactions: columns `INTERACTIONS`, one row a line of the input, in its order; `rating` and `time` (seconds since
      1970) are null throughout where the input has none.
    items: columns `ITEMS`, one row an item, as the input has them; texts are null where it has none.
    inputs: name, size and sha256 of every file read.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    inputs: list[dict]


def describe_inputs(paths: Iterable[Path]) -> list[dict]:
    """Name, size and sha256 of each file, for the manifest."""
    inputs = []
    for path in paths:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        inputs.append({"file": path.name, "bytes": path.stat().st_size, "sha256": digest})
    return inputs


def check_interactions(frame: pl.DataFrame, file: Path, what: str = "line") -> pl.DataFrame:
    """The frame cast to `INTERACTIONS`, row i being line i + 1 of `file`.

    Raises `UserError` naming the first line without a user, an item or a time that is a number of at least 0, or whose
    rating is not a number. A column that is null throughout means that the input does not have it.
    """
    if frame.height == 0:
        raise UserError(f"{file} holds no interactions")
    cast = frame.select(pl.col(name).cast(kind, strict=False) for name, kind in INTERACTIONS.items())
    sound = {name: pl.col(name).is_not_null() for name in ("user", "item")}
    if frame["time"].null_count() < frame.height:
        sound["time"] = pl.col("time").is_not_null() & (pl.col("time") >= 0)
    if frame["rating"].null_count() < frame.height:
        sound["rating"] = pl.col("rating").is_finite().fill_null(False)
    for name, good in sound.items():
        bad = cast.select(good.not_().arg_true()).to_series()
        if len(bad):
            row = int(bad[0])
            more = f" (and {len(bad) - 1:,} more)" if len(bad) > 1 else ""
            raise UserError(f"{file} {what} {row + 1:,}{more}: {frame[name][row]!r} is not a valid {name}")
    return cast


def check_items_known(raw_interactions: pl.DataFrame, items: pl.DataFrame, file: Path, items_file: Path, what="line"):
    """Raises `UserError` naming the first interaction with an item that the item file does not have."""
    unknown = raw_interactions.select(pl.col("item").is_in(items["item"].implode()).not_().arg_true()).to_series()
    if len(unknown):
        row = int(unknown[0])
        raise UserError(
            f"{file} {what} {row + 1:,} names item {raw_interactions['item'][row]!r}, which {items_file.name} does not "
            f"have ({len(unknown):,} such rows): is {items_file.name} complete?"
        )
