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


def standardise(params: Any, inputs: Float[Array, "n width"]) -> Any:
    """The same head with a first layer that sees `inputs` standardised.

    e hardly differs from item to item: random heads on it give nearly the same O_i for every item.
    """
    mean, std = jnp.mean(inputs, axis=0), jnp.std(inputs, axis=0) + 1e-6
    kernel = params["dense1"]["kernel"] / std[:, None]
    return params | {"dense1": {"kernel": kernel, "bias": params["dense1"]["bias"] - mean @ kernel}}


def token_statistics(tokens: Float[Array, "vocab h"]) -> dict[str, jax.Array]:
    """Mean (h,) of the LLM's token embeddings and their root mean square distance from it, a scalar."""
    tokens = tokens.astype(jnp.float32)
    mean = jnp.mean(tokens, axis=0)
    return {"mean": mean, "spread": jnp.sqrt(jnp.mean((tokens - mean[None]) ** 2))}


def settle(
    head: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    inputs: Float[Array, "n width"],
    statistics: dict[str, jax.Array],
) -> Any:
    """The same head with a last layer whose outputs over `inputs` have the mean and the spread of the token embeddings.

        O -> mean + spread (O - mean_n O) / rms_n(O - mean_n O), folded into W2 and b2

    Differentiable: applied at every step it takes out of the gradient what moves or stretches all outputs together.
    Left to itself, Adam stretches O to ten times the length of a token embedding within a few hundred steps, and what
    the LLM adds to so long a vector no longer matters.
    """
    O = head(params, inputs)
    middle, last = jnp.mean(O, axis=0), params["dense2"]
    scale = statistics["spread"] / jnp.sqrt(jnp.mean((O - middle[None]) ** 2) + 1e-12)
    bias = statistics["mean"] - scale * (middle - last["bias"])
    return params | {"dense2": {"kernel": last["kernel"] * scale, "bias": bias}}


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
