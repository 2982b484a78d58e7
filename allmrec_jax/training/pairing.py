"""Ahead of stage 2, without the LLM: F_U and F_I learn to put O_u near the O_i of the item that comes next.

A language model goes on, after a vector, as it went on after a like vector before. With each O_i in front of its title
and O_u at the end of the prompt, a frozen LLM therefore leans towards the title whose O_i resembles O_u, untrained:

    This user has watched  O_1 "T1", O_2 "T2" ...  set, O_3 "T3", O_4 "T4".  The recommendation is  O_u   ->  "T4" if
                                                                                                    O_u ~ O_4
To resemble is something that the two heads can learn by themselves, in seconds:

    L_pair = - log softmax_i ( SHARPNESS cos(O_u - m, O_i - m) ) at the next item,   m the mean token embedding

over the next item and `NEGATIVES` random ones. No paper has this step; `llm.pairing` 0 leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from allmrec_jax.data.dataset import Dataset
from allmrec_jax.models import projection
from allmrec_jax.training.cf import CFModel

SHARPNESS, BATCH, NEGATIVES, LEARNING_RATE = 10.0, 256, 1024, 2e-3
MOST = 100_000  # positions whose x_u are made


def positions(cf: CFModel, dataset: Dataset) -> tuple[Float[np.ndarray, "rows d"], Int[np.ndarray, " rows"]]:
    """(x_u, next item) at each place of the training histories, or at `MOST` of them."""
    users, ends, targets = dataset.examples("all")
    some = np.unique(np.linspace(0, len(users) - 1, min(len(users), MOST)).astype(int))
    users, ends = users[some], ends[some]
    return np.asarray(cf.x_u(dataset.windows(ends, cf.config.maxlen, users), users)), targets[some]


def similarities(
    heads: Any, x_u: Float[Array, "users d"], e: Float[Array, "items width"], middle: Float[Array, " h"]
) -> Float[Array, "users items"]:
    """Cosine of O_u and O_i as seen from the mean token embedding."""

    def direction(O: jax.Array) -> jax.Array:
        O = O - middle[None]
        return O * jax.lax.rsqrt(jnp.sum(O * O, axis=-1, keepdims=True) + 1e-12)

    return direction(projection.F_U(heads["F_U"], x_u)) @ direction(projection.F_I(heads["F_I"], e)).T


@partial(jax.jit, static_argnames=("use", "steps"))
def pair(
    heads: Any,
    frozen: Any,
    x_u: Float[Array, "rows d"],
    targets: Int[Array, " rows"],
    key: Key[Array, ""],
    *,
    use: Callable[[Any, Any], Any],
    steps: int,
) -> tuple[Any, Float[Array, " steps"]]:
    """The heads after so many steps, and the losses.

    Args:
      frozen: e of all items (row 0 is of none) and `tokens`, `projection.token_statistics`, with what `use` reads.
      targets: the next item of each row.
      use: (trained heads, frozen) -> those that the prompt sees.
    """
    e, middle = frozen["e"], frozen["tokens"]["mean"]
    optimiser = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, max(1, steps)), b1=0.9, b2=0.98)

    def loss(heads: Any, rows: jax.Array, negatives: jax.Array) -> jax.Array:
        own = targets[rows]
        items = jnp.concatenate([own, negatives])
        logits = SHARPNESS * similarities(use(heads, frozen), x_u[rows], e[items], middle)
        # Another row's item, or a drawn one, that is this row's own stands in its column already.
        twice = (items[None] == own[:, None]) & ~jnp.eye(len(rows), len(items), dtype=bool)
        logits = jnp.where(twice, -jnp.inf, logits)
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=1)))

    def step(state: Any, i: jax.Array) -> tuple[Any, jax.Array]:
        heads, moments = state
        for_rows, for_items = jax.random.split(jax.random.fold_in(key, i))
        rows = jax.random.randint(for_rows, (min(BATCH, len(targets)),), 0, len(targets))
        negatives = jax.random.randint(for_items, (NEGATIVES,), 1, len(e))
        value, gradient = jax.value_and_grad(loss)(heads, rows, negatives)
        updates, moments = optimiser.update(gradient, moments, heads)
        return (optax.apply_updates(heads, updates), moments), value

    (heads, _), losses = jax.lax.scan(step, (heads, optimiser.init(heads)), jnp.arange(steps))
    return heads, losses
