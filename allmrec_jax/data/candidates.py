"""Candidate lists: the target and distinct random items, in a seeded random order, the same for every model."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from allmrec_jax.data.batches import Seen, draw_distinct, seen_items
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.errors import UserError

SEED_STREAM = 3  # of tests: folded into the experiment's seed, so that no two stages share random bits
STEP = {"test": 0, "validation": 1}


@partial(jax.jit, static_argnames="count")
def _draw(key, step, rows, users, targets, seen: Seen, count: int):
    others = draw_distinct(key, step, rows, users, seen, count - 1)
    lists = jnp.concatenate([targets[:, None], others], axis=1)

    def order(row: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, 7), step), row)
        return jax.random.permutation(own, count)

    orders = jax.vmap(order)(rows)
    return jnp.take_along_axis(lists, orders, axis=1), jnp.argmin(orders, axis=1)


def draw_candidates(
    key: Key[Array, ""],
    step: int,
    rows: Int[np.ndarray, " rows"],
    users: Int[np.ndarray, " rows"],
    targets: Int[np.ndarray, " rows"],
    seen: Seen,
    count: int,
) -> tuple[Int[np.ndarray, "rows count"], Int[np.ndarray, " rows"]]:
    """(candidates, column of the target), a function of (key, step, global row, user).

    The other `count - 1` items are distinct and uniform over those not in `seen`; `seen` must hold the targets too.

    Raises:
      UserError: if a user leaves too few items, naming the user.
    """
    users, targets = np.asarray(users), np.asarray(targets)
    offsets = np.asarray(seen.offsets)
    left = seen.n_items - (offsets[users + 1] - offsets[users])
    short = np.flatnonzero(left < count - 1)
    if short.size:
        raise UserError(
            f"user {users[short[0]]} leaves only {left[short[0]]} items for {count - 1} random candidates; "
            "ask for fewer candidates"
        )
    candidates, column = _draw(key, step, jnp.asarray(rows), jnp.asarray(users), jnp.asarray(targets), seen, count)
    return np.asarray(candidates), np.asarray(column)


def draw_for_test(
    dataset: Dataset, users: Int[np.ndarray, " users"], *, seed: int, count: int, split: str = "test"
) -> tuple[Int[np.ndarray, "users count"], Int[np.ndarray, " users"]]:
    """As `draw_candidates`: each user's test (or validation) item among items that the user never interacted with.

    Cold users may be among the users. A user's candidates do not depend on who else is tested.

    Raises:
      UserError: if the data set, or a user, leaves too few items.
    """
    if count > dataset.n_items:
        raise UserError(
            f"{count} candidates were asked for, but {dataset.name} has {dataset.n_items:,} items; ask for fewer "
            "candidates"
        )
    key = jax.random.fold_in(jax.random.key(seed), SEED_STREAM)
    items, offsets = dataset.distinct("test")
    cold = np.sort(dataset.cold_items, axis=1)
    first = np.concatenate([np.ones_like(cold[:, :1], bool), cold[:, 1:] != cold[:, :-1]], axis=1)
    offsets = np.concatenate([offsets, offsets[-1] + np.cumsum(first.sum(1))])
    seen = seen_items(np.concatenate([items, cold[first]]), offsets, dataset.n_items)
    return draw_candidates(key, STEP[split], users, users, dataset.targets_of(users, split), seen, count)
