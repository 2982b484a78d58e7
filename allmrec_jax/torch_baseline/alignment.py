"""Stage 1 in PyTorch; side by side with `models.alignment` and `training.align`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from allmrec_jax.models.bert import EncoderConfig


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


def in_transformers(c: EncoderConfig) -> nn.Module:
    """The model that transformers has for an encoder's config, in training mode, with new weights."""
    import transformers

    sizes = {"vocab_size": c.vocab_size, "max_position_embeddings": c.max_position_embeddings}
    attention_dropout = c.dropout if c.attention_dropout is None else c.attention_dropout
    if c.architecture == "distilbert":
        config = transformers.DistilBertConfig(
            **sizes,
            dim=c.hidden_size,
            hidden_dim=c.intermediate_size,
            n_layers=c.num_hidden_layers,
            n_heads=c.num_attention_heads,
            dropout=c.dropout,
            attention_dropout=attention_dropout,
        )
        return transformers.DistilBertModel(config).train()
    kinds = {"bert": ("BertConfig", "BertModel"), "mpnet": ("MPNetConfig", "MPNetModel")}
    config, model = (getattr(transformers, name) for name in kinds[c.architecture])
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
    dropout = {"hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": attention_dropout}
    sizes |= {name: getattr(c, name) for name in names}
    return model(config(**sizes, **dropout), add_pooling_layer=False).train()


class SentenceEncoder(nn.Module):
    """Q = the mean of a transformers encoder's last hidden states over the attention mask, or the first of them."""

    def __init__(self, transformer: nn.Module, *, normalize: bool = False, pooling: Literal["mean", "cls"] = "mean"):
        super().__init__()
        self.transformer, self.normalize, self.pooling = transformer, normalize, pooling

    def forward(self, tokens: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]) -> Float[Tensor, "batch h"]:
        hidden = self.transformer(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        Q = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9) if self.pooling == "mean" else hidden[:, 0]
        return F.normalize(Q, dim=-1) if self.normalize else Q


def losses(
    f_I: AutoEncoder,
    f_T: AutoEncoder,
    *,
    x_u: Float[Tensor, "batch d"],
    E_positive: Float[Tensor, "batch d"],
    E_negative: Float[Tensor, "batch d"],
    Q_positive: Float[Tensor, "batch text"],
    Q_negative: Float[Tensor, "batch text"] | None = None,
    weights: Mapping[str, float],
    score: Literal["dot", "mean"] = "dot",
) -> dict[str, Any]:
    """The four terms of the loss and their weighted sum, `loss`. With Q of the negatives too, these enter the first
    three terms as well, two means added."""

    def of_items(E: Tensor, Q: Tensor) -> dict[str, Tensor]:
        e, q = f_I.encode(E), f_T.encode(Q)
        return {
            "match": F.mse_loss(e, q),
            "item": F.mse_loss(f_I.decode(e), E),
            "text": F.mse_loss(f_T.decode(q), Q.detach()),
        }

    terms = of_items(E_positive, Q_positive)
    if Q_negative is not None:
        terms = {name: terms[name] + term for name, term in of_items(E_negative, Q_negative).items()}
    products = (x_u * f_I.decode(f_I.encode(E)) for E in (E_positive, E_negative))
    positive, negative = (p.sum(-1) if score == "dot" else p.mean(-1) for p in products)
    terms["rec"] = F.binary_cross_entropy_with_logits(
        positive, torch.ones_like(positive)
    ) + F.binary_cross_entropy_with_logits(negative, torch.zeros_like(negative))
    return terms | {"loss": sum(weights[name] * term for name, term in terms.items())}


def train_batch(
    optimiser: torch.optim.Optimizer, loss_of: Callable[[slice], Tensor], batch: int, chunk: int = 60
) -> list[float]:
    """A batch as the public code takes it: a step after each chunk, with the gradients of the chunks before it, too.

    Args:
      loss_of: the loss of these rows of the batch.
    """
    optimiser.zero_grad()
    values = []
    for start in range(0, batch, chunk):
        loss = loss_of(slice(start, start + chunk))
        loss.backward()
        optimiser.step()
        values.append(loss.item())
    return values
