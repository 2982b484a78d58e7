"""NCF (He et al. 2017, arXiv 1708.05031): a row for each user, no history; a product and a network score together.

    P_u = [p | p'],  E_i = [q | q']        score = w . [p * q ; MLP([p' ; q'])]

The user representation x_u is the user's row P_u. For a history of somebody without a row, `fold_in` makes one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from allmrec_jax.models.params import Parameter, normal
from allmrec_jax.models.sequential import dense, dense_layer, dropout


@dataclass(frozen=True)
class NCFConfig:
    """d = `width`: half of it for the product, half for the network of `blocks` layers."""

    n_items: int
    n_users: int
    width: int = 50
    blocks: int = 2
    maxlen: int = 50
    dropout: float = 0.0

    @property
    def halves(self) -> tuple[int, int]:
        return self.width // 2, self.width - self.width // 2


def describe(c: NCFConfig) -> dict[str, Any]:
    """Parameters; each layer of the network is as wide as q'."""
    g, m = c.halves
    layers = {f"layer{k}": dense_layer(2 * m if k == 0 else m, m, f"mlp.{k}") for k in range(c.blocks)}
    return {
        "E": Parameter((c.n_items + 1, c.width), ("items", None), normal(0.1), "item_emb.weight"),
        "P": Parameter((c.n_users + 1, c.width), (None, None), normal(0.1), "user_emb.weight"),
        "mlp": layers,
        "out": dense_layer(g + m, 1, "out"),
    }


def features(
    params: Any,
    c: NCFConfig,
    windows: Int[Array, "batch time"],
    dropout_keys: Key[Array, " batch"] | None = None,
    pads: Int[Array, " batch"] | None = None,
    rows: Float[Array, "batch time d"] | None = None,
    users: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch time d"]:
    """P_u at every position; `users` are needed, everything else that a sequence model reads is not."""
    P_u = dropout(params["P"][users], c.dropout, dropout_keys, 0)
    return jnp.broadcast_to(P_u[:, None], (*windows.shape, c.width))


def score(
    params: Any, c: NCFConfig, f: Float[Array, "*batch d"], rows: Float[Array, "*batch d"]
) -> Float[Array, "*batch"]:
    """w . [p * q ; MLP([p' ; q'])] for features (or x_u) and rows of E, shape by shape."""
    g, _ = c.halves
    hidden = jnp.concatenate([f[..., g:], rows[..., g:]], axis=-1)
    for k in range(c.blocks):
        hidden = jax.nn.relu(dense(hidden, params["mlp"][f"layer{k}"]))
    both = jnp.concatenate([f[..., :g] * rows[..., :g], hidden], axis=-1)
    return dense(both, params["out"])[..., 0]


def fold_in(
    E: Float[np.ndarray, "items d"],
    P: Float[np.ndarray, "users d"],
    windows: Int[np.ndarray, "known maxlen"],
    users: Int[np.ndarray, " known"],
    ridge: float = 1.0,
) -> Float[np.ndarray, "inputs d"]:
    """A (d + 1, d) for which [mean of a history's E_i ; 1] A comes closest to the rows P_u of the users known.

    Ridge regression: A = (X' X + ridge I)^-1 X' Y. `mean_rows(E, windows) @ A` is then x_u of any history.
    """
    X, Y = mean_rows(E, windows).astype(np.float64), P[users].astype(np.float64)
    return np.linalg.solve(X.T @ X + ridge * np.eye(X.shape[1]), X.T @ Y).astype(np.float32)


def mean_rows(
    E: Float[np.ndarray, "items d"], windows: Int[np.ndarray, "users maxlen"]
) -> Float[np.ndarray, "users inputs"]:
    """[mean of E_i over a window's items ; 1]; the mean of no items is 0."""
    real = windows != 0
    sums = np.zeros((len(windows), E.shape[1]), E.dtype)
    for at in range(windows.shape[1]):  # a position at a time: memory is that of the result
        sums += np.where(real[:, at, None], E[windows[:, at]], 0)
    mean = sums / np.maximum(real.sum(1, keepdims=True), 1).astype(E.dtype)
    return np.concatenate([mean, np.ones((len(windows), 1), mean.dtype)], axis=1)
