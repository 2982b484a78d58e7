"""SASRec (Kang & McAuley 2018) as the public A-LLMRec code builds it: pure functions over a parameter tree.

Windows are LEFT-padded with item 0. There is a causal mask and no padding mask: padded positions are attended to, as
in that code, where a padded key is the key bias and a padded value the value bias.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, Key

from allmrec_jax.models.params import Parameter, constant, normal, uniform, xavier_normal
from allmrec_jax.models.sequential import dense, dropout, item_table, layer_norm

LAYER_NORM_EPS = 1e-8


@dataclass(frozen=True)
class SASRecConfig:
    """d = `width`; `maxlen` positions; dropout is the probability of dropping."""

    n_items: int
    width: int = 50
    blocks: int = 2
    heads: int = 1
    maxlen: int = 50
    dropout: float = 0.5


def describe(c: SASRecConfig) -> dict[str, Any]:
    """Parameters, the blocks stacked on axis 0. Xavier fans are those of the tensors as PyTorch stores them."""
    d, L = c.width, c.blocks

    def norm(name: str) -> dict[str, Parameter]:
        layer = {"layer": "layer"} if "{layer}" in name else {}
        shape, axes = ((L, d), ("layer", None)) if layer else ((d,), (None,))
        return {
            "scale": Parameter(shape, axes, constant(1.0), f"{name}.weight"),
            "bias": Parameter(shape, axes, constant(0.0), f"{name}.bias"),
        }

    def dense(name: str) -> dict[str, Parameter]:
        return {
            "kernel": Parameter(
                (L, d, d), ("layer", None, None), xavier_normal(d, d), f"{name}.weight", "o i 1 -> i o"
            ),
            "bias": Parameter((L, d), ("layer", None), uniform(d), f"{name}.bias"),
        }

    attention = "attention_layers.{layer}"
    return {
        "E": item_table(c.n_items, d),
        "positions": Parameter((c.maxlen, d), (None, None), xavier_normal(c.maxlen, d), "pos_emb.weight"),
        "blocks": {
            "attention_norm": norm("attention_layernorms.{layer}"),
            "qkv": {
                "kernel": Parameter(
                    (L, 3, d, d),
                    ("layer", None, None, None),
                    normal(math.sqrt(2 / (4 * d))),
                    f"{attention}.in_proj_weight",
                    "(three o) i -> three i o",
                    {"three": 3},
                ),
                "bias": Parameter(
                    (L, 3, d),
                    ("layer", None, None),
                    constant(0.0),
                    f"{attention}.in_proj_bias",
                    "(three o) -> three o",
                    {"three": 3},
                ),
            },
            "out": {
                "kernel": Parameter(
                    (L, d, d),
                    ("layer", None, None),
                    xavier_normal(d, d),
                    f"{attention}.out_proj.weight",
                    "o i -> i o",
                ),
                "bias": Parameter((L, d), ("layer", None), constant(0.0), f"{attention}.out_proj.bias"),
            },
            "ffn_norm": norm("forward_layernorms.{layer}"),
            "conv1": dense("forward_layers.{layer}.conv1"),
            "conv2": dense("forward_layers.{layer}.conv2"),
        },
        "last_norm": norm("last_layernorm"),
    }


def features(
    params: Any,
    c: SASRecConfig,
    windows: Int[Array, "batch time"],
    dropout_keys: Key[Array, " batch"] | None = None,
    pads: Int[Array, " batch"] | None = None,
    rows: Float[Array, "batch time d"] | None = None,
    users: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch time d"]:
    """Features at every position of left-padded windows; `dropout_keys` (one a row) switch dropout on.

    Args:
      rows: E of the windows' items, if the caller has looked them up.
      users: not needed here; for `models.ncf`.
      pads: how many padded positions stand before each row's items in the window of `maxlen`. Given, `windows` may be
        the last positions of that window alone, as long as they hold all its items, and the features of the items
        are those in the whole window:

            window of 8   0 0 0 0 0 3 9 4     pads 5
            windows               0 3 9 4     of the same row, half the work

        In every block all padded keys equal the key bias and all padded values the value bias, so one virtual key
        whose logit gets + log(pads) stands for them. Dropout on the weights of p pads keeps B ~ Binomial(p, keep) of
        them, so the virtual key's weight is multiplied by B / (p keep).
    """
    return _features(params, c, windows, dropout_keys, pads, rows, last=False)


def last_feature(
    params: Any, c: SASRecConfig, windows: Int[Array, "batch time"], pads: Int[Array, " batch"] | None = None
) -> Float[Array, "batch d"]:
    """`features(...)[:, -1]`, the last block computed there alone."""
    return _features(params, c, windows, None, pads, None, last=True)[:, -1]


def _features(params, c, windows, dropout_keys, pads, rows, *, last: bool) -> jax.Array:
    time = windows.shape[1]
    dropped = dropout_keys is not None and c.dropout > 0

    def drop(x: jax.Array, site: int) -> jax.Array:
        return dropout(x, c.dropout, dropout_keys, site)

    real = (windows != 0)[..., None]
    visible = jnp.tril(jnp.ones((time, time), bool))[None, None]
    if pads is not None:
        visible = visible & (windows != 0)[:, None, None, :]
    x = (jnp.take(params["E"], windows, axis=0) if rows is None else rows) * math.sqrt(c.width)
    x = drop(x + params["positions"][None, c.maxlen - time :], 0)
    x = jnp.where(real, x, 0)
    for block in range(c.blocks):
        w = jax.tree.map(lambda leaf, k=block: leaf[k], params["blocks"])
        wanted = slice(-1 if last and block == c.blocks - 1 else 0, None)  # positions that are asked for
        query = layer_norm(x[:, wanted], w["attention_norm"], LAYER_NORM_EPS)
        q, k, v = (
            rearrange(
                jnp.einsum("bti,io->bto", source, w["qkv"]["kernel"][part]) + w["qkv"]["bias"][part][None, None],
                "b t (n k) -> b n t k",
                n=c.heads,
            )
            for part, source in enumerate((query, x, x))
        )
        logits = jnp.einsum("bnqk,bnsk->bnqs", q, k) / math.sqrt(c.width // c.heads)
        logits = jnp.where(visible[:, :, wanted], logits, -jnp.inf)
        if pads is None:
            weights = drop(jax.nn.softmax(logits, axis=-1), 4 * block + 1)
            attended = jnp.einsum("bnqs,bnsk->bnqk", weights, v)
        else:
            key_bias, value_bias = (rearrange(w["qkv"]["bias"][part], "(n k) -> n k", n=c.heads) for part in (1, 2))
            virtual = jnp.einsum("bnqk,nk->bnq", q, key_bias) / math.sqrt(c.width // c.heads)
            virtual = virtual + jnp.log(pads.astype(jnp.float32))[:, None, None]  # -inf, so nothing, without pads
            weights = jax.nn.softmax(jnp.concatenate([logits, virtual[..., None]], axis=-1), axis=-1)
            of_pads = weights[..., -1]
            if dropped:
                of_pads = of_pads * _kept_share(c, dropout_keys, 4 * block + 1, pads, of_pads.shape[1:])
            attended = jnp.einsum("bnqs,bnsk->bnqk", drop(weights[..., :-1], 4 * block + 1), v)
            attended = attended + jnp.einsum("bnq,nk->bnqk", of_pads, value_bias)
        attended = rearrange(attended, "b n t k -> b t (n k)")
        x = query + dense(attended, w["out"])
        x = layer_norm(x, w["ffn_norm"], LAYER_NORM_EPS)
        hidden = jax.nn.relu(drop(dense(x, w["conv1"]), 4 * block + 2))
        x = x + drop(dense(hidden, w["conv2"]), 4 * block + 3)
        x = jnp.where(real[:, wanted], x, 0)
    return layer_norm(x, params["last_norm"], LAYER_NORM_EPS)


@functools.lru_cache
def _binomial_cdf(n: int, keep: float) -> np.ndarray:
    """(n + 1, n): row p holds P(B <= 0), P(B <= 1), ... of B ~ Binomial(p, keep)."""
    table, log = np.ones((n + 1, n)), np.cumsum([0.0, *np.log(np.arange(1, n + 1))])  # log k!
    for p in range(n + 1):
        k = np.arange(p)
        pmf = np.exp(log[p] - log[k] - log[p - k] + k * math.log(keep) + (p - k) * math.log1p(-keep))
        table[p, :p] = np.cumsum(pmf)
    return table.astype(np.float32)


def _kept_share(c: SASRecConfig, keys: jax.Array, site: int, pads: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """B / (p keep) for each row, head and query, B ~ Binomial(p, keep) drawn by its distribution function."""
    keep = 1 - c.dropout
    u = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, site), 1), shape))(keys)
    steps = jnp.asarray(_binomial_cdf(c.maxlen, keep))[pads]  # one row of the table for each row of the batch
    kept = jnp.sum(u[..., None] >= steps[:, None, None, :], axis=-1)
    return kept / (jnp.maximum(pads, 1)[:, None, None] * keep)
