"""What a language model keeps of the tokens that it has read, in a buffer of fixed size.

columns     p0 p1 p2 .  .  | a0 a1 .  .      the prompt with its padding, then room for what follows
positions    0  1  2 -1 -1 |  3  4 -1 -1
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NOTHING = -1


class Cache(NamedTuple):
    """Keys and values of every layer, and at which position each column's token stands (-1: nothing is there)."""

    keys: Float[Array, "layers batch columns kv_heads width"]
    values: Float[Array, "layers batch columns kv_heads width"]
    positions: Int[Array, "batch columns"]


def with_room(
    keys: Float[Array, "layers batch time kv_heads width"],
    values: Float[Array, "layers batch time kv_heads width"],
    positions: Int[Array, "batch time"],
    columns: int,
) -> Cache:
    """A cache of so many columns, the first of which are these tokens."""
    more = columns - keys.shape[2]
    pad = ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))
    positions = jnp.pad(positions, ((0, 0), (0, more)), constant_values=NOTHING)
    return Cache(jnp.pad(keys, pad), jnp.pad(values, pad), positions)


def put(
    cache: jax.Array, new: Float[Array, "batch time kv_heads width"], layer: jax.Array, at: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(the cache with `new` in a layer's columns from `at` on, that layer)"""
    cache = jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), (layer, 0, at, 0, 0))
    return cache, jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
