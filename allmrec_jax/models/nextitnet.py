"""NextItNet (Yuan et al. 2019, arXiv 1808.05163) over the same windows as SASRec: dilated convolutions.

Convolutions look back only. Padding is 0 before every convolution, as if there were nothing, so a shorter window that
holds all items gives the same features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from allmrec_jax.models.params import Parameter, constant, uniform
from allmrec_jax.models.sequential import dense, dense_layer, dropout, item_table, layer_norm, rows_of

KERNEL = 3
LAYER_NORM_EPS = 1e-8


@dataclass(frozen=True)
class NextItNetConfig:
    """d = `width`; `blocks` residual blocks, the k-th of two convolutions with dilations 4^k and 2 4^k."""

    n_items: int
    width: int = 50
    blocks: int = 2
    maxlen: int = 50
    dropout: float = 0.5


def describe(c: NextItNetConfig) -> dict[str, Any]:
    """Parameters, the blocks stacked on axis 0. The convolutions' kernels are (time, in, out)."""
    d, L = c.width, c.blocks

    def conv(name: str) -> dict[str, Parameter]:
        return {
            "kernel": Parameter(
                (L, KERNEL, d, d), ("layer", None, None, None), uniform(KERNEL * d), f"{name}.weight", "o i k -> k i o"
            ),
            "bias": Parameter((L, d), ("layer", None), uniform(KERNEL * d), f"{name}.bias"),
        }

    def norm(name: str) -> dict[str, Parameter]:
        return {
            "scale": Parameter((L, d), ("layer", None), constant(1.0), f"{name}.weight"),
            "bias": Parameter((L, d), ("layer", None), constant(0.0), f"{name}.bias"),
        }

    return {
        "E": item_table(c.n_items, d),
        "blocks": {
            "conv1": conv("blocks.{layer}.conv1"),
            "norm1": norm("blocks.{layer}.norm1"),
            "conv2": conv("blocks.{layer}.conv2"),
            "norm2": norm("blocks.{layer}.norm2"),
        },
        "out": dense_layer(d, d, "out"),
    }


def features(
    params: Any,
    c: NextItNetConfig,
    windows: Int[Array, "batch time"],
    dropout_keys: Key[Array, " batch"] | None = None,
    pads: Int[Array, " batch"] | None = None,
    rows: Float[Array, "batch time d"] | None = None,
    users: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch time d"]:
    """Features at every position of left-padded windows: x <- x + relu(LN(conv(relu(LN(conv(x)))))) in each block.

    Args:
      dropout_keys: one a row; they switch dropout on.
      pads: not needed here; for `models.sasrec`, whose padding matters.
      rows: E of the windows' items, if the caller has looked them up.
      users: not needed here; for `models.ncf`.
    """
    real = (windows != 0)[..., None]
    x = rows_of(params["E"], windows) if rows is None else rows
    x = jnp.where(real, dropout(x, c.dropout, dropout_keys, 0), 0)
    for block in range(c.blocks):
        w = jax.tree.map(lambda leaf, k=block: leaf[k], params["blocks"])
        y = x
        for part, dilation in ((1, 4**block), (2, 2 * 4**block)):
            y = _convolve(y, w[f"conv{part}"], dilation)
            y = jnp.where(real, jax.nn.relu(layer_norm(y, w[f"norm{part}"], LAYER_NORM_EPS)), 0)
        x = x + y
    x = dropout(x, c.dropout, dropout_keys, 1)
    return dense(x, params["out"])


def _convolve(x: Float[Array, "batch time i"], w: Any, dilation: int) -> Float[Array, "batch time o"]:
    """y_t = sum_k K_k x_{t - (2 - k) dilation} + bias, nothing before the window."""
    back = (KERNEL - 1) * dilation
    padded = jnp.pad(x, ((0, 0), (back, 0), (0, 0)))
    taps = [padded[:, k * dilation : k * dilation + x.shape[1]] for k in range(KERNEL)]
    return jnp.einsum("kbti,kio->bto", jnp.stack(taps), w["kernel"]) + w["bias"][None, None]
