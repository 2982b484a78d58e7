"""What the models of item sequences share: reading E, dropout by row, layer norm, the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from allmrec_jax.models import losses
from allmrec_jax.models.losses import Objective
from allmrec_jax.models.params import Parameter, uniform, xavier_normal

PAPER = Objective()


def rows_of(E: Float[Array, "items d"], ids: Int[Array, "*batch"]) -> Float[Array, "*batch d"]:
    """E_i; row 0 is read as it stands but gets no gradient, so it keeps its initial value for ever."""
    rows = jnp.take(E, ids, axis=0)
    return jnp.where((ids != 0)[..., None], rows, jax.lax.stop_gradient(rows))


def layer_norm(x: Float[Array, "*batch d"], w: dict[str, jax.Array], eps: float) -> Float[Array, "*batch d"]:
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return jnp.einsum("...d,d->...d", x, w["scale"]) + jnp.broadcast_to(w["bias"], x.shape)


def item_table(n_items: int, d: int) -> Parameter:
    """The description of E (n_items + 1, d), row 0 for padding."""
    return Parameter((n_items + 1, d), ("items", None), xavier_normal(n_items + 1, d), "item_emb.weight")


def dense_layer(inputs: int, outputs: int, name: str) -> dict[str, Parameter]:
    """The description of one dense layer, which starts as PyTorch's do."""
    return {
        "kernel": Parameter((inputs, outputs), (None, None), uniform(inputs), f"{name}.weight", "o i -> i o"),
        "bias": Parameter((outputs,), (None,), uniform(inputs), f"{name}.bias"),
    }


def dense(x: Float[Array, "*batch i"], w: dict[str, jax.Array]) -> Float[Array, "*batch o"]:
    """x kernel + bias over the last axis."""
    y = jnp.einsum("...i,io->...o", x, w["kernel"])
    return y + jnp.broadcast_to(w["bias"], y.shape)


def dropout(
    x: Float[Array, "batch ..."], rate: float, keys: Key[Array, " batch"] | None, site: int
) -> Float[Array, "batch ..."]:
    """Drops elements with probability `rate` and scales the others; nothing without keys.

    One key a row, so that a row's mask does not depend on which device or batch it is in. `site` tells the places of
    one model apart.
    """
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)


def dot(params: Any, c: Any, f: Float[Array, "*batch d"], rows: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
    """The score of most models: feature . E_i."""
    return jnp.einsum("...d,...d->...", f, rows, precision=jax.lax.Precision.HIGHEST)


def loss_terms(
    model: ModuleType,
    params: Any,
    c: Any,
    windows: Int[Array, "batch time"],
    positives: Int[Array, "batch time"],
    negatives: Int[Array, "batch time ..."] | Int[Array, " shared"] | None,
    dropout_keys: Key[Array, " batch"] | None = None,
    pads: Int[Array, " batch"] | None = None,
    rows: Sequence[jax.Array] | None = None,
    users: Int[Array, " batch"] | None = None,
    objective: Objective = PAPER,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum of the objective's terms over non-padding positions, and how many those are.

    Args:
      model: a module of `models.collaborative.MODELS`.
      negatives: of each position, or shared by all, or None where all items are, as `objective` says.
      rows: E of windows, positives and negatives, if the caller has looked them up (`rows_of`).
    """
    if rows is None:
        rows = [rows_of(params["E"], ids) for ids in (windows, positives, negatives) if ids is not None]
    f = model.features(params, c, windows, dropout_keys, pads, rows[0], users)
    score = getattr(model, "score", dot)
    positive = score(params, c, f, rows[1])
    if objective.loss == "bce":
        of_negatives = jnp.reshape(rows[2], (*windows.shape, -1, c.width))
        if score is dot:
            negative = jnp.einsum("btd,btkd->btk", f, of_negatives)
        else:
            negative = score(params, c, jnp.broadcast_to(f[:, :, None], of_negatives.shape), of_negatives)
        terms = losses.binary(positive, negative, objective.beta(c.n_items))
    elif objective.all_items:
        ids = jnp.arange(params["E"].shape[0])[None, None]
        rival = (ids > 0) & (ids <= c.n_items) & (ids != positives[..., None])
        terms = losses.softmax(positive, jnp.where(rival, jnp.einsum("btd,id->bti", f, params["E"]), -jnp.inf))
    else:
        # Each of the shared items, drawn from all n, stands for n / shared of them.
        others = jnp.einsum("btd,sd->bts", f, rows[2]) + math.log(c.n_items / objective.negatives)
        terms = losses.softmax(positive, jnp.where(negatives[None, None] != positives[..., None], others, -jnp.inf))
    real = positives != 0
    return jnp.sum(jnp.where(real, terms, 0)), jnp.sum(real).astype(jnp.float32)
