"""The collaborative filtering models, and the small protocol that makes A-LLMRec independent of which one it is.

A model is a module with

    a frozen dataclass         its config `c`: n_items, width (d), maxlen, dropout and what else it needs
    describe(c)                its parameters, among them the item table `E` (n_items + 1, d)
    features(params, c, windows, dropout_keys, pads, rows, users)
                               features at every position of left-padded windows; the last is x_u
    last_feature(params, c, windows, pads)
                               the last of them, if there is a cheaper way to it
    score(params, c, f, rows)  the score of features and rows of E, if it is another than their product

A module of one's own is named by its path (`--cf.model mine.py`) and calls its dataclass `Config`; `given` trains
nothing and has none of this. Everything else (training, evaluation, both later stages) knows no more of it than that.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from allmrec_jax.errors import UserError
from allmrec_jax.models import given, gru4rec, ncf, nextitnet, sasrec, sequential

MODELS: dict[str, tuple[type, ModuleType]] = {
    "sasrec": (sasrec.SASRecConfig, sasrec),
    "gru4rec": (gru4rec.GRU4RecConfig, gru4rec),
    "nextitnet": (nextitnet.NextItNetConfig, nextitnet),
    "ncf": (ncf.NCFConfig, ncf),
    "given": (given.GivenConfig, given),
}


def find(name: str) -> tuple[type, ModuleType]:
    """The config class and the module of a model: one of `MODELS`, or a Python file.

    Raises:
      UserError: if there is no such model or file, or the file lacks what the protocol asks for.
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(
            f"there is no model {name!r}; choose {', '.join(MODELS)}, or name a Python file (docs/models.md)"
        )
    spec = importlib.util.spec_from_file_location(f"allmrec_model_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"the model {path} fails: {type(error).__name__}: {error}") from error
    if missing := [part for part in ("Config", "describe", "features") if not hasattr(module, part)]:
        raise UserError(f"the model {path} defines no {missing[0]} (docs/models.md)")
    MODELS[name] = module.Config, module
    return MODELS[name]


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
