"""F_U and F_I in PyTorch; side by side with `models.projection`."""

from __future__ import annotations

from torch import nn

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
