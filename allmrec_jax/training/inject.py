"""Stage 2: F_U and F_I learn to inject user and item embeddings into the prompt of the frozen LLM.

`jit` with `NamedSharding` over a mesh (data, model): the batch is cut over `data`, the LLM's weights over `model`, the heads
are replicated; XLA places the collectives. Only the heads are differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from allmrec_jax.models import projection
from allmrec_jax.training.state import State, update

Batch = dict[str, jax.Array]


def inject(
    embeddings: Float[Array, "batch time h"],
    O_u: Float[Array, "batch h"],
    O_i: Float[Array, "batch slot h"],
    batch: Batch,
) -> Float[Array, "batch time h"]:
    """`embeddings` with O_u at `user_slot` and O_i at `slots`; slots at or beyond `time` are dropped.

        tokens   [ .  is  a  ... "T1"  .  ,"T2"  .  ...]
        result   [O_u is  a  ... "T1" O_1 ,"T2" O_2 ...]
    """
    put = jax.vmap(lambda x, at, values: x.at[at].set(values.astype(x.dtype), mode="drop"))
    return put(put(embeddings, batch["slots"], O_i), batch["user_slot"][:, None], O_u[:, None])


def answer_log_likelihood(graph: Any, heads: Any, frozen: Any, batch: Batch) -> Float[Array, "batch answer"]:
    """log P of every answer token, 0 where there is none. `heads=None` leaves the prompt as it is (LLM-only).

    Logits are computed at the answers' positions only.
    """
    llm = nnx.merge(graph, frozen["llm"])
    x = llm.embed(batch["tokens"])
    if heads is not None:
        O_u = projection.F_U(heads["F_U"], jnp.take(frozen["x_u"], batch["rows"], axis=0))
        O_i = projection.F_I(heads["F_I"], jnp.take(frozen["e"], batch["slot_items"], axis=0))
        x = inject(x, O_u, O_i, batch)
    hidden = llm(x, batch["branch"])
    at = jnp.take_along_axis(hidden, batch["answer_at"][:, :, None], axis=1)
    logits = llm.logits(at)
    chosen = jnp.take_along_axis(logits, batch["answer_token"][:, :, None], axis=-1)[..., 0]
    return (chosen - jax.nn.logsumexp(logits, axis=-1)) * batch["answer_weight"]


def loss(heads: Any, graph: Any, frozen: Any, batch: Batch) -> Float[Array, ""]:
    """Cross-entropy of the target's tokens, mean over all target tokens of the batch together."""
    total = -jnp.sum(answer_log_likelihood(graph, heads, frozen, batch))
    return total / jnp.maximum(jnp.sum(batch["answer_weight"]), 1)


def make_step(
    graph: Any, frozen_shardings: Any, mesh: Mesh, optimiser: optax.GradientTransformation
) -> Callable[[State, Any, Batch], tuple[State, dict[str, jax.Array]]]:
    """The jitted step `(state, frozen, batch) -> (state, metrics)`; the state is donated."""
    whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def step(state: State, frozen: Any, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        value, gradients = jax.value_and_grad(loss)(state.params, graph, frozen, batch)
        return update(state, gradients, optimiser), {"loss": value}

    return jax.jit(
        step, in_shardings=(whole, frozen_shardings, cut), out_shardings=(whole, whole), donate_argnums=(0,)
    )


def make_scorer(
    graph: Any, frozen_shardings: Any, mesh: Mesh, *, answers: int, normalise: bool
) -> Callable[[Any, Any, Batch], Float[Array, "batch answers"]]:
    """The jitted `(heads, frozen, batch) -> scores`: log-likelihood of each whole answer, all in one forward pass.

    `normalise` divides by the number of the answer's tokens (`score="mean"`).
    """
    whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def scores(heads: Any, frozen: Any, batch: Batch) -> jax.Array:
        tokens = answer_log_likelihood(graph, heads, frozen, batch)
        one_hot = jax.nn.one_hot(batch["answer_of"], answers) * batch["answer_weight"][..., None]
        totals = jnp.einsum("ba,bac->bc", tokens, one_hot)
        return totals / jnp.maximum(one_hot.sum(1), 1) if normalise else totals

    return jax.jit(scores, in_shardings=(whole, frozen_shardings, cut), out_shardings=cut)
