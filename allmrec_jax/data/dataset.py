"""The prepared data set: flat arrays opened by mmap, texts in a columnar file, a manifest.

A folder holds

    items.npy     int32 (n_interactions,)  item ids 1..n_items, one user after the other, each in time order
    offsets.npy   int64 (n_users + 2,)     user u in 1..n_users owns items[offsets[u]:offsets[u + 1]]; user 0 is empty
    times.npy     int64 (n_interactions,)  seconds since 1970, where the input has times
    ratings.npy   float32 (n_interactions,), where the input has ratings
    cold_items.npy int32 (n_cold, 3)       cold users' items in time order; their ids are n_users + 1, n_users + 2, ...
    users.parquet  key                     the original id of user 1, 2, ..., then of the cold users
    items.parquet  key, title, description, categories, brand
    scenarios/     NAME.users.npy, NAME.items.npy: see `scenarios.py`
    manifest.json  name, settings, counts, rows dropped and why, scenarios, fingerprint, versions

Leave-one-out: of n >= 3 items the last is the test target, the one before the validation target, the rest is for
training; users with fewer than 3 items have training items only. Cold users are in no array but their own, so nothing
that counts or draws can see them.

          start                          start + n
    u:    | t  t  t  t  t  t  t | v | e |
                              |   |   '- target of "test"        its history: all the t and v
                              |   '----- target of "validation"  its history: all the t
                              '--------- target of "train"       its history: the t before it
"""

import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Integer

from allmrec_jax.data import scenarios
from allmrec_jax.data.scenarios import Scenario
from allmrec_jax.errors import UserError

FORMAT = 2
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
_REQUIRED, _OPTIONAL = ("items", "offsets", "cold_items"), ("times", "ratings")
Texts = Any  # a sequence of strings (of lists, for categories), None where there is none; or a polars column of these


@dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared data set. The arrays are read-only views of the files; see the module's docstring."""

    path: Path
    manifest: dict
    items: Int32[np.ndarray, " n_interactions"]
    offsets: Int64[np.ndarray, " offsets"]
    times: Int64[np.ndarray, " n_interactions"] | None
    ratings: Float32[np.ndarray, " n_interactions"] | None
    cold_items: Int32[np.ndarray, "n_cold 3"]

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def n_users(self) -> int:
        return len(self.offsets) - 2

    @property
    def n_items(self) -> int:
        return self.manifest["counts"]["items"]

    @property
    def n_interactions(self) -> int:
        return len(self.items)

    @property
    def fingerprint(self) -> str:
        """sha256 of the content: arrays, original ids and texts. Equal for equal data, wherever it came from."""
        return self.manifest["fingerprint"]

    # ------------------------------------------------------------------------------------------------- sequences

    @functools.cached_property
    def lengths(self) -> Int64[np.ndarray, " users"]:
        """Number of items of each user; entry 0 is 0."""
        return np.diff(self.offsets)

    @functools.cached_property
    def n_train(self) -> Int64[np.ndarray, " users"]:
        """Number of training items of each user: n - 2 if n >= 3, else n; entry 0 is 0."""
        return np.where(self.lengths >= 3, self.lengths - 2, self.lengths)

    def has_target(self, split: str) -> Bool[np.ndarray, " users"]:
        """Whether the user has a target in this split. For "train": at least one training item before it, too."""
        _check_split(split)
        return self.n_train >= 2 if split == "train" else self.lengths >= 3

    def history_end(self, split: str) -> Int64[np.ndarray, " users"]:
        """Where each user's history for `split` ends: a position in `items`, exclusive; indexed by user id.

        It is the position of the split's target, where there is one (`has_target`). The history of a user without a
        validation or test target is everything the user has.
        """
        _check_split(split)
        starts = self.offsets[:-1]
        if split == "train":
            return starts + np.maximum(self.n_train - 1, 0)
        back = {"validation": 2, "test": 1}[split]
        return starts + np.where(self.lengths >= 3, self.lengths - back, self.lengths)

    def targets(self, split: str) -> Int32[np.ndarray, " users"]:
        """Each user's target item of `split`, 0 where there is none."""
        ends = np.minimum(self.history_end(split), self.n_interactions - 1)
        return np.where(self.has_target(split), self.items[ends], 0).astype(np.int32)

    def windows(
        self, ends: Integer[np.ndarray, " rows"], length: int, users: Integer[np.ndarray, " rows"] | None = None
    ) -> Int32[np.ndarray, "rows length"]:
        """The last `length` items before each end, padded with 0 on the LEFT.

        Args:
          ends: positions in `items`, exclusive, as `history_end` gives them.
          users: the user each row belongs to; default 0, 1, ..., n_users, to go with a whole `history_end(split)`.

        A window never reaches into another user's items:

            items ... | 7 8 | 3 9 4 5 | ...   end at 4, length 4  ->  0 3 9 4
        """
        ends = np.asarray(ends, np.int64)
        users = np.arange(len(ends)) if users is None else np.asarray(users)
        if users.shape != ends.shape or (len(users) and (users.min() < 0 or users.max() > self.n_users)):
            raise ValueError(f"one user in 0..{self.n_users} for each end, please")
        positions = ends[:, None] + np.arange(-length, 0)
        owned = positions >= self.offsets[users][:, None]
        return np.where(owned, self.items[np.where(owned, positions, 0)], 0).astype(np.int32, copy=False)

    def history(self, user: int, split: str = "test") -> Int32[np.ndarray, " length"]:
        """All items of one user's history for `split`, oldest first. A cold user's is the first two of the three."""
        if user > self.n_users:
            return np.asarray(self.cold_items[user - self.n_users - 1, :-1])
        return np.asarray(self.items[self.offsets[user] : self.history_end(split)[user]])

    @functools.cached_property
    def _is_train(self) -> Bool[np.ndarray, " n_interactions"]:
        end = np.repeat(self.offsets[:-1] + self.n_train, self.lengths)
        return np.arange(self.n_interactions) < end

    def users_of_items(self) -> Int32[np.ndarray, " n_interactions"]:
        """The user of each entry of `items`."""
        return np.repeat(np.arange(self.n_users + 1, dtype=np.int32), self.lengths)

    def train_counts(self) -> Int64[np.ndarray, " items"]:
        """Training interactions of each item; entry 0 is 0."""
        return np.bincount(self.items[self._is_train], minlength=self.n_items + 1)

    def distinct(self, split: str = "train") -> tuple[Int32[np.ndarray, " flat"], Int64[np.ndarray, " offsets"]]:
        """Each user's distinct items, ascending, as a flat array with offsets.

        "train": of the training items; "validation": plus the validation item; "test": plus the test item, i.e.
        everything that the user ever interacted with.
        """
        _check_split(split)
        keep = np.ones(self.n_interactions, bool) if split == "test" else self._is_train.copy()
        if split == "validation":
            keep[self.history_end(split)[self.has_target(split)]] = True
        pairs = np.unique(self.users_of_items()[keep].astype(np.int64) * (self.n_items + 1) + self.items[keep])
        users, items = np.divmod(pairs, self.n_items + 1)
        counts = np.bincount(users, minlength=self.n_users + 1)
        return items.astype(np.int32), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    # ----------------------------------------------------------------------------------------------------- texts

    @functools.cached_property
    def _item_table(self) -> dict[str, list]:
        return _read_columns(self.path / "items.parquet")

    @functools.cached_property
    def _user_table(self) -> dict[str, list]:
        return _read_columns(self.path / "users.parquet")

    def titles(self) -> list[str | None]:
        """Title of each item, None where it has none; entry 0 is None."""
        return [None, *self._item_table["title"]]

    def descriptions(self) -> list[str | None]:
        """Description of each item, None where it has none; entry 0 is None."""
        return [None, *self._item_table["description"]]

    def categories(self) -> list[list[str]]:
        """Categories (genres) of each item; entry 0 is empty."""
        return [[], *(list(entry) if entry is not None else [] for entry in self._item_table["categories"])]

    @functools.cached_property
    def item_keys(self) -> list[str]:
        """Original id of each item; entry 0 is ""."""
        return ["", *self._item_table["key"]]

    @functools.cached_property
    def user_keys(self) -> list[str]:
        """Original id of each user, then of each cold user; entry 0 is ""."""
        return ["", *self._user_table["key"]]

    def brands(self) -> list[str | None]:
        """Brand of each item, None where it has none; entry 0 is None."""
        return [None, *self._item_table["brand"]]

    # ------------------------------------------------------------------------------------------------- scenarios

    def scenario(self, name: str) -> Scenario:
        """A stored scenario. Raises `UserError` if it is unknown, or does not apply to this data set."""
        known = self.manifest["scenarios"]
        if name not in known:
            raise UserError(f"there is no scenario {name!r}: choose among {', '.join(known)}")
        if known[name]["reason"] is not None:
            raise UserError(f"{name} does not apply to {self.name}: {known[name]['reason']}")
        stem = self.path / "scenarios" / name
        items = _load(Path(f"{stem}.items.npy")) if known[name]["has_items"] else None
        return Scenario(_load(Path(f"{stem}.users.npy")), items, known[name]["facts"])

    def verify(self) -> None:
        """Reads everything and compares it with the fingerprint. Raises `UserError` if the data set was altered."""
        arrays = {name: getattr(self, name) for name in (*_REQUIRED, *_OPTIONAL)}
        tables = [_read_table(self.path / f"{name}.parquet") for name in ("users", "items")]
        if _fingerprint(arrays, *tables) != self.fingerprint:
            raise UserError(f"{self.path} was altered since it was prepared: delete it and prepare it again")


def open_dataset(path: str | Path) -> Dataset:
    """Opens a prepared data set, in milliseconds at any size. Raises `UserError` if it is none or incomplete."""
    path = Path(path)
    if not (path / MANIFEST).is_file():
        what = "does not exist" if not path.exists() else "is not a prepared data set"
        raise UserError(f"{path} {what}: make one with `allmrec data prepare NAME --out {path}`")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        counts = manifest["counts"]
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{path} has data format {manifest['format']}, this version reads {FORMAT}: delete it and "
                "prepare it again"
            )
        interactions = (counts["interactions"],)
        expected = {"items": interactions, "offsets": (counts["users"] + 2,), "cold_items": (counts["cold_users"], 3)}
        expected |= {name: interactions for name in _OPTIONAL if manifest["has"][name]}
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in expected}
        for name, shape in expected.items():
            if arrays[name].shape != shape:
                raise ValueError(f"{name}.npy has shape {arrays[name].shape}")
        for name in ("items.parquet", "users.parquet"):
            if not (path / name).is_file():
                raise ValueError(f"{name} is missing")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and prepare it again") from error
    return Dataset(
        path, manifest, *(arrays.get(name) for name in ("items", "offsets", "times", "ratings", "cold_items"))
    )


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
    import polars as pl

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
        with_category=item_table.select((pl.col("categories").list.len() > 0).sum()).item(),
        cold_users=no_cold_users,
    )
    contents = {
        "format": FORMAT,
        "name": name,
        "seed": seed,
        "no_cold_users": no_cold_users,
        "counts": counts,
        "has": {key: arrays[key] is not None for key in _OPTIONAL},
        "scenarios": {
            key: {
                "users": len(scenario.users),
                "has_items": scenario.items is not None,
                "facts": scenario.facts,
                "reason": scenario.reason,
            }
            for key, scenario in found.items()
        },
        "fingerprint": _fingerprint(arrays, users, item_table),
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


# ------------------------------------------------------------------------------------------------------- helpers


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, not {split!r}")


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
        and all(arrays[key] is None or len(arrays[key]) == len(items) for key in _OPTIONAL)
    )
    if not sound:
        raise ValueError("items, offsets, keys and texts of the data set do not fit together")


def _column(name: str, values: Texts):
    """A polars column; of strings, but for `categories`, of lists of strings."""
    import polars as pl

    kind = pl.List(pl.String) if name == "categories" else pl.String
    if isinstance(values, pl.Series):
        return values.cast(kind).alias(name)
    return pl.Series(name, [list(entry) for entry in values] if name == "categories" else list(values), dtype=kind)


def _fingerprint(arrays, users, items) -> str:
    """sha256 of arrays (little-endian), then of each text column: lengths in bytes (-1: none), and the text itself."""
    digest = hashlib.sha256(b"allmrec dataset 2\n")
    for name in (*_REQUIRED, *_OPTIONAL):
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


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged: delete its folder and prepare the data set again") from error


def _read_table(path: Path):
    import polars as pl

    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path} is damaged: delete its folder and prepare the data set again") from error


def _read_columns(path: Path) -> dict[str, list]:
    return _read_table(path).to_dict(as_series=False)


def _write_table(path: Path, table) -> None:
    import polars as pl

    try:
        table.write_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise OSError(str(error)) from error
