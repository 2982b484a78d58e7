"""Which rows a batch holds and which negatives they get: pure functions of (key, step, global row).

There is no iterator and no hidden state. Row b of step t is the same whoever computes it: one process, or one of
eight that computes only its own rows; inside a jitted epoch, or on the host. `key` is a `jax.random.key`; different
kinds of draw from the same key never share random bits.

    stage 0       draw_users        users with replacement, a fresh draw each step
    stages 1, 2   rows_of_step      a shuffled order each epoch, the last partial batch kept
    all           draw_negatives    items uniform over those that the user does not have
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Integer, Key, UInt32

_USERS, _ORDER, _NEGATIVES = 1, 2, 3  # what a draw is for, folded into its key


def _row_keys(key: Key[Array, ""], purpose: int, step: Int[Array, ""] | int, rows: Int[Array, " rows"]):
    of_step = jax.random.fold_in(jax.random.fold_in(key, purpose), step)
    return jax.vmap(partial(jax.random.fold_in, of_step))(rows)


def _as_rows(rows: int | Integer[Array, " rows"]) -> Integer[Array, " rows"]:
    return jnp.arange(rows) if isinstance(rows, int) else jnp.asarray(rows)


def draw_users(
    key: Key[Array, ""], step: Int[Array, ""] | int, rows: int | Int[Array, " rows"], eligible_count: int
) -> Int32[Array, " rows"]:
    """Uniform draws with replacement from 0 .. eligible_count - 1, one for each global row.

    The draws are positions in the caller's table of eligible users, not user ids.

    Args:
      step: number of the step since the start of training.
      rows: the global row numbers wanted, or how many (0, 1, ..., rows - 1).
    """
    keys = _row_keys(key, _USERS, step, _as_rows(rows))
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, eligible_count, jnp.int32))(keys)


def epoch_order(key: Key[Array, ""], epoch: Int[Array, ""] | int, n: int) -> Int32[Array, " n"]:
    """The shuffled order of 0 .. n - 1 in this epoch."""
    of_epoch = jax.random.fold_in(jax.random.fold_in(key, _ORDER), epoch)
    return jax.random.permutation(of_epoch, jnp.arange(n, dtype=jnp.int32))


def steps_per_epoch(n: int, batch: int) -> int:
    """Steps that show each of n examples once; the last one may be partial."""
    return math.ceil(n / batch)


def rows_of_step(
    key: Key[Array, ""],
    step: Int[Array, ""] | int,
    batch: int,
    n: int,
    order: Int32[Array, " n"] | None = None,
) -> tuple[Int32[Array, " batch"], Bool[Array, " batch"]]:
    """The examples of a step in shuffled epochs, and which of them are real.

    Every example comes exactly once an epoch. If `batch` does not divide n the epoch's last batch is filled up with
    example `order[0]`, marked as not real.

        n = 5, batch = 2:   order 3 0 4 1 2   ->   (3 0) (4 1) (2 3)     real: (1 1) (1 1) (1 0)

    Args:
      step: number of the step since the start of training; epoch = step // steps_per_epoch(n, batch).
      order: `epoch_order` of that epoch, if the caller has it: making it costs a sort of n numbers.
    """
    steps = steps_per_epoch(n, batch)
    if order is None:
        order = epoch_order(key, step // steps, n)
    positions = (step % steps) * batch + jnp.arange(batch)
    real = positions < n
    return jnp.asarray(order)[jnp.where(real, positions, 0)], real


@partial(jax.tree_util.register_dataclass, data_fields=["gaps", "offsets"], meta_fields=["n_items", "search_steps"])
@dataclass(frozen=True)
class Seen:
    """Which items each user has, laid out for drawing from the others. Made by `seen_items`.

    With s_0 < s_1 < ... the user's distinct items, gap_j = s_j - 1 - j is the number of items below s_j that the user
    does NOT have; it never decreases with j. User u owns gaps[offsets[u] : offsets[u + 1]].
    """

    gaps: Int32[Array, " flat"]
    offsets: Int32[Array, " n_users+2"]
    n_items: int
    search_steps: int


def seen_items(
    distinct: Integer[np.ndarray, " flat"], offsets: Integer[np.ndarray, " n_users+2"], n_items: int
) -> Seen:
    """Prepares each user's distinct items, ascending (`Dataset.distinct(split)` gives both arrays).

    >>> draw_negatives(jax.random.key(0), 0, 1, [1], seen_items(np.array([1, 3]), np.array([0, 0, 2]), 3)).tolist()
    [[2]]
    """
    distinct, offsets = np.asarray(distinct), np.asarray(offsets)
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError("more than 2^31 (user, item) pairs do not fit one Seen: split the users")
    counts = np.diff(offsets)
    rank = np.arange(len(distinct)) - np.repeat(offsets[:-1], counts)
    gaps = distinct - 1 - rank
    inside = rank[1:] > 0
    if len(distinct) and (distinct.min() < 1 or distinct.max() > n_items or (np.diff(distinct)[inside] <= 0).any()):
        raise ValueError("each user's items must be distinct, ascending and within 1..n_items")
    gaps = np.concatenate([gaps, [0]]).astype(np.int32)  # never empty, so that gathering is defined
    return Seen(
        jnp.asarray(gaps), jnp.asarray(offsets, jnp.int32), int(n_items), int(counts.max(initial=0)).bit_length()
    )


def draw_negatives(
    key: Key[Array, ""],
    step: Int[Array, ""] | int,
    rows: int | Int[Array, " rows"],
    users: Int[Array, " rows"],
    seen: Seen,
    count: int = 1,
) -> Int32[Array, "rows count"]:
    """`count` items for each row, independent, each exactly uniform over the items that the row's user does not have.

    No rejection: of the n - k items that a user with k items does not have, the r-th (from 0) is
    1 + r + #{j : gap_j <= r}, r uniform in [0, n - k), and the number is found by bisection:

        n = 7, items 2 3 6:   gaps 1 1 3      not had  1 4 5 7
                                              r = 0 -> 1,   r = 1 -> 1 + 1 + 2 = 4,   r = 3 -> 1 + 3 + 3 = 7

    The draws of a row depend on (key, step, global row, its user) alone, and the first of them not on `count`. A user
    who has every item gets 0, the padding item.

    Args:
      rows: global row numbers, or how many.
      users: the user of each row, indexing `seen.offsets`.
    """
    users = jnp.asarray(users)
    keys = _row_keys(key, _NEGATIVES, step, _as_rows(rows))
    low, high = seen.offsets[users], seen.offsets[users + 1]
    left = seen.n_items - (high - low)
    r = jax.vmap(lambda row_key, limit: _below(row_key, count, limit))(keys, jnp.maximum(left, 1))
    start = jnp.broadcast_to(low[:, None], r.shape)
    stop = jnp.broadcast_to(high[:, None], r.shape)
    first = start
    for _ in range(seen.search_steps):  # the first position in [start, stop) whose gap exceeds r
        middle = (start + stop) // 2
        searching = start < stop
        below = seen.gaps[middle] <= r
        start = jnp.where(searching & below, middle + 1, start)
        stop = jnp.where(searching & ~below, middle, stop)
    return jnp.where(left[:, None] > 0, 1 + r + (start - first), 0).astype(jnp.int32)


def _below(key: Key[Array, ""], count: int, limit: Int[Array, ""]) -> Int32[Array, " count"]:
    """`count` uniform integers in [0, limit): floor(x limit / 2^64) of 64 random bits x; the bias is < limit / 2^64."""
    high, low = jnp.moveaxis(jax.random.bits(key, (count, 2), jnp.uint32), -1, 0)
    limit = limit.astype(jnp.uint32)
    top, middle = _product(high, limit)
    carried, _ = _product(low, limit)
    return (top + (middle + carried < middle).astype(jnp.uint32)).astype(jnp.int32)


def _product(a: UInt32[Array, " count"], b: UInt32[Array, ""]):
    """The upper and the lower 32 bits of a b, without 64-bit integers."""
    half = jnp.uint32(0xFFFF)
    a_high, a_low, b_high, b_low = a >> 16, a & half, b >> 16, b & half
    cross, cross2 = a_low * b_high, a_high * b_low
    carry = ((a_low * b_low) >> 16) + (cross & half) + (cross2 & half)
    return a_high * b_high + (cross >> 16) + (cross2 >> 16) + (carry >> 16), a * b
