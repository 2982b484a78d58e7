"""Ranking against the whole catalogue, exactly, without a users x items matrix: E goes by in blocks of rows.

Scores are x_u . E_i. On a mesh whose axis `model` cuts the rows of E each device goes through its own.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

BLOCK = 8192


def _blocks(E: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """(E in blocks of rows, filled up with rows of 0; the first id of each block)."""
    count = -(-E.shape[0] // block)
    padded = jnp.pad(E, ((0, count * block - E.shape[0]), (0, 0)))
    return jnp.reshape(padded, (count, block, E.shape[1])), jnp.arange(count) * block


def _scores(x_u: jax.Array, rows: jax.Array) -> jax.Array:
    """x_u . E_i in float32 on every machine, so that an item's score is the same wherever it is computed."""
    return jnp.einsum("ud,id->ui", x_u, rows, precision=jax.lax.Precision.HIGHEST)


@partial(jax.jit, static_argnames="block")
def ranks(
    x_u: Float[Array, "users d"],
    E: Float[Array, "items d"],
    targets: Int[Array, " users"],
    leave_out: Int[Array, "users others"],
    block: int = BLOCK,
) -> tuple[Int[Array, " users"], Int[Array, " users"]]:
    """The rank (0 = first) of each user's target among all items 1 .. n, and among those that are not left out.

    Ties count against the target. The target itself is never left out. E goes by twice: once for the scores of the
    targets, so that these are compared with what the same product gives for the others.

    Args:
      leave_out: item ids, 0 for none; a repeated id counts once. For the new-items-only figure, the history.
    """
    blocks = _blocks(E, block)

    def look(found: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        rows, first = part
        at = (targets - first)[:, None]
        own = jnp.take_along_axis(_scores(x_u, rows), jnp.clip(at, 0, block - 1), 1)
        return jnp.where((at >= 0) & (at < block), own, found), None

    wanted, _ = jax.lax.scan(look, jnp.zeros((x_u.shape[0], 1), x_u.dtype), blocks)
    ordered = jnp.sort(leave_out, axis=1)
    once = (ordered > 0) & (ordered != targets[:, None])
    once = once & jnp.concatenate([jnp.ones_like(once[:, :1]), ordered[:, 1:] != ordered[:, :-1]], axis=1)

    def count(totals: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]):
        rows, first = part
        ids = (first + jnp.arange(block))[None]
        above = (_scores(x_u, rows) >= wanted) & (ids > 0) & (ids < E.shape[0]) & (ids != targets[:, None])
        at = ordered - first
        gone = once & (at >= 0) & (at < block) & jnp.take_along_axis(above, jnp.clip(at, 0, block - 1), 1)
        above = jnp.sum(above, axis=1)
        return (totals[0] + above, totals[1] + above - jnp.sum(gone, axis=1)), None

    none = jnp.zeros(x_u.shape[0], jnp.int32)
    return jax.lax.scan(count, (none, none), blocks)[0]


@partial(jax.jit, static_argnames=("k", "block"))
def top_k(
    x_u: Float[Array, "users d"],
    E: Float[Array, "items d"],
    k: int,
    block: int = BLOCK,
    first: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "users k"], Int[Array, "users k"]]:
    """(scores, ids) of each user's k highest-scoring items, the best first; of equal scores the lower id.

    Args:
      first: id of E's row 0, for the rows of a shard. Id 0 is padding and never among the best.
    """
    none = (jnp.full((x_u.shape[0], k), -jnp.inf), jnp.zeros((x_u.shape[0], k), jnp.int32))

    def merge(best: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]):
        rows, at = part
        ids = at + jnp.arange(block)
        scores = _scores(x_u, rows)
        scores = jnp.where(((ids < E.shape[0]) & (first + ids > 0))[None], scores, -jnp.inf)
        ids = jnp.broadcast_to((first + ids)[None], scores.shape).astype(jnp.int32)
        # The best so far come first: `lax.top_k` takes the earlier of equal ones, which has the lower id.
        scores, ids = jnp.concatenate([best[0], scores], 1), jnp.concatenate([best[1], ids], 1)
        scores, at_best = jax.lax.top_k(scores, k)
        return (scores, jnp.take_along_axis(ids, at_best, 1)), None

    return jax.lax.scan(merge, none, _blocks(E, block))[0]


def sharded_top_k(
    x_u: Float[Array, "users d"], E: Float[Array, "items d"], k: int, mesh: jax.sharding.Mesh, block: int = BLOCK
) -> tuple[Float[Array, "users k"], Int[Array, "users k"]]:
    """As `top_k`, with the rows of E cut over the mesh axis `model`; their number must be a multiple of its size.

    Each device finds the best k of its own rows; only those travel.
    """

    def of_shard(x_u: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        mine = top_k(x_u, rows, k, block, jax.lax.axis_index("model") * rows.shape[0])
        scores, ids = (jax.lax.all_gather(part, "model", axis=1, tiled=True) for part in mine)
        scores, at_best = jax.lax.top_k(scores, k)
        return scores, jnp.take_along_axis(ids, at_best, 1)

    mapped = jax.shard_map(of_shard, mesh=mesh, in_specs=(P(), P("model", None)), out_specs=(P(), P()), check_vma=False)
    return jax.jit(mapped)(x_u, E)
