"""What the PyTorch models of item sequences share; side by side with `models.sequential`."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class Sequential(nn.Module):
    """A model with `item_emb` whose `forward` gives features at every position of left-padded windows."""

    item_emb: nn.Embedding

    def user_representation(self, windows: Int[Tensor, "batch time"]) -> Float[Tensor, "batch d"]:
        """x_u: the feature at the last position."""
        return self(windows)[:, -1]

    def scores(
        self, x_u: Float[Tensor, "users d"], candidates: Int[Tensor, "users candidates"]
    ) -> Float[Tensor, "users candidates"]:
        """x_u . E_i for each candidate."""
        return torch.einsum("ud,ucd->uc", x_u, self.item_emb(candidates))

    def loss(
        self,
        windows: Int[Tensor, "batch time"],
        positives: Int[Tensor, "batch time"],
        negatives: Int[Tensor, "batch time"],
        l2_emb: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Mean over non-padding positions of BCE(f . E_pos, 1), plus the same of BCE(f . E_neg, 0)."""
        f, real = self(windows), positives != 0
        positive = (f * self.item_emb(positives)).sum(-1)[real]
        negative = (f * self.item_emb(negatives)).sum(-1)[real]
        loss = F.binary_cross_entropy_with_logits(positive, torch.ones_like(positive))
        loss = loss + F.binary_cross_entropy_with_logits(negative, torch.zeros_like(negative))
        return loss + l2_emb * torch.linalg.norm(self.item_emb.weight) if l2_emb else loss
