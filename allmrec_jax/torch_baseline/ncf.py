"""NCF in PyTorch; side by side with `models.ncf`."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from allmrec_jax.models.ncf import NCFConfig


class NCF(nn.Module):
    """Scores of users and items."""

    def __init__(self, c: NCFConfig):
        super().__init__()
        self.config = c
        g, m = c.halves
        self.item_emb = nn.Embedding(c.n_items + 1, c.width)
        self.user_emb = nn.Embedding(c.n_users + 1, c.width)
        self.mlp = nn.ModuleList(nn.Linear(2 * m if k == 0 else m, m) for k in range(c.blocks))
        self.out = nn.Linear(g + m, 1)
        nn.init.normal_(self.item_emb.weight, std=0.1)
        nn.init.normal_(self.user_emb.weight, std=0.1)

    def forward(self, users: Int[Tensor, " batch"], items: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
        g, _ = self.config.halves
        rows = self.item_emb(items)
        P_u = self.user_emb(users)[:, None].expand_as(rows)
        hidden = torch.cat([P_u[..., g:], rows[..., g:]], dim=-1)
        for layer in self.mlp:
            hidden = F.relu(layer(hidden))
        return self.out(torch.cat([P_u[..., :g] * rows[..., :g], hidden], dim=-1)).squeeze(-1)

    def loss(
        self, users: Int[Tensor, " batch"], positives: Int[Tensor, "batch time"], negatives: Int[Tensor, "batch time"]
    ) -> Float[Tensor, ""]:
        """Mean over non-padding positions of BCE(score, 1) of the positives, plus the same of BCE(score, 0)."""
        real = positives != 0
        positive, negative = self(users, positives)[real], self(users, negatives)[real]
        loss = F.binary_cross_entropy_with_logits(positive, torch.ones_like(positive))
        return loss + F.binary_cross_entropy_with_logits(negative, torch.zeros_like(negative))
