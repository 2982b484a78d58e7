"""Raw files -> prepared data set: read, filter by recipe, number, order, clean the texts, write."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from allmrec_jax.data import amazon, movielens, recipes, sources, tables, text
from allmrec_jax.data.dataset import MANIFEST, Dataset, open_dataset
from allmrec_jax.data.raw import MAX_BAD_LINES, Raw, Skipped, describe_inputs, in_seconds
from allmrec_jax.data.writer import write_dataset
from allmrec_jax.errors import UserError
from allmrec_jax.progress import say


@dataclass(frozen=True)
class Files:
    """Raw files given one by one: Amazon's `reviews` and `metadata`, or a table of one's own and its `items`."""

    reviews: Path | None = None
    metadata: Path | None = None
    interactions: Path | None = None
    items: Path | None = None
    columns: Mapping[str, str] | None = None  # our names -> the tables' names

    @property
    def paths(self) -> list[Path]:
        return [path for path in (self.reviews, self.metadata, self.interactions, self.items) if path is not None]

    @property
    def name(self) -> str:
        """Of the file that holds the interactions, without its endings: `Luxury_Beauty`."""
        return self.paths[0].name.split(".")[0]


def prepare(
    source: str | Files,
    out: Path,
    *,
    name: str | None = None,
    recipe: str = "clean",
    strip_years: bool = False,
    k_core: int | None = None,
    min_positive_rating: float | None = None,
    seed: int = 0,
    max_bad_lines: int = MAX_BAD_LINES,
    cache: Path | None = None,
    console=None,
) -> Dataset:
    """Prepares a named data set (see `sources.KNOWN`), a folder of raw files, or single files, into `out`.

    If `out` already holds the same data prepared with the same settings, that is opened and nothing is done; anything
    else in `out` is left alone and is an error. Ids are given in order of first appearance among the rows that stay; a
    user's rows are in time order, rows of equal time in the input's order. Under "as-is", ids that are 1, 2, ... keep
    their numbers.

    Args:
      name: of the data set, by default that of the source; the reference recipe's thresholds depend on it.
      recipe: "clean"; "reference", the public code's rules, which fix their own thresholds; or "as-is".
      strip_years: take " (1995)" off the end of titles, which makes prompts shorter.
      k_core: every user and item keeps at least this many interactions ("clean" only; default `recipes.defaults`).
      min_positive_rating: drop interactions rated lower ("clean" only; default `recipes.defaults`).
      seed: of the scenarios that draw users.
      max_bad_lines: lines that cannot be used are counted and left out, up to so many.
    Raises:
      UserError: unknown name, damaged or unusable input, nothing left, `out` taken or not writable.
    """
    out = Path(out)
    if recipe not in recipes.RECIPES:
        raise UserError(f"there is no data recipe {recipe!r}: choose {', '.join(recipes.RECIPES)}")
    if recipe != "clean":
        for option, value in (("k_core", k_core), ("min_positive_rating", min_positive_rating)):
            if value is not None:
                raise UserError(f"{option} belongs to the clean recipe, not to the recipe {recipe}")
    if k_core is not None and k_core < 1:
        raise UserError(f"k_core is {k_core}: it must be at least 1")
    if min_positive_rating is not None and not math.isfinite(min_positive_rating):
        raise UserError(f"min_positive_rating is {min_positive_rating}: it must be a number")
    if seed < 0 or max_bad_lines < 0:
        raise UserError("seed and max_bad_lines must be at least 0")
    if name is not None and (name.startswith(".") or set(name) & set("/\\:") or not name.strip()):
        raise UserError(f"{name!r} cannot be the name of a data set: files are called by it")
    named = isinstance(source, str) and source in sources.KNOWN
    source_name = _source_name(source)
    settings = {"source": source_name, "name": name or source_name, "recipe": recipe, "strip_years": strip_years}
    if isinstance(source, Files) and source.columns:
        settings["columns"] = dict(source.columns)
    if recipe == "clean":
        given = {"k_core": k_core, "min_positive_rating": min_positive_rating}
        default = recipes.defaults(_spoken(settings))
        settings |= {key: default[key] if value is None else value for key, value in given.items()}
    settings["seed"] = seed
    existing = _existing(out)
    if existing is not None and named and existing["settings"] == settings:
        return open_dataset(out)
    _refuse(existing, settings, out)

    try:
        reader = _reader(source, cache, console)
        inputs = describe_inputs(reader.paths)
        if existing is not None:  # the same settings; the files may have changed since
            if existing["inputs"] == inputs:
                return open_dataset(out)
            raise UserError(
                f"{out} was prepared from other contents of {source_name}: choose another --out or delete it"
            )
        raw = reader.read(Skipped(max_bad_lines), console)
        return _prepare(raw, settings, inputs, out, console)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or source_name}: {error.strerror or error}") from error


@dataclass(frozen=True)
class _Reader:
    paths: list[Path]
    read: Callable[[Skipped, Any], Raw]  # (bad lines, console)


def _reader(source: str | Files, cache: Path | None, console) -> _Reader:
    """What reads the source; whatever is missing is said here, before anything is read."""
    if isinstance(source, Files):
        for path in source.paths:
            if not path.is_file():
                raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
        if source.reviews is not None:
            return _Reader(source.paths, lambda skipped, c: amazon.read(source.reviews, source.metadata, skipped, c))
        return _Reader(
            source.paths,
            lambda skipped, c: tables.read(
                source.interactions, source.items, skipped, columns=source.columns, console=c
            ),
        )
    if source in sources.KNOWN:
        sources.known(source, "data")  # raises for weights
        return _folder(sources.fetch(source, cache=cache, console=console))
    path = Path(source).expanduser()
    if not path.exists():
        if path.name == source:
            sources.known(source, "data")  # raises, with the closest name
        raise UserError(f"{source} does not exist; {_data_sets()}")
    if not path.is_dir():
        raise UserError(f"{source} is a file: name it with --reviews or --interactions, or give its folder")
    return _folder(path)


def _folder(folder: Path) -> _Reader:
    if release := movielens.find(folder):
        paths = [folder / file for file in release.files]
        return _Reader(paths, lambda skipped, console: movielens.read(folder, console))
    if found := amazon.find(folder):
        paths = [path for path in found if path is not None]
        return _Reader(paths, lambda skipped, console: amazon.read(*found, skipped, console))
    raise UserError(
        f"{folder} holds no data set that is known by its files (MovieLens: {movielens.or_files()}; Amazon: "
        "NAME.json.gz and meta_NAME.json.gz); name single files with --reviews, --metadata or --interactions, --items"
    )


def _prepare(raw: Raw, settings: dict, inputs: list[dict], out: Path, console) -> Dataset:
    frame, skipped, recipe = raw.interactions, raw.skipped, settings["recipe"]
    users, items = (frame[column].to_physical().to_numpy() for column in ("user", "item"))
    times = None if frame["time"].null_count() == frame.height else frame["time"].to_numpy()
    ratings = None if frame["rating"].null_count() == frame.height else frame["rating"].to_numpy()
    per_second = in_seconds(frame["time"])
    user_names, item_names = frame["user"], frame["item"]
    del frame

    cold = np.zeros(len(users), bool)
    no_cold_users = None
    if recipe == "clean":
        thresholds = {key: settings[key] for key in ("k_core", "min_positive_rating")}
        keep, dropped, cleaned = recipes.clean(users, items, times, ratings, **thresholds)
        if settings["k_core"] > 3:
            cold = recipes.cold_rows(users, items, cleaned, keep)
            if not cold.any():
                no_cold_users = "no user that the k-core removed has exactly three interactions, all of items that stay"
        else:
            no_cold_users = f"with k_core {settings['k_core']} a user of three interactions belongs to the core"
    elif recipe == "reference":
        keep, dropped = recipes.reference(users, items, ratings, name=_spoken(settings))
    else:
        keep, dropped = np.ones(len(users), bool), []
    kept = int(keep.sum())
    if kept + sum(entry["rows"] for entry in dropped) != len(keep):
        raise AssertionError("the rows dropped and kept do not add up to the input's")
    if not kept:
        reasons = ", ".join(f"{entry['rows']:,}: {entry['reason']}" for entry in dropped if entry["rows"])
        raise UserError(f"none of the {len(keep):,} rows is left ({reasons}): lower --k-core or --min-positive-rating")

    rows = np.flatnonzero(keep)
    user_ids, user_first = recipes.number(users[rows])
    item_ids, item_first = recipes.number(items[rows])
    user_keys = user_names.gather(rows[user_first]).cast(pl.String)
    item_keys = item_names.gather(rows[item_first]).cast(pl.String)
    cold_items, cold_keys = _cold(users, items, times, cold, items[rows[item_first]], user_names)
    if recipe == "as-is":
        user_ids, user_keys = _as_numbered(user_ids, user_keys)
        item_ids, item_keys = _as_numbered(item_ids, item_keys)
    times, ratings = (None if column is None else column[rows] for column in (times, ratings))
    del users, items, user_names, item_names, keep, cold
    order = recipes.in_order(user_ids, times)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user_ids, minlength=len(user_keys) + 1))])
    item_rows = raw.items(item_keys)
    texts, text_counts = text.item_texts(item_rows, item_keys, recipe=recipe, strip_years=settings["strip_years"])
    text_counts["unusable_lines"] = skipped.of_items
    if skipped.examples and console is not None:
        say(console, f"{skipped.count + skipped.of_items:,} unusable lines left out, the first: {skipped.examples[0]}")
    if skipped.count:
        dropped = [{"reason": "line that cannot be used", "rows": skipped.count}, *dropped]
    return write_dataset(
        out,
        name=settings["name"],
        items=item_ids[order],
        offsets=offsets,
        times=None if times is None else times[order] // per_second,
        ratings=None if ratings is None else ratings[order],
        user_keys=user_keys,
        item_keys=item_keys,
        titles=texts["title"],
        descriptions=texts["description"],
        categories=texts["categories"],
        brands=texts["brand"],
        cold_items=cold_items,
        cold_keys=cold_keys,
        seed=settings["seed"],
        no_cold_users=no_cold_users,
        manifest={
            "settings": settings,
            "inputs": inputs,
            "rows": {"read": raw.rows, "dropped": dropped, "kept": kept},
            "unusable_lines": skipped.examples,
            "texts": text_counts,
            "tie_rule": "rows of one user with equal time stay in the input's order",
            "versions": _versions(),
        },
    )


def _cold(users, items, times, cold, item_codes, user_names) -> tuple[np.ndarray, list[str]]:
    """The cold users' three items each, in time order, and the users' original ids, in order of first appearance.

    item_codes: the code of item id 1, 2, ...
    """
    rows = np.flatnonzero(cold)
    if not len(rows):
        return np.zeros((0, 3), np.int32), []
    ids, first = recipes.number(users[rows])
    order = recipes.in_order(ids, None if times is None else times[rows])
    to_id = np.zeros(int(items.max()) + 1, np.int32)
    to_id[item_codes] = np.arange(1, len(item_codes) + 1)
    return to_id[items[rows[order]]].reshape(-1, 3), user_names.gather(rows[first]).cast(pl.String).to_list()


def _as_numbered(ids: np.ndarray, keys: pl.Series) -> tuple[np.ndarray, pl.Series]:
    """Ids that are their own keys, if the keys are the whole numbers 1 .. n; otherwise as they were."""
    numbers = keys.cast(pl.Int64, strict=False)
    if (
        numbers.null_count()
        or numbers.min() != 1
        or numbers.max() != len(keys)
        or (numbers.cast(pl.String) != keys).any()
    ):
        return ids, keys
    by_number = np.concatenate([[0], numbers.to_numpy()])
    return by_number[ids], pl.Series(range(1, len(keys) + 1)).cast(pl.String)


def _source_name(source: str | Files) -> str:
    """What a data set is called if nobody says otherwise: after its source, or Amazon's review file."""
    if isinstance(source, Files):
        return source.name
    if source in sources.KNOWN:
        return source
    path = Path(source).expanduser()
    found = amazon.find(path) if path.is_dir() and movielens.find(path) is None else None
    return Files(reviews=found[0]).name if found else path.resolve().name


def _spoken(settings: dict) -> str:
    """The names that decide on Beauty and Toys; `amazon-2018-luxury-beauty` as Amazon writes it, Luxury-Beauty."""
    source = settings["source"]
    return f"{settings['name']} {source.title() if source in sources.KNOWN else source}"


def _data_sets() -> str:
    return "known data sets are " + ", ".join(name for name, source in sources.KNOWN.items() if source.kind == "data")


def _existing(out: Path) -> dict | None:
    """The manifest of the data set in `out`; None if `out` is free. Raises if something else is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        return {"settings": manifest["settings"], "inputs": manifest["inputs"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out} is in use and is no prepared data set: choose another --out") from error


def _refuse(existing: dict | None, settings: dict, out: Path) -> None:
    if existing is None or existing["settings"] == settings:
        return
    old = existing["settings"]
    other = ", ".join(f"{key}={old.get(key)}" for key in {**settings, **old} if settings.get(key) != old.get(key))
    raise UserError(f"{out} was prepared with {other}: choose another --out or delete it")


def _versions() -> dict[str, str]:
    versions = {}
    for package in ("allmrec-jax", "polars", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
