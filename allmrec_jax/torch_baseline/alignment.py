"""Stage 1 in PyTorch; side by side with `models.alignment` and `training.align`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class AutoEncoder(nn.Module):
    """f_I or f_T: width -> d' -> width. PyTorch's default initialisation is the paper's code's."""

    def __init__(self, width: int, joint: int):
        super().__init__()
        self.fc1 = nn.Linear(width, joint)
        self.fc2 = nn.Linear(joint, width)

    def encode(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch joint"]:
        """e or q."""
        return torch.sigmoid(self.fc1(x))

    def decode(self, x: Float[Tensor, "batch joint"]) -> Float[Tensor, "batch width"]:
        """E' or Q'."""
        return self.fc2(x)


class SentenceEncoder(nn.Module):
    """Q = the mean of a transformers encoder's last hidden states over the attention mask."""

    def __init__(self, transformer: nn.Module, *, normalize: bool = False):
        super().__init__()
        self.transformer, self.normalize = transformer, normalize

    def forward(self, tokens: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]) -> Float[Tensor, "batch h"]:
        hidden = self.transformer(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        Q = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return F.normalize(Q, dim=-1) if self.normalize else Q


def losses(
    f_I: AutoEncoder,
    f_T: AutoEncoder,
    *,
    x_u: Float[Tensor, "batch d"],
    E_positive: Float[Tensor, "batch d"],
    E_negative: Float[Tensor, "batch d"],
    Q_positive: Float[Tensor, "batch text"],
    weights: Mapping[str, float],
) -> dict[str, Any]:
    """The four terms of the loss and their weighted sum, `loss`."""
    e, e_negative, q = f_I.encode(E_positive), f_I.encode(E_negative), f_T.encode(Q_positive)
    E_decoded, negative_decoded, Q_decoded = f_I.decode(e), f_I.decode(e_negative), f_T.decode(q)
    positive = (x_u * E_decoded).sum(-1)
    negative = (x_u * negative_decoded).sum(-1)
    terms = {
        "match": F.mse_loss(e, q),
        "item": F.mse_loss(E_decoded, E_positive),
        "text": F.mse_loss(Q_decoded, Q_positive.detach()),
        "rec": F.binary_cross_entropy_with_logits(positive, torch.ones_like(positive))
        + F.binary_cross_entropy_with_logits(negative, torch.zeros_like(negative)),
    }
    return terms | {"loss": sum(weights[name] * term for name, term in terms.items())}
