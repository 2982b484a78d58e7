"""SASRec in PyTorch; side by side with `models.sasrec`. Its `state_dict` has the names of the public A-LLMRec code."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from allmrec_jax.models.sasrec import LAYER_NORM_EPS, SASRecConfig
from allmrec_jax.torch_baseline.sequential import Sequential


class FeedForward(nn.Module):
    """dense, dropout, ReLU, dense, dropout; the dense layers are convolutions of width 1 over time."""

    def __init__(self, c: SASRecConfig):
        super().__init__()
        self.conv1 = nn.Conv1d(c.width, c.width, kernel_size=1)
        self.conv2 = nn.Conv1d(c.width, c.width, kernel_size=1)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Float[Tensor, "batch time d"]) -> Float[Tensor, "batch time d"]:
        hidden = F.relu(self.dropout(self.conv1(x.transpose(1, 2))))
        return self.dropout(self.conv2(hidden)).transpose(1, 2)


class SASRec(Sequential):
    """Features of left-padded windows: causal mask, no padding mask."""

    def __init__(self, c: SASRecConfig):
        super().__init__()
        self.config = c
        blocks = range(c.blocks)
        self.item_emb = nn.Embedding(c.n_items + 1, c.width, padding_idx=0)
        self.pos_emb = nn.Embedding(c.maxlen, c.width)
        self.attention_layernorms = nn.ModuleList(nn.LayerNorm(c.width, eps=LAYER_NORM_EPS) for _ in blocks)
        self.attention_layers = nn.ModuleList(
            nn.MultiheadAttention(c.width, c.heads, dropout=c.dropout, batch_first=True) for _ in blocks
        )
        self.forward_layernorms = nn.ModuleList(nn.LayerNorm(c.width, eps=LAYER_NORM_EPS) for _ in blocks)
        self.forward_layers = nn.ModuleList(FeedForward(c) for _ in blocks)
        self.last_layernorm = nn.LayerNorm(c.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(c.dropout)
        for parameter in self.parameters():
            if parameter.dim() > 1:  # row 0 of item_emb as well
                nn.init.xavier_normal_(parameter)

    def forward(self, windows: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time d"]:
        c, time = self.config, windows.shape[1]
        real = (windows != 0).unsqueeze(-1)
        not_causal = torch.ones(time, time, dtype=torch.bool, device=windows.device).triu(1)
        positions = torch.arange(c.maxlen - time, c.maxlen, device=windows.device)
        x = self.dropout(self.item_emb(windows) * math.sqrt(c.width) + self.pos_emb(positions)) * real
        for k in range(c.blocks):
            query = self.attention_layernorms[k](x)
            attended, _ = self.attention_layers[k](query, x, x, attn_mask=not_causal, need_weights=False)
            x = self.forward_layernorms[k](query + attended)
            x = (x + self.forward_layers[k](x)) * real
        return self.last_layernorm(x)
