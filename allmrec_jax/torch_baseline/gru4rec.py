"""GRU4Rec in PyTorch; side by side with `models.gru4rec`."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from allmrec_jax.models.gru4rec import GRU4RecConfig
from allmrec_jax.torch_baseline.sequential import Sequential


class GRU4Rec(Sequential):
    """Features of left-padded windows. The GRU itself reads them moved to the left, as it knows no padding."""

    def __init__(self, c: GRU4RecConfig):
        super().__init__()
        self.config = c
        self.item_emb = nn.Embedding(c.n_items + 1, c.width, padding_idx=0)
        self.gru = nn.GRU(c.width, c.width, c.blocks, batch_first=True)
        self.out = nn.Linear(c.width, c.width)
        self.dropout = nn.Dropout(c.dropout)
        nn.init.xavier_normal_(self.item_emb.weight)

    def forward(self, windows: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time d"]:
        time = windows.shape[1]
        pads = (windows == 0).sum(1, keepdim=True)
        positions = torch.arange(time, device=windows.device)
        x = self.dropout(self.item_emb(windows))
        moved = torch.take_along_dim(x, ((positions + pads) % time).unsqueeze(-1), 1)
        states, _ = self.gru(moved)
        back = torch.take_along_dim(states, ((positions - pads) % time).unsqueeze(-1), 1)
        return self.out(back * (positions >= pads).unsqueeze(-1))
