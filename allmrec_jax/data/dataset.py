"""The prepared data set: flat arrays opened by mmap, texts in a columnar file, a manifest.

A folder holds

    items.npy     int32 (n_interactions,)  item ids 1..n_items, one user after the other, each in time order
    offsets.npy   int64 (n_users + 2,)     user u in 1..n_users owns items[offsets[u]:offsets[u + 1]]; user 0 is empty
    times.npy     int64 (n_interactions,)  seconds since 1970, where the input has times
    ratings.npy   float32 (n_interactions,), where the input has ratings
    users.parquet  key                     the original id of user 1, 2, ...
    items.parquet  key, title, description, categories
    manifest.json  name, settings, counts, rows dropped and why, fingerprint, versions

Leave-one-out: of n >= 3 items the last is the test target, the one before the validation target, the rest is for
training; users with fewer than 3 items have training items only.

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Integer

from allmrec_jax.errors import UserError

FORMAT = 1
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared data set. The arrays are read-only views of the files; see the module's docstring."""

    path: Path
    manifest: dict
    items: Int32[np.ndarray, " n_interactions"]
    offsets: Int64[np.ndarray, " offsets"]
    times: Int64[np.ndarray, " n_interactions"] | None
    ratings: Float32[np.ndarray, " n_interactions"] | None

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
        """All items of one user's history for `split`, oldest first."""
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
        """Original id of each user; entry 0 is ""."""
        return ["", *self._user_table["key"]]

    def verify(self) -> None:
        """Reads everything and compares it with the fingerprint. Raises `UserError` if the data set was altered."""
        texts = (self.titles()[1:], self.descriptions()[1:], self.categories()[1:])
        arrays = {"items": self.items, "offsets": self.offsets, "times": self.times, "ratings": self.ratings}
        if _fingerprint(arrays, self.user_keys[1:], self.item_keys[1:], *texts) != self.fingerprint:
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
        expected = {"items": counts["interactions"], "offsets": counts["users"] + 2}
        expected |= {name: counts["interactions"] for name in ("times", "ratings") if manifest["has"][name]}
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{path} has data format {manifest['format']}, this version reads {FORMAT}: prepare it again"
            )
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in expected}
        for name, length in expected.items():
            if arrays[name].shape != (length,):
                raise ValueError(f"{name}.npy has shape {arrays[name].shape}")
        for name in ("items.parquet", "users.parquet"):
            if not (path / name).is_file():
                raise ValueError(f"{name} is missing")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and prepare it again") from error
    return Dataset(path, manifest, arrays["items"], arrays["offsets"], arrays.get("times"), arrays.get("ratings"))


def write_dataset(
    path: str | Path,
    *,
    name: str,
    items: Integer[np.ndarray, " n_interactions"],
    offsets: Integer[np.ndarray, " offsets"],
    times: Integer[np.ndarray, " n_interactions"] | None,
    ratings: np.ndarray | None,
    user_keys: Sequence[str],
    item_keys: Sequence[str],
    titles: Sequence[str | None],
    descriptions: Sequence[str | None],
    categories: Sequence[Sequence[str]],
    manifest: Mapping | None = None,
) -> Dataset:
    """Writes a prepared data set and opens it. All or nothing: a temporary folder beside it, then one rename.

    The keys and texts are those of users 1.. and items 1.. (no entry for 0). `manifest` is added to the manifest file.
    Raises `UserError` if `path` exists and is not empty, or cannot be written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already: choose another folder or delete it")
    arrays = {
        "items": np.ascontiguousarray(items, "<i4"),
        "offsets": np.ascontiguousarray(offsets, "<i8"),
        "times": None if times is None else np.ascontiguousarray(times, "<i8"),
        "ratings": None if ratings is None else np.ascontiguousarray(ratings, "<f4"),
    }
    _check_consistent(arrays, len(user_keys), len(item_keys), (titles, descriptions, categories))
    contents = {
        "format": FORMAT,
        "name": name,
        "counts": {"users": len(user_keys), "items": len(item_keys), "interactions": len(items)},
        "has": {key: arrays[key] is not None for key in ("times", "ratings")},
        "fingerprint": _fingerprint(arrays, user_keys, item_keys, titles, descriptions, categories),
        **(manifest or {}),
    }
    temporary = path.parent / f".{path.name}.tmp-{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        for key, array in arrays.items():
            if array is not None:
                np.save(temporary / f"{key}.npy", array)
        _write_columns(temporary / "users.parquet", {"key": list(user_keys)})
        _write_columns(
            temporary / "items.parquet",
            {
                "key": list(item_keys),
                "title": list(titles),
                "description": list(descriptions),
                "categories": [list(entry) for entry in categories],
            },
        )
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


def _check_consistent(arrays, n_users: int, n_items: int, texts: Iterable[Sequence]) -> None:
    items, offsets = arrays["items"], arrays["offsets"]
    sound = (
        len(items) > 0
        and len(offsets) == n_users + 2
        and offsets[0] == offsets[1] == 0
        and offsets[-1] == len(items)
        and (np.diff(offsets) >= 0).all()
        and items.min() >= 1
        and items.max() <= n_items
        and all(len(text) == n_items for text in texts)
        and all(arrays[key] is None or len(arrays[key]) == len(items) for key in ("times", "ratings"))
    )
    if not sound:
        raise ValueError("items, offsets, keys and texts of the data set do not fit together")


def _fingerprint(arrays, user_keys, item_keys, titles, descriptions, categories) -> str:
    digest = hashlib.sha256(b"allmrec dataset 1\n")
    for name in ("items", "offsets", "times", "ratings"):
        array = arrays[name]
        digest.update(f"{name} {'none' if array is None else len(array)}\n".encode())
        if array is not None:
            digest.update(memoryview(np.ascontiguousarray(array)).cast("B"))
    for key in user_keys:
        digest.update(json.dumps(key).encode() + b"\n")
    for entry in zip(item_keys, titles, descriptions, map(list, categories), strict=True):
        digest.update(json.dumps(entry).encode() + b"\n")
    return digest.hexdigest()


def _read_columns(path: Path) -> dict[str, list]:
    import polars as pl

    try:
        return pl.read_parquet(path).to_dict(as_series=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path} is damaged: delete its folder and prepare the data set again") from error


def _write_columns(path: Path, columns: Mapping[str, list]) -> None:
    import polars as pl

    kinds = {"key": pl.String, "title": pl.String, "description": pl.String, "categories": pl.List(pl.String)}
    try:
        pl.DataFrame(columns, schema={name: kinds[name] for name in columns}).write_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise OSError(str(error)) from error
