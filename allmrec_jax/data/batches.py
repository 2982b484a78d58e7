"""Which rows a batch holds and which negatives they get: pure functions of (key, step, global row).

There is no iterator and no hidden state. Row b of step t is the same whoever computes it: one process, or one of
eight that computes only its own rows; inside a jitted epoch, or on the host. `key` is a `jax.random.key`; different
kinds of draw from the same key never share random bits.

    stage 0       training_rows     users with replacement, a fresh draw each step; windows, positives, negatives
    stages 1, 2   rows_of_step      a shuffled order each epoch, the last partial batch kept
    all           draw_negatives    items uniform over those that the user does not have
    candidates    draw_distinct     the same without replacement
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Integer, Key, UInt32

Anywhere = Array | np.ndarray
Rows, Windows = Int32[Array, " rows"], Int32[Array, "rows length"]
Index = int | np.integer | Integer[Array, ""]

_USERS, _ORDER, _NEGATIVES, _DISTINCT, _DROPOUT, _ITEMS, _CROP = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
)  # what a draw is for, folded into its key


def _row_keys(key: Key[Array, ""], purpose: int, step: Index, rows: Integer[Array, " rows"]):
    of_step = jax.random.fold_in(jax.random.fold_in(key, purpose), step)
    return jax.vmap(partial(jax.random.fold_in, of_step))(rows)


def _as_rows(rows: int | Integer[Anywhere, " rows"]) -> Integer[Array, " rows"]:
    return jnp.arange(rows) if isinstance(rows, int) else jnp.asarray(rows)


def draw_users(
    key: Key[Array, ""], step: Index, rows: int | Integer[Anywhere, " rows"], eligible_count: int
) -> Int32[Array, " rows"]:
    """Uniform draws with replacement from 0 .. eligible_count - 1, one for each global row.

    The draws are positions in the caller's table of eligible users, not user ids.

    Args:
      step: number of the step since the start of training.
      rows: the global row numbers wanted, or how many (0, 1, ..., rows - 1).
    """
    return _draw_users(key, step, _as_rows(rows), jnp.asarray(eligible_count))


@jax.jit
def _draw_users(key, step, rows, eligible_count):
    keys = _row_keys(key, _USERS, step, rows)
    return jax.vmap(lambda row_key: _below(row_key, 1, eligible_count)[0])(keys)


def training_rows(
    key: Key[Array, ""],
    step: Index,
    rows: int | Integer[Anywhere, " rows"],
    data: Mapping[str, Any],
    length: int,
    negatives: int = 1,
    crop: int | None = None,
) -> tuple[Rows, Windows, Windows, Int32[Array, "rows length negatives"]]:
    """What stage 0 learns from in a step: users, windows, the positive and the negatives after each item of those.

        items 3 9 4 5, length 5      window 0 0 3 9 4     positive 0 0 9 4 5     negative: anything but 3 9 4 5

    A row's last positions are the same at any length.

    Args:
      crop: where users have more than `crop` + 1 items, the window ends anywhere that leaves `crop` before it; else
        always at the last item.
      data: `items` (flat), `start` and `end` of the training items of each eligible user in it, `users` (their ids) and
        `seen`.
    """
    chosen = draw_users(key, step, rows, data["start"].shape[0])
    start, end = data["start"][chosen], data["end"][chosen]
    if crop is not None:
        spare = jnp.maximum(end - start - 1 - crop, 0)
        keys = _row_keys(key, _CROP, step, _as_rows(rows))
        end = end - jax.vmap(lambda row_key, limit: _below(row_key, 1, limit)[0])(keys, spare + 1)
    at = end[:, None] - length + jnp.arange(length)[None]  # positions of the positives
    first = start[:, None]
    positives = jnp.where(at > first, data["items"][jnp.maximum(at, 0)], 0)
    windows = jnp.where(at > first, data["items"][jnp.maximum(at - 1, 0)], 0)
    users = data["users"][chosen]
    drawn = draw_negatives(key, step, rows, users, data["seen"], length * negatives)  # from the last position on
    return users, windows, positives, jnp.reshape(drawn[:, ::-1], (len(users), length, negatives))


def length_tiers(
    lengths: Integer[np.ndarray, " users"], maxlen: int, batch: int, multiple: int, most: int = 3, seed: int = 0
) -> tuple[tuple[int, int], ...]:
    """(width, capacity) of each tier: where the rows of a batch go if sorted by length; the capacities sum to `batch`.

    The tiers are those, at most `most`, with the fewest positions. A tier's rows are in practice never longer than it
    is wide: in 2,000 batches of users drawn with replacement none was. The caller looks, and has another way for the
    batch that is. No tiers if they would save less than a third of the positions.

    Args:
      lengths: of each eligible user's window.
      multiple: capacities are multiples of it, so that devices get equal shares; it divides `batch`.
    """
    multiple *= max(1, batch // multiple // 64)  # the search below is quadratic in the number of groups
    if batch % multiple:
        return ()
    draws = min(2000, 1 + 2**22 // batch)
    drawn = np.minimum(lengths, maxlen)[np.random.default_rng(seed).integers(0, len(lengths), (draws, batch))]
    longest = np.sort(drawn, axis=1).max(axis=0)[multiple - 1 :: multiple]  # of each group of `multiple` ranks
    groups = len(longest)
    longest[-1] = maxlen
    # best[k][n]: (positions, tiers) of the first n groups in k tiers.
    best = [{0: (0, ())}]
    for _ in range(most):
        best.append({})
        for n in range(1, groups + 1):
            width = max(1, int(longest[n - 1]))
            ways = [
                (cost + width * (n - before) * multiple, (*tiers, (width, (n - before) * multiple)))
                for before, (cost, tiers) in best[-2].items()
                if before < n
            ]
            if ways:
                best[-1][n] = min(ways)
    cost, tiers = min(table[groups] for table in best if groups in table)
    return tiers if cost < maxlen * batch * 2 / 3 else ()


def dropout_keys(key: Key[Array, ""], step: Index, rows: int | Integer[Anywhere, " rows"]) -> Key[Array, " rows"]:
    """A key for the dropout of each global row, so that a row's mask does not depend on where it is computed."""
    return _row_keys(key, _DROPOUT, step, _as_rows(rows))


def draw_items(key: Key[Array, ""], step: Index, count: int, n_items: int) -> Int32[Array, " count"]:
    """Items uniform over all, with replacement, for a whole step."""
    of_step = jax.random.fold_in(jax.random.fold_in(key, _ITEMS), step)
    return 1 + _below(of_step, count, jnp.asarray(n_items))


def epoch_order(key: Key[Array, ""], epoch: Index, n: int) -> Int32[Array, " n"]:
    """The shuffled order of 0 .. n - 1 in this epoch."""
    return _epoch_order(key, epoch, n)


@partial(jax.jit, static_argnames="n")
def _epoch_order(key, epoch, n: int):
    of_epoch = jax.random.fold_in(jax.random.fold_in(key, _ORDER), epoch)
    return jax.random.permutation(of_epoch, jnp.arange(n, dtype=jnp.int32))


def steps_per_epoch(n: int, batch: int) -> int:
    """Steps that show each of n examples once; the last one may be partial."""
    return math.ceil(n / batch)


def rows_of_step(
    key: Key[Array, ""],
    step: Index,
    batch: int,
    n: int,
    order: Int32[Anywhere, " n"] | None = None,
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

    gaps: Any  # int32 (flat,); Any, because the leaves of a pytree may be shardings or shapes as well
    offsets: Any  # int32 (n_users + 2,)
    n_items: int
    search_steps: int


def seen_items(distinct: Integer[np.ndarray, " flat"], offsets: Integer[np.ndarray, " offsets"], n_items: int) -> Seen:
    """Prepares each user's distinct items, ascending (`Dataset.distinct(split)` gives both arrays).

    >>> seen = seen_items(np.array([1, 3]), np.array([0, 0, 2]), n_items=3)
    >>> draw_negatives(jax.random.key(0), step=0, rows=1, users=np.array([1]), seen=seen).tolist()
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
    step: Index,
    rows: int | Integer[Anywhere, " rows"],
    users: Integer[Anywhere, " rows"],
    seen: Seen,
    count: int = 1,
) -> Int32[Array, "rows count"]:
    """`count` items for each row, independent, each exactly uniform over the items that the row's user does not have.

    No rejection: of the n - k items that a user with k items does not have, the r-th (from 0) is
    1 + r + #{j : gap_j <= r}, r uniform in [0, n - k):

        n = 7, items 2 3 6:   gaps 1 1 3      not had  1 4 5 7
                                              r = 0 -> 1,   r = 1 -> 1 + 1 + 2 = 4,   r = 3 -> 1 + 3 + 3 = 7

    The draws of a row depend on (key, step, global row, its user) alone, and the first of them not on `count`. A user
    who has every item gets 0, the padding item.

    Args:
      rows: global row numbers, or how many.
      users: the user of each row, indexing `seen.offsets`.
    """
    return _draw_negatives(key, step, _as_rows(rows), jnp.asarray(users), seen, count)


@partial(jax.jit, static_argnames="count")
def _draw_negatives(key, step, rows, users, seen: Seen, count: int):
    keys = _row_keys(key, _NEGATIVES, step, rows)
    left = seen.n_items - (seen.offsets[users + 1] - seen.offsets[users])
    r = jax.vmap(lambda row_key, limit: _below(row_key, count, limit))(keys, jnp.maximum(left, 1))
    return jnp.where(left[:, None] > 0, _not_had(r, users, seen), 0)


def draw_distinct(
    key: Key[Array, ""],
    step: Index,
    rows: int | Integer[Anywhere, " rows"],
    users: Integer[Anywhere, " rows"],
    seen: Seen,
    count: int,
) -> Int32[Array, "rows count"]:
    """As `draw_negatives`, but without replacement: `count` different items, every ordered choice equally likely.

    The j-th draw is uniform over the n - k - j items left; it is carried past the items drawn before it by the same
    rule that carries it past the items that the user has. The caller sees to it that n - k >= count.
    """
    return _draw_distinct(key, step, _as_rows(rows), jnp.asarray(users), seen, count)


@partial(jax.jit, static_argnames="count")
def _draw_distinct(key, step, rows, users, seen: Seen, count: int):
    keys = _row_keys(key, _DISTINCT, step, rows)
    left = seen.n_items - (seen.offsets[users + 1] - seen.offsets[users])

    def choose(row_key, limit):
        def draw(j, state):
            taken, drawn = state  # `taken` ascending, filled up with the largest integer
            r = _below(jax.random.fold_in(row_key, j), 1, jnp.maximum(limit - j, 1))[0]
            r = r + jnp.sum(taken - jnp.arange(count) <= r)
            return jnp.sort(taken.at[j].set(r)), drawn.at[j].set(r)

        none = jnp.full((count,), jnp.iinfo(jnp.int32).max, jnp.int32)
        return jax.lax.fori_loop(0, count, draw, (none, jnp.zeros((count,), jnp.int32)))[1]

    return _not_had(jax.vmap(choose)(keys, left), users, seen)


def _not_had(r: Int32[Array, "rows count"], users: Integer[Array, " rows"], seen: Seen) -> Int32[Array, "rows count"]:
    """The r-th (from 0) of the items that each row's user does not have: 1 + r + #{j : gap_j <= r}.

    An accelerator bisects. A CPU gathers slowly and compares fast: there a row's gaps are compared with all its r.
    """
    below = jax.lax.platform_dependent(
        r, seen.offsets[users], seen.offsets[users + 1], cpu=partial(_compare, seen), default=partial(_bisect, seen)
    )
    return (1 + r + below).astype(jnp.int32)


def _bisect(seen: Seen, r: jax.Array, first: jax.Array, end: jax.Array) -> jax.Array:
    start = jnp.broadcast_to(first[:, None], r.shape)
    stop = jnp.broadcast_to(end[:, None], r.shape)
    for _ in range(seen.search_steps):  # the first position in [start, stop) whose gap exceeds r
        middle = (start + stop) // 2
        searching = start < stop
        below = seen.gaps[middle] <= r
        start = jnp.where(searching & below, middle + 1, start)
        stop = jnp.where(searching & ~below, middle, stop)
    return start - first[:, None]


_GAPS_AT_ONCE = 16  # most users have fewer items


def _compare(seen: Seen, r: jax.Array, first: jax.Array, end: jax.Array) -> jax.Array:
    def some(part: jax.Array, count: jax.Array) -> jax.Array:
        at = first[:, None] + part * _GAPS_AT_ONCE + jnp.arange(_GAPS_AT_ONCE)[None]
        gaps = jnp.where(at < end[:, None], seen.gaps[jnp.minimum(at, len(seen.gaps) - 1)], jnp.iinfo(jnp.int32).max)
        return count + jnp.sum(gaps[:, :, None] <= r[:, None, :], axis=1, dtype=jnp.int32)

    parts = (jnp.max(end - first) + _GAPS_AT_ONCE - 1) // _GAPS_AT_ONCE
    return jax.lax.fori_loop(0, parts, some, jnp.zeros_like(r))


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
