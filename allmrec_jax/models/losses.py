"""What stage 0 learns from: the score of the item that came next against scores of items that did not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Objective:
    """The loss of stage 0; the default is the paper's.

        bce       `negatives` items for each position, each a no beside the position's yes
        softmax   the position's item among `negatives` items that all positions of a step share, or, with 0, among
                  all items (cross-entropy)

    calibration: t of gSASRec (Petrov & Macdonald 2023, arXiv 2308.07192), in [0, 1]: how far the overconfidence that
      few negatives bring is taken back. 0 is plain BCE.
    """

    loss: Literal["bce", "softmax"] = "bce"
    negatives: int = 1
    calibration: float = 0.0

    @property
    def all_items(self) -> bool:
        return self.loss == "softmax" and self.negatives == 0

    @property
    def each(self) -> int:
        """Negatives of each position."""
        return self.negatives if self.loss == "bce" else 0

    @property
    def shared(self) -> int:
        """Negatives that all positions of a step share."""
        return self.negatives if self.loss == "softmax" else 0

    def beta(self, n_items: int) -> float:
        """The exponent of the positive's probability: 1 - t (1 - a), a = negatives / (n_items - 1), at most 1."""
        return 1 - self.calibration * (1 - min(1.0, self.negatives / max(1, n_items - 1)))


def binary(
    positive: Float[Array, "*batch"], negatives: Float[Array, "*batch k"], beta: float = 1.0
) -> Float[Array, "*batch"]:
    """-beta log s(positive) - sum log(1 - s(negative)), s the logistic function; times 2 / (k + 1), so that k = 1,
    beta = 1 is BCE(positive, 1) + BCE(negative, 0)."""
    terms = beta * jax.nn.softplus(-positive) + jnp.sum(jax.nn.softplus(negatives), axis=-1)
    return terms * (2 / (negatives.shape[-1] + 1))


def softmax(positive: Float[Array, "*batch"], others: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
    """-log of the positive's share in the softmax over it and the others."""
    return jnp.logaddexp(positive, jax.nn.logsumexp(others, axis=-1)) - positive
