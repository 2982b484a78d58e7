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

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Integer

from allmrec_jax.data.scenarios import Scenario
from allmrec_jax.errors import UserError

FORMAT = 2
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
REQUIRED, OPTIONAL = ("items", "offsets", "cold_items"), ("times", "ratings")


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
    trained_on: Integer[np.ndarray, " some"] | None = None
    """The only users that training, counting and validation see; None: all of them. Test targets are there for all."""

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
        """Number of training items of each user: n - 2 if n >= 3, else n; entry 0 is 0. 0 for who is not trained on."""
        return np.where(self._may_train, self._first_held_out, 0)

    @property
    def n_trained(self) -> int:
        """How many users there are to train on."""
        return self.n_users if self.trained_on is None else len(self.trained_on)

    @functools.cached_property
    def _may_train(self) -> Bool[np.ndarray, " users"]:
        users = np.arange(self.n_users + 1)
        return np.ones(len(users), bool) if self.trained_on is None else np.isin(users, self.trained_on)

    @functools.cached_property
    def _first_held_out(self) -> Int64[np.ndarray, " users"]:
        """Where in each user's sequence the validation item stands, or the sequence ends."""
        return np.where(self.lengths >= 3, self.lengths - 2, self.lengths)

    def few_shot(self, k: int) -> "Dataset":
        """The same with `k` users to train on, those of the stored scenario `few-shot-k`, and everybody to test.

        Raises:
          UserError: if there is no such scenario, or it does not apply.
        """
        return dataclasses.replace(self, trained_on=np.asarray(self.scenario(f"few-shot-{k}").users))

    def has_target(self, split: str) -> Bool[np.ndarray, " users"]:
        """Whether the user has a target in this split. For "train": at least one training item before it, too."""
        _check_split(split)
        if split == "train":
            return self.n_train >= 2
        return (self.lengths >= 3) & (self._may_train | (split == "test"))

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

    def examples(
        self, targets: Literal["last", "all"] = "last", *, single: bool = False
    ) -> tuple[Integer[np.ndarray, " rows"], Integer[np.ndarray, " rows"], Int32[np.ndarray, " rows"]]:
        """(users, ends, targets) to train on: an item, and the history before it, which ends there.

        Args:
          targets: each user's last training item, or each training item that has another before it.
          single: with a row, too, for users with one training item: an empty history and item 0 as the target.

        Raises:
          UserError: if there is nobody.
        """
        n_train = self.n_train
        users = np.flatnonzero(n_train > 0 if single else self.has_target("train"))
        if not len(users):
            raise UserError(f"{self.name}: no user has two training items, so there is nothing to train on")
        if targets == "last":
            return users, self.history_end("train")[users], self.targets("train")[users]
        rows = np.maximum(n_train[users] - 1, 1)
        users = np.repeat(users, rows)
        at = np.arange(len(users)) - np.repeat(np.cumsum(rows) - rows, rows)  # 0, 1, ... within each user
        alone = n_train[users] == 1
        ends = self.offsets[users] + at + ~alone
        return users, ends, np.where(alone, 0, self.items[ends]).astype(np.int32)

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

    def sequence(self, user: int) -> Int32[np.ndarray, " length"]:
        """Everything that a user (also a cold one) interacted with, oldest first."""
        if user > self.n_users:
            return np.asarray(self.cold_items[user - self.n_users - 1])
        return np.asarray(self.items[self.offsets[user] : self.offsets[user + 1]])

    def histories(
        self, users: Integer[np.ndarray, " rows"], length: int, split: str = "test"
    ) -> Int32[np.ndarray, "rows length"]:
        """The last `length` items of users' histories for `split`, padded with 0 on the left; cold users may be among
        them, whose history is the first two of their three items."""
        users = np.asarray(users)
        cold = users > self.n_users
        known = np.where(cold, 0, users)
        found = self.windows(self.history_end(split)[known], length, known)
        if cold.any():
            two = self.cold_items[users[cold] - self.n_users - 1, :2]
            found[cold] = np.pad(two, ((0, 0), (max(0, length - 2), 0)))[:, -length:]
        return found

    def targets_of(self, users: Integer[np.ndarray, " rows"], split: str = "test") -> Int32[np.ndarray, " rows"]:
        """As `targets(split)[users]`; cold users, whose target is the last of their three items, may be among them."""
        users = np.asarray(users)
        cold = users > self.n_users
        found = self.targets(split)[np.where(cold, 0, users)]
        found[cold] = self.cold_items[users[cold] - self.n_users - 1, 2]
        return found

    def history(self, user: int, split: str = "test") -> Int32[np.ndarray, " length"]:
        """All items of one user's history for `split`, oldest first. A cold user's is the first two of the three."""
        if user > self.n_users:
            return self.sequence(user)[:-1]
        return np.asarray(self.items[self.offsets[user] : self.history_end(split)[user]])

    @functools.cached_property
    def is_train(self) -> Bool[np.ndarray, " n_interactions"]:
        """Whether each entry of `items` is a training item."""
        end = np.repeat(self.offsets[:-1] + self.n_train, self.lengths)
        return np.arange(self.n_interactions) < end

    def users_of_items(self) -> Int32[np.ndarray, " n_interactions"]:
        """The user of each entry of `items`."""
        return np.repeat(np.arange(self.n_users + 1, dtype=np.int32), self.lengths)

    def train_counts(self) -> Int64[np.ndarray, " items"]:
        """Training interactions of each item; entry 0 is 0."""
        return np.bincount(self.items[self.is_train], minlength=self.n_items + 1)

    def distinct(self, split: str = "train") -> tuple[Int32[np.ndarray, " flat"], Int64[np.ndarray, " offsets"]]:
        """Each user's distinct items, ascending, as a flat array with offsets, also of users who are not trained on.

        "train": of the items before the validation item; "validation": with that; "test": with the test item, too, i.e.
        everything that the user ever interacted with.
        """
        _check_split(split)
        ends = {"train": self._first_held_out, "test": self.lengths}.get(split)
        if ends is None:
            ends = np.where(self.lengths >= 3, self.lengths - 1, self.lengths)
        keep = np.arange(self.n_interactions) < np.repeat(self.offsets[:-1] + ends, self.lengths)
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
        from allmrec_jax.data.writer import fingerprint

        arrays = {name: getattr(self, name) for name in (*REQUIRED, *OPTIONAL)}
        tables = [_read_table(self.path / f"{name}.parquet") for name in ("users", "items")]
        if fingerprint(arrays, *tables) != self.fingerprint:
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
        expected |= {name: interactions for name in OPTIONAL if manifest["has"][name]}
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


# ------------------------------------------------------------------------------------------------------- helpers


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, not {split!r}")


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged: delete its folder and prepare the data set again") from error


def _read_table(path: Path):
    import polars as pl

    try:
        return pl.read_parquet(path, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path} is damaged: delete its folder and prepare the data set again") from error


def _read_columns(path: Path) -> dict[str, list]:
    return _read_table(path).to_dict(as_series=False)
