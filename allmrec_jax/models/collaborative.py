"""The collaborative filtering models, and the small protocol that makes A-LLMRec independent of which one it is.

A model is a module with

    a frozen dataclass         its config `c`, of that module: n_items, width (d), maxlen and what else it needs
    describe(c)                its parameters, among them the item table `E` (n_items + 1, d)
    features(params, c, windows, dropout_keys, pads, rows, users)
                               features at every position of left-padded windows; the last is x_u
    last_feature(params, c, windows, pads)
                               the last of them, if there is a cheaper way to it
    score(params, c, f, rows)  the score of features and rows of E, if it is another than their product

With a parameter `P` (n_users + 1, d) it is a model of users, as `models.ncf`: x_u is the user's row. A module of one's
own is named by its path (`--cf.model mine.py`) and calls its dataclass `Config` (`models.own`); `given` trains nothing
and has none of this. Everything else (training, evaluation, both later stages) knows no more of it than that.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from allmrec_jax.errors import UserError
from allmrec_jax.models import given, gru4rec, ncf, nextitnet, own, sasrec, sequential

MODELS: dict[str, tuple[type, ModuleType]] = {
    "sasrec": (sasrec.SASRecConfig, sasrec),
    "gru4rec": (gru4rec.GRU4RecConfig, gru4rec),
    "nextitnet": (nextitnet.NextItNetConfig, nextitnet),
    "ncf": (ncf.NCFConfig, ncf),
    "given": (given.GivenConfig, given),
}


def configure(name: str, values: Mapping[str, Any]) -> Any:
    """The config of a model, one of `MODELS` or a Python file, its fields filled from `values` by name.

    Raises:
      UserError: if there is no such model, or the file is not what the protocol asks for.
    """
    if name in MODELS:
        kind, _ = MODELS[name]
        return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
    if Path(name).suffix != ".py" or not Path(name).is_file():
        raise UserError(
            f"there is no model {name!r}; choose {', '.join(MODELS)}, or name a Python file (docs/models.md)"
        )
    return own.configure(Path(name), values)


def module_of(c: Any) -> ModuleType:
    """The module whose config `c` is."""
    return sys.modules[type(c).__module__]


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
