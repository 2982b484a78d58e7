"""Raw files -> prepared data set: read, filter by recipe, number, order, clean the texts, write."""

import json
from importlib import metadata
from pathlib import Path

import numpy as np

from allmrec_jax.data import recipes, sources
from allmrec_jax.data.dataset import MANIFEST, Dataset, open_dataset, write_dataset
from allmrec_jax.data.describe import describe
from allmrec_jax.errors import UserError

__all__ = ["describe", "prepare"]


def prepare(
    name_or_path: str,
    out: Path,
    *,
    recipe: str = "clean",
    strip_years: bool = False,
    k_core: int = 5,
    min_positive_rating: float | None = None,
    cache: Path | None = None,
    console=None,
) -> Dataset:
    """Prepares a named data set (see `sources.KNOWN`), or a folder of raw files, into `out`.

    If `out` already holds the same data prepared with the same settings, that is opened and nothing is done; anything
    else in `out` is left alone and is an error. Ids are given in order of first appearance among the rows that stay; a
    user's rows are in time order, rows of equal time in the input's order.

    Args:
      recipe: "clean", or "reference" (the public code's rules, which fix their own thresholds).
      strip_years: take " (1995)" off the end of titles, which makes prompts shorter.
      k_core: every user and item keeps at least this many interactions ("clean" only).
      min_positive_rating: drop interactions rated lower ("clean" only).
    Raises:
      UserError: unknown name, damaged or unusable input, nothing left, `out` taken or not writable.
    """
    out = Path(out)
    if recipe not in recipes.RECIPES:
        raise UserError(f"there is no data recipe {recipe!r}: choose {' or '.join(recipes.RECIPES)}")
    if recipe == "reference" and min_positive_rating is not None:
        raise UserError("min_positive_rating belongs to the clean recipe: the reference recipe has a rule of its own")
    if k_core < 1:
        raise UserError(f"k_core is {k_core}: it must be at least 1")
    settings = {"source": str(name_or_path), "recipe": recipe, "strip_years": strip_years}
    if recipe == "clean":
        settings |= {"k_core": k_core, "min_positive_rating": min_positive_rating}
    named = name_or_path in sources.KNOWN
    if not named:
        settings["source"] = Path(name_or_path).resolve().name
    existing = _existing(out)
    if existing is not None and named and existing["settings"] == settings:
        return open_dataset(out)
    _refuse(existing, settings, out)

    try:
        raw = _read(str(name_or_path), cache, console)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or name_or_path}: {error.strerror or error}") from error
    if existing is not None:  # the same settings; a folder's files may have changed since
        if existing["inputs"] == raw.inputs:
            return open_dataset(out)
        raise UserError(f"{out} was prepared from other contents of {name_or_path}: choose another --out or delete it")
    return _prepare(raw, settings, out)


def _prepare(raw, settings: dict, out: Path) -> Dataset:
    frame = raw.interactions
    users, user_names = _codes(frame["user"])
    items, item_names = _codes(frame["item"])
    times = None if frame["time"].null_count() == frame.height else frame["time"].to_numpy()
    ratings = None if frame["rating"].null_count() == frame.height else frame["rating"].to_numpy()

    if settings["recipe"] == "clean":
        thresholds = {key: settings[key] for key in ("k_core", "min_positive_rating")}
        keep, dropped = recipes.clean(users, items, times, ratings, **thresholds)
    else:
        keep, dropped = recipes.reference(users, items, ratings, name=settings["source"])
    kept = int(keep.sum())
    if kept + sum(entry["rows"] for entry in dropped) != len(keep):
        raise AssertionError("the rows dropped and kept do not add up to the input's")
    if not kept:
        reasons = ", ".join(f"{entry['rows']:,}: {entry['reason']}" for entry in dropped if entry["rows"])
        raise UserError(f"none of the {len(keep):,} rows is left ({reasons}): lower k_core or the rating limit")

    user_ids, user_codes = recipes.number(users[keep])
    item_ids, item_codes = recipes.number(items[keep])
    times, ratings = (None if column is None else column[keep] for column in (times, ratings))
    order = recipes.in_order(user_ids, times)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user_ids, minlength=len(user_codes) + 1))])
    item_keys = item_names.gather(item_codes)
    texts, text_counts = _texts(raw.items, item_keys, settings)
    return write_dataset(
        out,
        name=settings["source"],
        items=item_ids[order],
        offsets=offsets,
        times=None if times is None else times[order],
        ratings=None if ratings is None else ratings[order],
        user_keys=user_names.gather(user_codes).to_list(),
        item_keys=item_keys.to_list(),
        **texts,
        manifest={
            "settings": settings,
            "inputs": raw.inputs,
            "rows": {"read": len(keep), "dropped": dropped, "kept": kept},
            "texts": text_counts,
            "tie_rule": "rows of one user with equal time stay in the input's order",
            "versions": _versions(),
        },
    )


def _texts(items, item_keys, settings: dict) -> tuple[dict, dict]:
    """Titles, descriptions and categories of the items, in id order, and what became of them."""
    from allmrec_jax.data import text

    table = item_keys.to_frame("item").join(items, on="item", how="left", maintain_order="left")
    titles, descriptions, junk = table["title"], table["description"], 0
    if settings["recipe"] == "clean":
        titles, junk = text.clean_titles(titles)
        descriptions = text.clean_text(descriptions)
    if settings["strip_years"]:
        titles = text.strip_years(titles)
    counts = {
        "without_title": titles.null_count(),
        "junk_titles": junk,
        "without_description": descriptions.null_count(),
    }
    return {
        "titles": titles.to_list(),
        "descriptions": descriptions.to_list(),
        "categories": [entry or [] for entry in table["categories"].to_list()],
    }, counts


def _read(name_or_path: str, cache: Path | None, console):
    from allmrec_jax.data import movielens

    if name_or_path in sources.KNOWN:
        source = sources.KNOWN[name_or_path]
        if source.kind != "data":
            raise UserError(f"{name_or_path} is {source.kind}, not a data set: {_data_sets()}")
        return movielens.read(sources.fetch(name_or_path, cache=cache, console=console))
    path = Path(name_or_path).expanduser()
    if not path.exists():
        if path.name == name_or_path:
            sources.known(name_or_path)  # raises, with the closest name
        raise UserError(f"{name_or_path} does not exist; {_data_sets()}")
    folder = path if path.is_dir() else path.parent
    return movielens.read(folder)


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


def _codes(column) -> tuple[np.ndarray, "object"]:
    """Integer codes of a string column, and the strings they stand for."""
    import polars as pl

    names = column.unique(maintain_order=True)
    codes = column.replace_strict(names, pl.Series(range(len(names)), dtype=pl.Int64), return_dtype=pl.Int64)
    return codes.to_numpy(), names


def _versions() -> dict[str, str]:
    versions = {}
    for package in ("allmrec-jax", "polars", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
