"""F_U and F_I in PyTorch; side by side with `models.projection`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from allmrec_jax.models.projection import LAYER_NORM_EPS


def _head(width: int, h: int, activation: nn.Module) -> nn.Sequential:
    head = nn.Sequential(nn.Linear(width, h), nn.LayerNorm(h, eps=LAYER_NORM_EPS), activation, nn.Linear(h, h))
    for layer in (head[0], head[3]):
        nn.init.xavier_normal_(layer.weight)
    return head


def F_U(d: int, h: int) -> nn.Sequential:
    """The head that gives O_u."""
    return _head(d, h, nn.LeakyReLU())


def F_I(joint: int, h: int) -> nn.Sequential:
    """The head that gives O_i."""
    return _head(joint, h, nn.GELU())


def _settling(
    head: nn.Module, inputs: Float[Tensor, "n width"], tokens: Float[Tensor, "vocab h"]
) -> tuple[Tensor, Tensor]:
    """(scale, shift): scale O + shift has, over `inputs`, the mean and the spread of the token embeddings."""
    O = head(inputs)
    middle, mean = O.mean(0), tokens.mean(0)
    spread = ((tokens - mean) ** 2).mean().sqrt()
    scale = spread / torch.sqrt(((O - middle) ** 2).mean() + 1e-12)
    return scale, mean - scale * middle


def settled(
    head: nn.Module, inputs: Float[Tensor, "n width"], tokens: Float[Tensor, "vocab h"]
) -> Callable[[Tensor], Tensor]:
    """The same head with outputs that have, over `inputs`, the mean and the spread of the token embeddings."""
    scale, shift = _settling(head, inputs, tokens)
    return lambda x: scale * head(x) + shift


@torch.no_grad()
def fold(head: nn.Sequential, inputs: Float[Tensor, "n width"], tokens: Float[Tensor, "vocab h"]) -> None:
    """Folds what `settled` does into the head's last layer."""
    scale, shift = _settling(head, inputs, tokens)
    head[3].weight *= scale
    head[3].bias.copy_(head[3].bias * scale + shift)


@torch.no_grad()
def standardise(head: nn.Sequential, inputs: Float[Tensor, "n width"]) -> None:
    """Lets the head's first layer see `inputs` standardised."""
    mean, std = inputs.mean(0), inputs.std(0, correction=0) + 1e-6
    head[0].weight /= std
    head[0].bias -= head[0].weight @ mean
