"""What the PyTorch models of item sequences share; side by side with `models.sequential`."""

from __future__ import annotations

import math

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

    def gbce(
        self,
        windows: Int[Tensor, "batch time"],
        positives: Int[Tensor, "batch time"],
        negatives: Int[Tensor, "batch time k"],
        beta: float,
    ) -> Float[Tensor, ""]:
        """gSASRec's loss over several negatives, scaled so that one negative and beta = 1 give `loss`."""
        f, real = self(windows), positives != 0
        positive = (f * self.item_emb(positives)).sum(-1)[real]
        negative = torch.einsum("btd,btkd->btk", f, self.item_emb(negatives))[real]
        terms = -beta * F.logsigmoid(positive) - F.logsigmoid(-negative).sum(-1)
        return terms.mean() * 2 / (negatives.shape[-1] + 1)

    def cross_entropy(
        self,
        windows: Int[Tensor, "batch time"],
        positives: Int[Tensor, "batch time"],
        shared: Int[Tensor, " shared"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean over non-padding positions of the cross-entropy among all items, or among shared ones and the next."""
        f, real = self(windows), positives != 0
        E = self.item_emb.weight[1:]
        if shared is None:
            return F.cross_entropy((f @ E.T)[real], positives[real] - 1)
        logits = (f @ E[shared - 1].T)[real] + math.log(len(E) / len(shared))
        logits = logits.masked_fill(shared[None] == positives[real][:, None], -torch.inf)
        positive = (f * self.item_emb(positives)).sum(-1)[real]
        logits = torch.cat([positive[:, None], logits], dim=1)
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
