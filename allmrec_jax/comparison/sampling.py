"""What the benchmarks share: generated users, and how the public code draws a row of a training batch."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from allmrec_jax.data import batches

Flat, Offsets = Int[np.ndarray, " flat"], Int[np.ndarray, " offsets"]


def popular_items(rng: np.random.Generator, count: int, n_items: int) -> Flat:
    """`count` item ids by a power law."""
    return ((rng.pareto(0.9, count) * n_items / 50).astype(int) % n_items + 1).astype(np.int32)


def training_arrays(items: Flat, starts: Offsets, ends: Offsets, n_items: int) -> dict[str, Any]:
    """What `batches.training_rows` reads, of users 1, 2, ... whose items stand one user's after the other's."""
    users, last = len(starts), np.repeat(ends, np.diff(np.append(starts, len(items))))
    owner = np.repeat(np.arange(users), np.diff(np.append(starts, len(items))))
    kept = np.arange(len(items)) < last
    pairs = np.unique(owner[kept] * (n_items + 1) + items[kept])
    counts = np.bincount(pairs // (n_items + 1), minlength=users)
    return {
        "items": jnp.asarray(items),
        "start": jnp.asarray(starts, jnp.int32),
        "end": jnp.asarray(ends, jnp.int32),
        "users": jnp.arange(1, users + 1),
        "seen": batches.seen_items(pairs % (n_items + 1), np.concatenate([[0, 0], np.cumsum(counts)]), n_items),
    }


def owned_items(items: Flat, starts: Offsets, ends: Offsets) -> list[set[int]]:
    """Each user's items, user 0 having none."""
    return [set(), *(set(items[a:b].tolist()) for a, b in zip(starts, ends, strict=True))]


def draw_row(rng: np.random.Generator, sequence: list[int], owned: set[int], n_items: int, maxlen: int) -> np.ndarray:
    """(3, maxlen): window, positives and negatives of one user, position by position from the last."""
    drawn, following, at = np.zeros((3, maxlen), np.int64), sequence[-1], maxlen - 1
    for item in reversed(sequence[:-1]):
        negative = int(rng.integers(1, n_items + 1))
        while negative in owned:
            negative = int(rng.integers(1, n_items + 1))
        drawn[:, at] = item, following, negative
        following, at = item, at - 1
        if at < 0:
            break
    return drawn
