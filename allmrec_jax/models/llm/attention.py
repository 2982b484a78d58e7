"""Attention that all language models here share: which token sees which, and at which position it stands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PAD = -1  # branch id of a padding token
PROMPT = 0  # branch id of the tokens that every branch sees


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
    """Scaled dot-product attention, softmax in float32, `heads / kv_heads` queries sharing a key."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
