"""The item table E in training: a step reads some rows, gets their gradients, and moves rows.

Everything here runs inside a mapped function. With `shards` > 1 the rows of E are cut over the mesh axis `model`, and
devices ask each other for rows; ids are global everywhere.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from allmrec_jax.training.state import State, update

AXIS = "model"
MULTIPLE = 128  # the number of rows is a multiple of it, so that any usual number of devices cuts it evenly


def padded(E: Float[Array, "items d"]) -> Float[Array, "rows d"]:
    """E filled up with rows of 0 that no id names."""
    return jnp.pad(E, ((0, -E.shape[0] % MULTIPLE), (0, 0)))


def is_table(path: tuple[Any, ...]) -> bool:
    """Whether a leaf of a `State` is E, or what the optimiser keeps for each element of E."""
    return bool(path) and getattr(path[-1], "key", None) == "E"


def _own(E: jax.Array, ids: jax.Array, shards: int) -> jax.Array:
    """Where the ids stand in this device's rows; one behind the last if they do not."""
    if shards == 1:
        return ids
    at = ids - jax.lax.axis_index(AXIS) * E.shape[0]
    return jnp.where((at >= 0) & (at < E.shape[0]), at, E.shape[0])


def look_up(E: Float[Array, "rows d"], ids: Int[Array, " n"], shards: int = 1) -> Float[Array, "n d"]:
    """E_i of this device's ids."""
    if shards == 1:
        return jnp.take(E, ids, axis=0)
    everyones = jax.lax.all_gather(ids, AXIS, tiled=True)
    found = E.at[_own(E, everyones, shards)].get(mode="fill", fill_value=0)
    return jax.lax.psum_scatter(found, AXIS, tiled=True)


def dense_gradient(
    E: Float[Array, "rows d"], ids: Int[Array, " n"], gradients: Float[Array, "n d"], shards: int = 1
) -> Float[Array, "rows d"]:
    """The gradient of E's rows here from those of what was looked up; row 0, the padding, gets none."""
    gradients = jnp.where(ids[:, None] != 0, gradients, 0)
    return jnp.zeros_like(E).at[_own(E, ids, shards)].add(gradients, mode="drop")


def update_rows(
    state: State,
    gradients: dict[str, Any],
    ids: Int[Array, " n"],
    of_rows: Float[Array, "n d"],
    optimiser: optax.GradientTransformation,
    shards: int = 1,
) -> State:
    """One optimiser step in which of E, and of what the optimiser keeps for E, only the rows looked up take part.

        ids       7  3  7  0        rows moved  3 7, by g_1 and g_0 + g_2;  0 is padding
        of_rows  g0 g1 g2 g3

    Costs as much as there are ids, however long E is. An optimiser that decays what it keeps (Adam's momentum) then
    does so only when a row is looked up, as PyTorch's SparseAdam.
    """
    order = jnp.argsort(ids, stable=True)
    ordered, last = ids[order], state.params["E"].shape[0]
    group = jnp.cumsum(jnp.concatenate([jnp.zeros(1, bool), ordered[1:] != ordered[:-1]]))
    summed = jax.ops.segment_sum(of_rows[order], group, len(ids), indices_are_sorted=True)
    distinct = jnp.zeros_like(ids).at[group].set(ordered)
    at = jnp.where(distinct != 0, _own(state.params["E"], distinct, shards), last)

    def take(path, leaf):
        return leaf.at[at].get(mode="clip") if is_table(path) else leaf

    def put(path, whole, part):
        return whole.at[at].set(part, mode="drop") if is_table(path) else part

    moved = update(jax.tree_util.tree_map_with_path(take, state), gradients | {"E": summed}, optimiser)
    return jax.tree_util.tree_map_with_path(put, state, moved)
