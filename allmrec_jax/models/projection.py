"""F_U and F_I: the heads that carry x_u and e_i into the token space of the frozen LLM (paper, section 4.2).

F(x) = W2 act(LN(W1 x + b1)) + b2, act = LeakyReLU(0.01) for F_U, exact GELU for F_I
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from allmrec_jax.models.params import Initialiser, Parameter, constant, uniform, xavier_normal

LAYER_NORM_EPS = 1e-5


def describe(width: int, h: int, gain: float = 1.0) -> dict[str, Any]:
    """One head, `width` -> h. `gain` multiplies the last layer's initial values (1 in the paper's recipe)."""

    def scaled(initialiser: Initialiser) -> Initialiser:
        return lambda key, shape: gain * initialiser(key, shape)

    return {
        "dense1": {
            "kernel": Parameter((width, h), (None, None), xavier_normal(width, h), "0.weight", "out in -> in out"),
            "bias": Parameter((h,), (None,), uniform(width), "0.bias"),
        },
        "norm": {
            "scale": Parameter((h,), (None,), constant(1.0), "1.weight"),
            "bias": Parameter((h,), (None,), constant(0.0), "1.bias"),
        },
        "dense2": {
            "kernel": Parameter((h, h), (None, None), scaled(xavier_normal(h, h)), "3.weight", "out in -> in out"),
            "bias": Parameter((h,), (None,), scaled(uniform(h)), "3.bias"),
        },
    }


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
