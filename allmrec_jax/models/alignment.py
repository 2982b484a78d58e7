"""f_I and f_T: the two auto-encoders that align collaborative and text knowledge (paper, section 4.1).

e = sigmoid(W1 E + b1),  E' = W2 e + b2      (f_I, d -> d' -> d)
q = sigmoid(V1 Q + c1),  Q' = V2 q + c2      (f_T, text width -> d' -> text width)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from allmrec_jax.models.params import Parameter, uniform


def describe(width: int, joint: int) -> dict[str, Any]:
    """One auto-encoder, `width` -> `joint` -> `width`."""
    return {
        "encode": {
            "kernel": Parameter((width, joint), (None, None), uniform(width), "fc1.weight", "o i -> i o"),
            "bias": Parameter((joint,), (None,), uniform(width), "fc1.bias"),
        },
        "decode": {
            "kernel": Parameter((joint, width), (None, None), uniform(joint), "fc2.weight", "o i -> i o"),
            "bias": Parameter((width,), (None,), uniform(joint), "fc2.bias"),
        },
    }


def encode(params: Any, x: Float[Array, "batch width"]) -> Float[Array, "batch joint"]:
    """e or q."""
    return jax.nn.sigmoid(x @ params["encode"]["kernel"] + params["encode"]["bias"][None])


def decode(params: Any, x: Float[Array, "batch joint"]) -> Float[Array, "batch width"]:
    """E' or Q'."""
    return x @ params["decode"]["kernel"] + params["decode"]["bias"][None]


def loss_rows(
    f_I: Any,
    f_T: Any,
    *,
    x_u: Float[Array, "batch d"],
    E_positive: Float[Array, "batch d"],
    E_negative: Float[Array, "batch d"],
    Q_positive: Float[Array, "batch text"],
    weights: Mapping[str, float],
) -> dict[str, Float[Array, " batch"]]:
    """The terms of stage 1's loss for each row; their batch mean is the loss.

        L = L_match + alpha L_item + beta L_text + L_rec
        L_match = MSE(e, q)      L_item = MSE(E', E)      L_text = MSE(Q', stop(Q))
        L_rec = BCE(x_u . E'_pos, 1) + BCE(x_u . E'_neg, 0)

    Every MSE is the mean over features. `weights` holds the factors of `match`, `item`, `text` and `rec`.
    """

    def mse(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.mean((a - b) ** 2, axis=-1)

    e, e_negative, q = encode(f_I, E_positive), encode(f_I, E_negative), encode(f_T, Q_positive)
    E_decoded, negative_decoded, Q_decoded = decode(f_I, e), decode(f_I, e_negative), decode(f_T, q)
    positive_score = jnp.sum(x_u * E_decoded, axis=-1)
    negative_score = jnp.sum(x_u * negative_decoded, axis=-1)
    terms = {
        "match": mse(e, q),
        "item": mse(E_decoded, E_positive),
        "text": mse(Q_decoded, jax.lax.stop_gradient(Q_positive)),
        "rec": jax.nn.softplus(-positive_score) + jax.nn.softplus(negative_score),
    }
    return terms | {"loss": sum(weights[name] * term for name, term in terms.items())}
