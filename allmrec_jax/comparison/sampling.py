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


def training_arrays(items: Flat, starts: Offsets, ends: Offsets, n_items: int) -> tuple[dict[str, Any], list[set[int]]]:
    """What `batches.training_rows` reads, of users 1, 2, ...; and each one's items as a set, user 0 having none."""
    sets = [np.unique(items[a:b]) for a, b in zip(starts, ends, strict=True)]
    counts = np.concatenate([[0, 0], np.cumsum([len(s) for s in sets])])
    data = {
        "items": jnp.asarray(items),
        "start": jnp.asarray(starts, jnp.int32),
        "end": jnp.asarray(ends, jnp.int32),
        "users": jnp.arange(1, len(starts) + 1),
        "seen": batches.seen_items(np.concatenate(sets), counts, n_items),
    }
    return data, [set(), *(set(s.tolist()) for s in sets)]


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
