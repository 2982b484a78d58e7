"""F_U and F_I: the heads that carry x_u and e_i into the token space of the frozen LLM (paper, section 4.2).

F(x) = W2 act(LN(W1 x + b1)) + b2, act = LeakyReLU(0.01) for F_U, exact GELU for F_I
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from allmrec_jax.models.params import Parameter, constant, uniform, xavier_normal

LAYER_NORM_EPS = 1e-5


def describe(width: int, h: int) -> dict[str, Any]:
    """One head, `width` -> h."""
    return {
        "dense1": {
            "kernel": Parameter((width, h), (None, None), xavier_normal(width, h), "0.weight", "o i -> i o"),
            "bias": Parameter((h,), (None,), uniform(width), "0.bias"),
        },
        "norm": {
            "scale": Parameter((h,), (None,), constant(1.0), "1.weight"),
            "bias": Parameter((h,), (None,), constant(0.0), "1.bias"),
        },
        "dense2": {
            "kernel": Parameter((h, h), (None, None), xavier_normal(h, h), "3.weight", "o i -> i o"),
            "bias": Parameter((h,), (None,), uniform(h), "3.bias"),
        },
    }


def match(
    head: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    inputs: Float[Array, "n width"],
    tokens: Float[Array, "vocab h"],
) -> Any:
    """The same head, its first and last layers rescaled to what it reads and to where it writes.

    Afterwards the first layer sees `inputs` standardised, and over `inputs` the outputs have the mean of the LLM's
    token embeddings and their root mean square distance from it. Only initial values change: it is the paper's head.
    Random heads on e, which hardly differs from item to item, give nearly the same O_i for every item, several times
    longer than a token embedding.
    """
    mean, std = jnp.mean(inputs, axis=0), jnp.std(inputs, axis=0) + 1e-6
    kernel = params["dense1"]["kernel"] / std[:, None]
    dense1 = {"kernel": kernel, "bias": params["dense1"]["bias"] - mean @ kernel}
    params = params | {"dense1": dense1}
    O, centre = head(params, inputs), jnp.mean(tokens, axis=0)
    middle = jnp.mean(O, axis=0)

    def spread(x: jax.Array, about: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.mean((x - about[None]) ** 2))

    scale = spread(tokens, centre) / (spread(O, middle) + 1e-6)
    last = params["dense2"]
    dense2 = {"kernel": last["kernel"] * scale, "bias": centre - scale * (middle - last["bias"])}
    return params | {"dense2": dense2}


def _head(params: Any, x: Float[Array, "*batch width"], activation: Any) -> Float[Array, "*batch h"]:
    def dense(w: Any, x: jax.Array) -> jax.Array:
        y = jnp.einsum("...i,io->...o", x, w["kernel"])
        return y + jnp.broadcast_to(w["bias"], y.shape)

    y = dense(params["dense1"], x)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + LAYER_NORM_EPS)
    y = jnp.einsum("...h,h->...h", y, params["norm"]["scale"]) + jnp.broadcast_to(params["norm"]["bias"], y.shape)
    return dense(params["dense2"], activation(y))


def F_U(params: Any, x_u: Float[Array, "*batch d"]) -> Float[Array, "*batch h"]:
    """O_u."""
    with jax.named_scope("O_u"):
        return _head(params, x_u, lambda y: jax.nn.leaky_relu(y, 0.01))


def F_I(params: Any, e: Float[Array, "*batch joint"]) -> Float[Array, "*batch h"]:
    """O_i."""
    with jax.named_scope("O_i"):
        return _head(params, e, lambda y: jax.nn.gelu(y, approximate=False))
