"""f_I and f_T: the two auto-encoders that align collaborative and text knowledge (paper, section 4.1).

e = sigmoid(W1 E + b1),  E' = W2 e + b2      (f_I, d -> d' -> d)
q = sigmoid(V1 Q + c1),  Q' = V2 q + c2      (f_T, text width -> d' -> text width)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from allmrec_jax.models import losses
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


def item_terms(
    f_I: Any, f_T: Any, E: Float[Array, "items d"], Q: Float[Array, "items text"]
) -> dict[str, Float[Array, " items"]]:
    """What stage 1 loses on each item.

        match = MSE(e, q)      item = MSE(E', E)      text = MSE(Q', stop(Q))

    Every MSE is the mean over features.
    """

    def mse(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.mean((a - b) ** 2, axis=-1)

    with jax.named_scope("L_match"):
        e, q = encode(f_I, E), encode(f_T, Q)
        return {
            "match": mse(e, q),
            "item": mse(decode(f_I, e), E),
            "text": mse(decode(f_T, q), jax.lax.stop_gradient(Q)),
        }


def rec_term(
    f_I: Any,
    x_u: Float[Array, "batch d"],
    E_positive: Float[Array, "batch d"],
    E_negative: Float[Array, "batch d"],
    score: Literal["dot", "mean"] = "dot",
) -> Float[Array, " batch"]:
    """L_rec of each user: BCE(s(x_u, E'_pos), 1) + BCE(s(x_u, E'_neg), 0).

    Args:
      score: s, the sum over the d products (paper), or their mean (public code).
    """
    s = {"dot": jnp.sum, "mean": jnp.mean}[score]
    with jax.named_scope("L_rec"):
        positive, negative = (s(x_u * decode(f_I, encode(f_I, E)), axis=-1) for E in (E_positive, E_negative))
        return losses.binary(positive, negative[:, None])


def weigh(terms: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """L = L_match + alpha L_item + beta L_text + L_rec, or of these terms the ones that are given."""
    return sum((weights[name] * term for name, term in terms.items()), jnp.float32(0))
