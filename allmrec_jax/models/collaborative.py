"""The collaborative filtering models, and the small protocol that makes A-LLMRec independent of which one it is.

A model is a module with

    a frozen dataclass         its config `c`: n_items, width (d), maxlen, dropout and what else it needs
    describe(c)                its parameters, among them the item table `E` (n_items + 1, d)
    features(params, c, windows, dropout_keys, pads, rows, users)
                               features at every position of left-padded windows; the last is x_u
    last_feature(params, c, windows, pads)
                               the last of them, if there is a cheaper way to it
    score(params, c, f, rows)  the score of features and rows of E, if it is another than their product

and a line in `MODELS`. Everything else (training, evaluation, both later stages) knows no more of it than that.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from allmrec_jax.models import given, gru4rec, ncf, nextitnet, sasrec, sequential

MODELS: dict[str, tuple[type, ModuleType]] = {
    "sasrec": (sasrec.SASRecConfig, sasrec),
    "gru4rec": (gru4rec.GRU4RecConfig, gru4rec),
    "nextitnet": (nextitnet.NextItNetConfig, nextitnet),
    "ncf": (ncf.NCFConfig, ncf),
    "given": (given.GivenConfig, given),
}


def module_of(c: Any) -> ModuleType:
    """The module whose config `c` is."""
    return next(module for kind, module in MODELS.values() if kind is type(c))


def user_representation(
    params: Any, c: Any, windows: Int[Array, "batch time"], pads: Int[Array, " batch"] | None = None
) -> Float[Array, "batch d"]:
    """x_u of a history: the features at the last position of its window."""
    module = module_of(c)
    with jax.named_scope("x_u"):
        if hasattr(module, "last_feature"):
            return module.last_feature(params, c, windows, pads)
        return module.features(params, c, windows, None, pads)[:, -1]


def scores(
    params: Any, c: Any, x_u: Float[Array, "users d"], rows: Float[Array, "users candidates d"]
) -> Float[Array, "users candidates"]:
    """The score of each user's candidates, given their rows of E."""
    score = getattr(module_of(c), "score", sequential.dot)
    return score(params, c, jnp.broadcast_to(x_u[:, None], rows.shape), rows)
