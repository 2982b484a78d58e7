"""Raw files for the tests of those who read them."""

import gzip
import json
from pathlib import Path

import numpy as np
import polars as pl

from allmrec_jax.data.dataset import Dataset


def review(user: str, item: str, rating: float = 5.0, time: int = 0) -> dict:
    return {"overall": rating, "reviewerID": user, "asin": item, "reviewText": 'a "b"\n', "unixReviewTime": time}


def write_lines(path: Path, entries: list, *, compress: bool = True) -> Path:
    """Each entry a line: dicts as JSON, strings as they are."""
    text = "".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries)
    path.write_bytes(gzip.compress(text.encode()) if compress else text.encode())
    return path


def block_of(n: int = 3) -> list[dict]:
    """n users with n items each, in time order."""
    return [review(f"u{user}", f"i{item}", 5.0, 10 * item + user) for user in range(n) for item in range(n)]


def pairs(frame: pl.DataFrame) -> list[tuple]:
    return frame.with_columns(pl.col("user", "item").cast(pl.String)).rows()


def keys_of(data: Dataset) -> dict[str, list[str]]:
    sequences = np.split(data.items, data.offsets[2:-1])
    return {key: [data.item_keys[i] for i in items] for key, items in zip(data.user_keys[1:], sequences, strict=True)}


def public_rule(rows: list[tuple], special: bool) -> str | None:
    """The public code's rule, row by row."""
    users, items = {}, {}
    for user, item, rating, _ in rows:
        counts = 1 if not special or rating >= 3 else 0
        users[user], items[item] = users.get(user, 0) + counts, items.get(item, 0) + counts
    threshold, user_ids, item_ids, sequences = (4 if special else 5), {}, {}, {}
    for user, item, _, time in rows:
        if users[user] >= threshold and items[item] >= threshold:
            u, i = user_ids.setdefault(user, len(user_ids) + 1), item_ids.setdefault(item, len(item_ids) + 1)
            sequences.setdefault(u, []).append((time, i))
    for sequence in sequences.values():
        sequence.sort(key=lambda entry: entry[0])
    return "".join(f"{u} {i}\n" for u, sequence in sequences.items() for _, i in sequence)
