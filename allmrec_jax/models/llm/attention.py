"""Attention that all language models here share: which token sees which, and at which position it stands."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

PAD = -1  # branch id of a padding token
PROMPT = 0  # branch id of the tokens that every branch sees

BLOCK, MOST_BLOCKS = 128, 16  # queries that a CPU does at once, at least; blocks of a row, at most
MASKED = -1e30

_platform: ContextVar[str | None] = ContextVar("platform", default=None)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """What is traced inside is meant for that platform, whatever JAX runs on."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def branch_mask(branch: Int[Array, "batch time"]) -> Bool[Array, "batch time time"]:
    """Which key each query attends to when a row holds one prompt and any number of branches.

    A token sees itself and earlier tokens of the prompt and of its own branch; padding sees only itself (so that its
    softmax stays finite) and nobody sees padding. With `branch = [0 0 0 1 1 2 -1]`:

        query  keys: p p p a a b .
        p0           x
        p1           x x
        p2           x x x
        a0           x x x x
        a1           x x x x x
        b0           x x x     x
        .                        x
    """
    time = branch.shape[-1]
    query, key = branch[:, :, None], branch[:, None, :]
    causal = jnp.tril(jnp.ones((time, time), bool))[None]
    return causal & ((key == query) | (key == PROMPT)) & ((key != PAD) | jnp.eye(time, dtype=bool)[None])


def branch_positions(branch: Int[Array, "batch time"]) -> Int[Array, "batch time"]:
    """Position of each token: those of a branch continue the prompt's, and padding does not count (it gets 0)."""
    mask = branch_mask(branch)
    return jnp.where(branch == PAD, 0, mask.sum(-1) - 1)


def window_mask(positions: Int[Array, "batch time"], window: int) -> Bool[Array, "batch time time"]:
    """Keys fewer than `window` positions back (a token itself is 0 back); a branch looks back into its prompt."""
    return positions[:, :, None] - positions[:, None, :] < window


def attend(
    q: Float[Array, "batch time heads width"],
    k: Float[Array, "batch time kv_heads width"],
    v: Float[Array, "batch time kv_heads width"],
    mask: Bool[Array, "batch time time"],
) -> Float[Array, "batch time heads width"]:
    """Scaled dot-product attention, softmax in float32, `heads / kv_heads` queries sharing a key.

    On a CPU in blocks, which leaves out the keys after a block's last query: no mask may let a query see later keys.
    """
    if (_platform.get() or jax.default_backend()) == "cpu":
        return attend_in_blocks(q, k, v, mask)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def attend_in_blocks(
    q: Float[Array, "batch time heads width"],
    k: Float[Array, "batch time kv_heads width"],
    v: Float[Array, "batch time kv_heads width"],
    mask: Bool[Array, "batch time time"],
    block: int = BLOCK,
) -> Float[Array, "batch time heads width"]:
    """The same for causal masks, a block of queries after the other; the backward pass finds the weights again.

        keys:    0 1 2 3     z = log sum exp of a query's scores, all that is kept beside the output
        block 0  x           weights = exp(scores - z)
        block 1  x x         d scores = weights * (d weights - sum(output * d output))
        block 2  x x x
        block 3  x x x x

    Reference: Dao et al. 2022 (FlashAttention), whose backward pass this is.

    Args:
      block: queries at once; more for rows of more than `MOST_BLOCKS` blocks.
    """
    return _blocks(max(block, -(-q.shape[1] // MOST_BLOCKS)), q, k, v, mask)


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """(batch, kv head, queries sharing it, time, width)"""
    return rearrange(x, "b t (g r) w -> b g r t w", g=kv_heads)


def _weights(q: jax.Array, k: jax.Array, mask: jax.Array, z: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(exp(scores - z), z) of a block of queries and the keys up to its last; unless given, z is the row's maximum."""
    scores = jnp.einsum("bgrtw,bgsw->bgrts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * q.shape[-1] ** -0.5, MASKED)
    z = jnp.max(scores, axis=-1, keepdims=True) if z is None else z
    return jnp.exp(scores - z), z


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(block: int, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    return _blocks_forward(block, q, k, v, mask)[0]


def _blocks_forward(block: int, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, tuple]:
    time, kv_heads = q.shape[1], k.shape[2]
    queries, keys, values = _grouped(q, kv_heads), *(rearrange(x, "b s g w -> b g s w") for x in (k, v))
    outputs, zs = [], []
    for start in range(0, time, block):
        end = min(time, start + block)
        weights, most = _weights(queries[..., start:end, :], keys[..., :end, :], mask[:, start:end, :end], None)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights, seen = weights.astype(v.dtype), values[..., :end, :]
        sums = jnp.einsum("bgrts,bgsw->bgrtw", weights, seen, preferred_element_type=jnp.float32)
        outputs.append((sums / total).astype(q.dtype))
        zs.append(most + jnp.log(total))
    output = rearrange(jnp.concatenate(outputs, axis=3), "b g r t w -> b t (g r) w")
    return output, (q, k, v, mask, output, jnp.concatenate(zs, axis=3))


def _blocks_backward(block: int, kept: tuple, towards: jax.Array) -> tuple:
    q, k, v, mask, output, z = kept
    time, kv_heads = q.shape[1], k.shape[2]
    queries, d_output = _grouped(q, kv_heads), _grouped(towards, kv_heads)
    keys, values = (rearrange(x, "b s g w -> b g s w") for x in (k, v))
    shared = jnp.sum(_grouped(output * towards, kv_heads).astype(jnp.float32), axis=-1, keepdims=True)
    d_q, d_k, d_v = [], jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    for start in range(0, time, block):
        end = min(time, start + block)
        here, seen = (Ellipsis, slice(start, end), slice(None)), (Ellipsis, slice(end), slice(None))
        weights, _ = _weights(queries[here], keys[seen], mask[:, start:end, :end], z[here])
        d_weights = jnp.einsum("bgrtw,bgsw->bgrts", d_output[here], values[seen], preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - shared[here]) * q.shape[-1] ** -0.5).astype(q.dtype)
        d_q.append(jnp.einsum("bgrts,bgsw->bgrtw", d_scores, keys[seen]))
        sums = "bgrts,bgrtw->bgsw"
        d_k = d_k.at[seen].add(jnp.einsum(sums, d_scores, queries[here], preferred_element_type=jnp.float32))
        weights = weights.astype(v.dtype)
        d_v = d_v.at[seen].add(jnp.einsum(sums, weights, d_output[here], preferred_element_type=jnp.float32))
    back = rearrange(jnp.concatenate(d_q, axis=3), "b g r t w -> b t (g r) w")
    d_k, d_v = (rearrange(x, "b g s w -> b s g w") for x in (d_k, d_v))
    return back.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_blocks.defvjp(_blocks_forward, _blocks_backward)
