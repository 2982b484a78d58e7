"""NextItNet in PyTorch; side by side with `models.nextitnet`."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from allmrec_jax.models.nextitnet import KERNEL, LAYER_NORM_EPS, NextItNetConfig
from allmrec_jax.torch_baseline.sequential import Sequential


class ResidualBlock(nn.Module):
    """Two dilated convolutions that look back only, each with a layer norm and ReLU."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, KERNEL, dilation=dilation)
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.conv2 = nn.Conv1d(width, width, KERNEL, dilation=2 * dilation)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, x: Float[Tensor, "batch time d"], real: Tensor) -> Float[Tensor, "batch time d"]:
        y = x
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            back = (KERNEL - 1) * conv.dilation[0]
            y = conv(F.pad(y.transpose(1, 2), (back, 0))).transpose(1, 2)
            y = F.relu(norm(y)) * real
        return x + y


class NextItNet(Sequential):
    """Features of left-padded windows."""

    def __init__(self, c: NextItNetConfig):
        super().__init__()
        self.config = c
        self.item_emb = nn.Embedding(c.n_items + 1, c.width, padding_idx=0)
        self.blocks = nn.ModuleList(ResidualBlock(c.width, 4**block) for block in range(c.blocks))
        self.out = nn.Linear(c.width, c.width)
        self.dropout = nn.Dropout(c.dropout)
        nn.init.xavier_normal_(self.item_emb.weight)

    def forward(self, windows: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time d"]:
        real = (windows != 0).unsqueeze(-1)
        x = self.dropout(self.item_emb(windows)) * real
        for block in self.blocks:
            x = block(x, real)
        return self.out(self.dropout(x))
