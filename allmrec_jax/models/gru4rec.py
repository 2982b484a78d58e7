"""GRU4Rec (Hidasi et al. 2016, arXiv 1511.06939) over the same windows as SASRec: item rows, dropout, GRU, features.

Its layers carry a state of width d from item to item; padding leaves the state as it is, so an empty history has the
state 0, and a shorter window that holds all items gives the same features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from allmrec_jax.models.params import Parameter, uniform
from allmrec_jax.models.sequential import dense, dense_layer, dropout, item_table, rows_of


@dataclass(frozen=True)
class GRU4RecConfig:
    """d = `width`, also that of the state; `blocks` GRU layers; `dropout` is the probability of dropping an input."""

    n_items: int
    width: int = 50
    blocks: int = 1
    maxlen: int = 50
    dropout: float = 0.25


def describe(c: GRU4RecConfig) -> dict[str, Any]:
    """Parameters, the layers stacked on axis 0; gates in PyTorch's order: reset, update, new."""
    d, L = c.width, c.blocks

    def gates(kind: str) -> dict[str, Parameter]:
        split = {"three": 3}
        return {
            "kernel": Parameter(
                (L, 3, d, d),
                ("layer", None, None, None),
                uniform(d),
                f"gru.weight_{kind}_l{{layer}}",
                "(three o) i -> three i o",
                split,
            ),
            "bias": Parameter(
                (L, 3, d),
                ("layer", None, None),
                uniform(d),
                f"gru.bias_{kind}_l{{layer}}",
                "(three o) -> three o",
                split,
            ),
        }

    return {
        "E": item_table(c.n_items, d),
        "input": gates("ih"),
        "state": gates("hh"),
        "out": dense_layer(d, d, "out"),
    }


def features(
    params: Any,
    c: GRU4RecConfig,
    windows: Int[Array, "batch time"],
    dropout_keys: Key[Array, " batch"] | None = None,
    pads: Int[Array, " batch"] | None = None,
    rows: Float[Array, "batch time d"] | None = None,
    users: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch time d"]:
    """Features at every position of left-padded windows.

        r = s(W_r x + b_r + U_r h + c_r)     z = s(W_z x + b_z + U_z h + c_z)
        n = tanh(W_n x + b_n + r (U_n h + c_n))          h <- (1 - z) n + z h

    Args:
      dropout_keys: one a row; they switch dropout on.
      pads: not needed here; for `models.sasrec`, whose padding matters.
      rows: E of the windows' items, if the caller has looked them up.
      users: not needed here; for `models.ncf`.
    """
    x = rows_of(params["E"], windows) if rows is None else rows
    x = dropout(x, c.dropout, dropout_keys, 0)
    real = (windows != 0)[..., None]
    for layer in range(c.blocks):
        w = {part: jax.tree.map(lambda leaf, k=layer: leaf[k], params[part]) for part in ("input", "state")}
        gates = jnp.einsum("bti,gio->tbgo", x, w["input"]["kernel"]) + w["input"]["bias"][None, None]

        def step(h: jax.Array, now: tuple[jax.Array, jax.Array], w: Any = w) -> tuple[jax.Array, jax.Array]:
            given, is_real = now
            kept = jnp.einsum("bi,gio->bgo", h, w["state"]["kernel"]) + w["state"]["bias"][None]
            reset, update = jax.nn.sigmoid(given[:, 0] + kept[:, 0]), jax.nn.sigmoid(given[:, 1] + kept[:, 1])
            new = jnp.tanh(given[:, 2] + reset * kept[:, 2])
            h = jnp.where(is_real, (1 - update) * new + update * h, h)
            return h, h

        start = jnp.zeros((windows.shape[0], c.width), x.dtype)
        _, states = jax.lax.scan(step, start, (gates, jnp.swapaxes(real, 0, 1)))
        x = jnp.swapaxes(states, 0, 1)
    return dense(x, params["out"])
