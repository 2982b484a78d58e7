"""Writing a prepared data set: checked, fingerprinted, all or nothing."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Integer

from allmrec_jax.data import scenarios
from allmrec_jax.data.dataset import FORMAT, MANIFEST, OPTIONAL, REQUIRED, Dataset, open_dataset
from allmrec_jax.errors import UserError

Texts = Any  # a sequence of strings (of lists, for categories), None where there is none; or a polars column of these


def write_dataset(
    path: str | Path,
    *,
    name: str,
    items: Integer[np.ndarray, " n_interactions"],
    offsets: Integer[np.ndarray, " offsets"],
    times: Integer[np.ndarray, " n_interactions"] | None,
    ratings: np.ndarray | None,
    user_keys: Texts,
    item_keys: Texts,
    titles: Texts,
    descriptions: Texts,
    categories: Texts,
    brands: Texts | None = None,
    cold_items: Integer[np.ndarray, "n_cold 3"] | None = None,
    cold_keys: Texts = (),
    seed: int = 0,
    no_cold_users: str | None = None,
    manifest: Mapping | None = None,
) -> Dataset:
    """Writes a prepared data set and opens it. All or nothing: a temporary folder beside it, then one rename.

    The keys and texts (sequences, or polars columns) are those of users 1.. and items 1.. (no entry for 0).

    Args:
      cold_items, cold_keys: the cold users' items, and the cold users' original ids.
      seed: of the scenarios that draw users.
      no_cold_users: why the recipe can leave no cold users.
      manifest: is added to the manifest file.
    Raises:
      UserError: `path` exists and is not empty, or cannot be written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already: choose another folder or delete it")
    cold_items = np.zeros((0, 3)) if cold_items is None else cold_items
    arrays = {
        "items": np.ascontiguousarray(items, "<i4"),
        "offsets": np.ascontiguousarray(offsets, "<i8"),
        "cold_items": np.ascontiguousarray(cold_items, "<i4"),
        "times": None if times is None else np.ascontiguousarray(times, "<i8"),
        "ratings": None if ratings is None else np.ascontiguousarray(ratings, "<f4"),
    }
    users = pl.concat([_column("key", user_keys), _column("key", cold_keys)]).to_frame()
    texts = {"key": item_keys, "title": titles, "description": descriptions, "categories": categories}
    texts["brand"] = [None] * len(item_keys) if brands is None else brands
    if len({len(column) for column in texts.values()}) > 1:
        raise ValueError("keys and texts of the items differ in number")
    item_table = pl.DataFrame([_column(*column) for column in texts.items()])
    _check_consistent(arrays, len(user_keys), len(cold_keys), len(item_keys))
    counts = {
        "users": len(user_keys),
        "items": len(item_keys),
        "interactions": len(items),
        "cold_users": len(cold_keys),
    }
    has_text = pl.col("title").is_not_null() | pl.col("description").is_not_null()
    found = scenarios.make(
        Dataset(
            path, {"counts": counts}, *(arrays[key] for key in ("items", "offsets", "times", "ratings", "cold_items"))
        ),
        seed=seed,
        with_text=item_table.select(has_text.sum()).item(),
        with_category=(item_table["categories"].list.len().fill_null(0) > 0).to_numpy(),
        cold_users=no_cold_users,
    )
    contents = {
        "format": FORMAT,
        "name": name,
        "seed": seed,
        "no_cold_users": no_cold_users,
        "counts": counts,
        "has": {key: arrays[key] is not None for key in OPTIONAL},
        "scenarios": {
            key: {
                "users": len(scenario.users),
                "has_items": scenario.items is not None,
                "facts": scenario.facts,
                "reason": scenario.reason,
            }
            for key, scenario in found.items()
        },
        "fingerprint": fingerprint(arrays, users, item_table),
        **(manifest or {}),
    }
    temporary = path.parent / f".{path.name}.tmp-{uuid.uuid4().hex}"
    try:
        (temporary / "scenarios").mkdir(parents=True)
        for key, array in arrays.items():
            if array is not None:
                np.save(temporary / f"{key}.npy", array)
        for key, scenario in found.items():
            np.save(temporary / "scenarios" / f"{key}.users.npy", scenario.users)
            if scenario.items is not None:
                np.save(temporary / "scenarios" / f"{key}.items.npy", scenario.items)
        _write_table(temporary / "users.parquet", users)
        _write_table(temporary / "items.parquet", item_table)
        (temporary / MANIFEST).write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_dataset(path)


def _check_consistent(arrays, n_users: int, n_cold: int, n_items: int) -> None:
    items, offsets, cold = arrays["items"], arrays["offsets"], arrays["cold_items"]
    sound = (
        len(items) > 0
        and len(offsets) == n_users + 2
        and offsets[0] == offsets[1] == 0
        and offsets[-1] == len(items)
        and (np.diff(offsets) >= 0).all()
        and items.min() >= 1
        and items.max() <= n_items
        and cold.shape == (n_cold, 3)
        and cold.min(initial=1) >= 1
        and cold.max(initial=1) <= n_items
        and all(arrays[key] is None or len(arrays[key]) == len(items) for key in OPTIONAL)
    )
    if not sound:
        raise ValueError("items, offsets, keys and texts of the data set do not fit together")


def _column(name: str, values: Texts):
    """A polars column; of strings, but for `categories`, of lists of strings."""
    kind = pl.List(pl.String) if name == "categories" else pl.String
    if isinstance(values, pl.Series):
        return values.cast(kind).alias(name)
    return pl.Series(name, [list(entry) for entry in values] if name == "categories" else list(values), dtype=kind)


def fingerprint(arrays, users, items) -> str:
    """sha256 of arrays (little-endian), then of each text column: lengths in bytes (-1: none), and the text itself."""
    digest = hashlib.sha256(b"allmrec dataset 2\n")
    for name in (*REQUIRED, *OPTIONAL):
        array = arrays[name]
        digest.update(f"{name} {'none' if array is None else array.shape}\n".encode())
        if array is not None and array.size:
            digest.update(memoryview(np.ascontiguousarray(array)).cast("B"))
    for table in (users, items):
        for column in table.iter_columns():
            digest.update(f"{column.name} {len(column)}\n".encode())
            if column.name == "categories":
                digest.update(column.list.len().fill_null(0).to_numpy().astype("<i8").tobytes())
                column = column.list.explode(empty_as_null=False, keep_nulls=False)
            digest.update(column.str.len_bytes().cast(int).fill_null(-1).to_numpy().astype("<i8").tobytes())
            digest.update((column.drop_nulls().str.join("").item() or "").encode())
    return digest.hexdigest()


def _write_table(path: Path, table) -> None:
    try:
        table.write_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise OSError(str(error)) from error
