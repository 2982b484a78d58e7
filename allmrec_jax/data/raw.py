"""What every reader gives: the interactions of the input in its order, and the texts of the items asked for.

A sound file is read by polars alone, streaming, decompressing and parsing at once. If anything is amiss the file is
read again in blocks of lines, and a block in which anything is amiss line by line, so that the line can be named, and
counted as skipped.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from allmrec_jax.data.lines import Block, blocks
from allmrec_jax.errors import UserError
from allmrec_jax.progress import Downloads

KINDS = {"user": pl.String, "item": pl.String, "rating": pl.Float64, "time": pl.Int64}
"""Columns of the interactions as they are parsed. Times are seconds or milliseconds since 1970."""

ITEMS = {
    "item": pl.String,
    "title": pl.String,
    "description": pl.List(pl.String),
    "plain": pl.Boolean,
    "categories": pl.List(pl.String),
    "brand": pl.String,
}
"""Columns of item texts: a description is its paragraphs; `plain` if the input has it as one string, not a list."""

MAX_BAD_LINES = 100
# A time above this is in milliseconds (as seconds it would lie after the year 5138), microseconds, nanoseconds.
_FINER = ((10**17, 10**9), (10**14, 10**6), (10**11, 10**3))
_SHOWN = 5


@dataclass
class Skipped:
    """Lines that cannot be used: counted, the first few kept for the report. More than `limit` of them are an error."""

    limit: int = MAX_BAD_LINES
    count: int = 0
    of_items: int = 0  # lines of the item file, which are no rows
    examples: list[str] = field(default_factory=list)

    def add(self, path: Path, number: int, problem: str, *, unit: str = "line") -> None:
        """Notes one. Raises `UserError` if it is one too many."""
        self.count += 1
        where = f"{unit} {number:,}: {problem}"
        if self.count <= _SHOWN:
            self.examples.append(f"{path.name} {where}")
        if self.count > self.limit:
            before = f" ({self.limit:,} unusable {unit}s before it; --max-bad-lines allows more)" if self.limit else ""
            raise UserError(f"{path} {where}{before}")

    def add_items(self, bad: "Skipped") -> None:
        """Takes over what was skipped of an item file: noted, but no rows."""
        self.of_items += bad.count
        self.examples += bad.examples


@dataclass(frozen=True, eq=False)
class Raw:
    """One raw data set.

    interactions: `user` and `item` (categorical: each distinct id has a code), `rating` and `time`, which are null
      throughout where the input has none; one row an interaction, in the input's order.
    items: distinct ids -> columns `ITEMS`: what the input says of these items, in its order; an item may come several
      times, or never.
    skipped: the lines left out.
    """

    interactions: pl.DataFrame
    items: Callable[[pl.Series], pl.DataFrame]
    skipped: Skipped

    @property
    def rows(self) -> int:
        """Rows of the input, those skipped included."""
        return self.interactions.height + self.skipped.count


def describe_inputs(paths: Iterable[Path]) -> list[dict]:
    """Name, size and sha256 of each file, for the manifest."""
    inputs = []
    for path in paths:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        inputs.append({"file": path.name, "bytes": path.stat().st_size, "sha256": digest})
    return inputs


def no_items(_: pl.Series) -> pl.DataFrame:
    """The texts of an input that has none."""
    return pl.DataFrame(schema=ITEMS)


# --------------------------------------------------------------------------------------------------- interactions


@dataclass(frozen=True)
class Lines:
    """A format of one interaction a line.

    scan: a path -> its rows, lazily, with the columns `KINDS` that the input has; None if polars cannot.
    parse: a block's bytes -> its rows with the columns `KINDS` that the input has, or raises a polars error; one row
      for each line.
    parse_line: one line -> {"user": ..., ...}; raises ValueError saying what is wrong.
    header: number of lines to leave out at the beginning.
    optional: columns in which a row may have nothing.
    """

    scan: Callable[[Path], pl.LazyFrame] | None
    parse: Callable[[bytes], pl.DataFrame]
    parse_line: Callable[[bytes], Mapping[str, object]]
    header: int = 0
    optional: frozenset[str] = frozenset()


def read_interactions(path: Path, lines: Lines, skipped: Skipped, console=None) -> pl.DataFrame:
    """Every sound line of a file as `Raw.interactions`.

    Raises:
      UserError: damaged gzip data, too many unusable lines, or no interaction at all.
    """
    builder = Interactions(path)
    with reading(path, console) as at:
        if builder.add_file(lines):
            at(path.stat().st_size)
            return builder.frame(skipped)
        for block in blocks(path):
            data, start = block.data, 0
            if block.first == 1 and lines.header:
                for _ in range(lines.header):
                    start = data.find(b"\n", start) + 1 or len(data)
                data = data[start:]
            at(block.read)
            if data:
                rows = block.lines - (lines.header if block.first == 1 else 0)
                builder.add(_parsed(path, Block(data, block.first + block.lines - rows, rows, 0), lines, skipped))
    return builder.frame(skipped)


def _parsed(path: Path, block: Block, lines: Lines, skipped: Skipped) -> pl.DataFrame:
    try:
        frame = lines.parse(block.data)
        if frame.height == block.lines and frame.select(_sound(frame.columns, lines.optional).all()).item():
            return frame
    except (pl.exceptions.PolarsError, UnicodeDecodeError):
        pass
    rows: list[dict[str, object]] = []
    for number, line in block:
        try:
            rows.append(
                {
                    name: None if value in (None, "") and name in lines.optional else CHECKS[name](value)
                    for name, value in lines.parse_line(line).items()
                }
            )
        except ValueError as error:
            skipped.add(path, number, str(error))
        except UserError as error:
            raise UserError(f"{path} line {number:,}: {error}") from error
    return pl.DataFrame(rows, schema={name: kind for name, kind in KINDS.items() if rows and name in rows[0]})


def _sound(columns: Iterable[str], optional: frozenset[str] = frozenset()) -> pl.Expr:
    rules = {
        "user": _is_id("user"),
        "item": _is_id("item"),
        "rating": pl.col("rating").is_finite(),
        "time": pl.col("time") >= 0,
    }
    return pl.all_horizontal(rules[name].fill_null(name in optional) for name in columns)


def _is_id(name: str) -> pl.Expr:
    # polars writes a JSON list or object as text, and half a surrogate pair as NUL: such a line is looked at by itself.
    # Compared rather than searched for its beginning, because that is faster.
    text = pl.col(name)
    listed, keyed = (text >= "[") & (text < "\\"), (text >= "{") & (text < "|")
    return (text != "") & ~listed & ~keyed & ~text.str.contains("\0", literal=True)


class Interactions:
    """Gathers the rows of `Raw.interactions` part by part; ids become codes at once, which are small."""

    def __init__(self, path: Path):
        self.path = path
        self._parts: list[pl.DataFrame] = []
        self._ids = {name: pl.Categorical(pl.Categories.random()) for name in ("user", "item")}

    def add(self, frame: pl.DataFrame) -> None:
        """Adds rows whose columns are `KINDS`, without those that the input does not have."""
        if frame.height:
            self._parts.append(frame.lazy().select(*self._columns(frame.columns)).collect())

    def add_file(self, lines: Lines) -> bool:
        """Adds the whole file, if all of it is sound; else adds nothing."""
        if lines.scan is None:
            return False
        try:
            scanned = lines.scan(self.path)
            names = scanned.collect_schema().names()
            sound = _sound(names, lines.optional).alias("sound")
            frame = scanned.select(*self._columns(names), sound).collect(engine="streaming")
        except (pl.exceptions.PolarsError, OSError):
            return False
        if not frame["sound"].all():
            return False
        if frame.height:
            self._parts.append(frame.drop("sound"))
        return True

    def _columns(self, names: Iterable[str]) -> list[pl.Expr]:
        there = {name: pl.col(name) if name in names else pl.lit(None, kind) for name, kind in KINDS.items()}
        kinds = {**self._ids, "rating": pl.Float32, "time": pl.Int64}
        return [there[name].cast(kinds[name]).alias(name) for name in KINDS]

    def frame(self, skipped: Skipped) -> pl.DataFrame:
        """All rows. Raises `UserError` if there are none."""
        if not self._parts:
            first = f"; the first unusable: {skipped.examples[0]}" if skipped.examples else ""
            raise UserError(f"{self.path} holds no interactions{first}")
        return pl.concat(self._parts)


def check_rows(
    path: Path, frame: pl.DataFrame, skipped: Skipped, unit: str = "row", optional: frozenset[str] = frozenset()
) -> pl.DataFrame:
    """The sound rows of a table whose columns are some of `KINDS`, cast to them; row i is row i + 1 of the file."""
    try:
        cast = frame.select(pl.col(name).cast(KINDS[name], strict=False) for name in frame.columns)
    except pl.exceptions.PolarsError as error:
        kinds = ", ".join(f"{name}: {kind}" for name, kind in frame.schema.items())
        raise UserError(f"{path} has columns of kinds that cannot be used ({kinds})") from error
    sound = cast.select(_sound(cast.columns, optional)).to_series()
    if "time" in frame.columns and frame["time"].dtype.is_float():
        sound &= (frame["time"] == frame["time"].floor()).fill_null(False)
    for row in sound.not_().arg_true():
        for name in cast.columns:
            try:
                CHECKS[name](frame[name][row])
            except ValueError as error:
                skipped.add(path, row + 1, str(error), unit=unit)
                break
        else:
            skipped.add(path, row + 1, "it cannot be read", unit=unit)
    return cast.filter(sound)


def in_seconds(times: pl.Series) -> int:
    """How many units of these times are one second, by their median: 1, or 1000 if they are milliseconds, and so on."""
    middle = times.median()
    return next((units for least, units in _FINER if middle is not None and float(middle) > least), 1)


# --------------------------------------------------------------------------------------------- one value of a line


def _id(name: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()  # as polars writes it
    if not isinstance(value, str | int | float):
        raise ValueError(f"{value!r} is not a valid {name}")
    if value == "":
        raise ValueError(f"the {name} is empty")
    str(value).encode()  # a ValueError, if it is not Unicode text
    return str(value)


def _number(name: str, value: object) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        hint = " (whole seconds or finer since 1970)" if name == "time" else ""
        raise ValueError(f"{value!r} is not a valid {name}{hint}")
    return number


def _time(value: object) -> int:
    whole = isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal())
    time = int(value) if whole and not isinstance(value, bool) else _number("time", value)  # type: ignore[call-overload]
    if not 0 <= time < 2**63 or time != int(time):
        raise ValueError(f"{value!r} is not a valid time (whole seconds or finer since 1970)")
    return int(time)


CHECKS: dict[str, Callable[[object], object]] = {
    "user": lambda value: _id("user", value),
    "item": lambda value: _id("item", value),
    "rating": lambda value: _number("rating", value),
    "time": _time,
}


@contextmanager
def reading(path: Path, console=None) -> Iterator[Callable[[int], None]]:
    """Shows how far a file is read; gives the function to tell it (bytes so far). Shows nothing without a console."""
    if console is None:
        yield lambda read: None
        return
    with Downloads(console) as bars:
        task = bars.add_task(f"reading {path.name}", total=path.stat().st_size)
        yield lambda read: bars.update(task, completed=read)
