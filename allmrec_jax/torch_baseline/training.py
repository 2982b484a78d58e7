"""The training loops in PyTorch; side by side with `training.cf`, `training.align` and `training.inject`.

Each is a generator that trains on one batch after the other and yields the loss, so that whoever runs it may look at
the model in between. The batches are given: this package's own (`torch_baseline.data`), or anybody's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from allmrec_jax.config import CF, Alignment, Injection
from allmrec_jax.data.prompts import Prompt
from allmrec_jax.models.losses import Objective
from allmrec_jax.torch_baseline import alignment
from allmrec_jax.torch_baseline.inject import Injector
from allmrec_jax.torch_baseline.ncf import NCF

Watch = Callable[[], Any]  # called when the gradients of a step are there, before they are used
BETAS, EPS = (0.9, 0.98), 1e-8


def nothing() -> None:
    """For whoever does not watch."""


# -------------------------------------------------------------------------------------------------------------- stage 0


class CFBatch(NamedTuple):
    """Users (batch,), and beside each position of their windows what came next and what did not (batch, time, k).

    shared: items that all positions take as negatives, in place of their own.
    """

    users: Tensor
    windows: Tensor
    positives: Tensor
    negatives: Tensor
    shared: Tensor | None = None


def cf_loss(model: Any, batch: CFBatch, config: CF, n_items: int) -> Tensor:
    """The loss that a config asks for."""
    objective = Objective(config.loss, config.negatives, config.calibration)
    if isinstance(model, NCF):
        return model.loss(batch.users, batch.positives, batch.negatives[..., 0])
    if config.loss == "softmax":
        return model.cross_entropy(batch.windows, batch.positives, batch.shared)
    if config.negatives == 1 and config.calibration == 0:
        return model.loss(batch.windows, batch.positives, batch.negatives[..., 0], config.l2_emb)
    loss = model.gbce(batch.windows, batch.positives, batch.negatives, objective.beta(n_items))
    return loss + config.l2_emb * torch.linalg.norm(model.item_emb.weight) if config.l2_emb else loss


def train_cf(
    model: nn.Module, batches: Iterable[CFBatch], config: CF, n_items: int, watch: Watch = nothing
) -> Iterator[float]:
    """Stage 0: Adam (AdamW with `weight_decay`) over all parameters, dense."""
    kind = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
    optimiser = kind(
        model.parameters(), lr=config.learning_rate, betas=BETAS, eps=EPS, weight_decay=config.weight_decay
    )
    for batch in batches:
        optimiser.zero_grad()
        loss = cf_loss(model, batch, config, n_items)
        loss.backward()
        watch()
        optimiser.step()
        yield loss.item()


# -------------------------------------------------------------------------------------------------------------- stage 1


class AlignBatch(NamedTuple):
    """Users' representations (n, d), E and the texts of their next items and of the negatives, and where it begins.

    first: whether this is the first chunk of a batch; the gradients of earlier chunks stay in those of later ones.
    """

    x_u: Tensor
    E_positive: Tensor
    E_negative: Tensor
    text_positive: tuple[Tensor, Tensor]
    text_negative: tuple[Tensor, Tensor]
    first: bool = True


def align_terms(
    f_I: nn.Module, f_T: nn.Module, encoder: nn.Module, batch: AlignBatch, config: Alignment
) -> dict[str, Any]:
    """The loss and its terms. The negatives' texts are encoded apart, and only where they are needed."""
    with torch.set_grad_enabled(config.train_encoder and torch.is_grad_enabled()):
        Q_positive = encoder(*batch.text_positive)
        Q_negative = encoder(*batch.text_negative) if config.items == "both" else None
    return alignment.losses(
        f_I,
        f_T,
        x_u=batch.x_u,
        E_positive=batch.E_positive,
        E_negative=batch.E_negative,
        Q_positive=Q_positive,
        Q_negative=Q_negative,
        weights={
            "match": float(config.match),
            "item": config.alpha * config.reconstruction,
            "text": config.beta * config.reconstruction,
            "rec": float(config.recommendation),
        },
        score=config.score,
    )


def train_align(
    f_I: nn.Module,
    f_T: nn.Module,
    encoder: nn.Module,
    batches: Iterable[AlignBatch],
    config: Alignment,
    watch: Watch = nothing,
) -> Iterator[dict[str, float]]:
    """Stage 1: f_I, f_T and, unless told otherwise, the sentence encoder. Yields the loss and its terms."""
    groups = [{"params": [*f_I.parameters(), *f_T.parameters()]}]
    if config.train_encoder:
        rate = config.encoder_learning_rate or config.learning_rate
        groups.append({"params": list(encoder.parameters()), "lr": rate})
    optimiser = torch.optim.Adam(groups, lr=config.learning_rate, betas=BETAS, eps=EPS)
    for batch in batches:
        if batch.first:
            optimiser.zero_grad()
        terms = align_terms(f_I, f_T, encoder, batch, config)
        terms["loss"].backward()
        watch()
        optimiser.step()
        yield {name: term.item() for name, term in terms.items()}


# -------------------------------------------------------------------------------------------------------------- stage 2


class InjectBatch(NamedTuple):
    """Prompts, the answers that may follow each (its target's alone, or one a candidate), and users' x_u (batch, d).

    targets: the number of the target among each prompt's answers.
    """

    prompts: list[Prompt]
    answers: list[list[list[int]]]
    targets: list[int]
    x_u: Tensor


def inject_loss(injector: Injector, batch: InjectBatch, e: Tensor, config: Injection) -> Tensor:
    """The weighted sum of the title's cross-entropy and the choice loss."""
    loss = torch.zeros(())
    if config.title_weight:
        own = [answers[target] for answers, target in zip(batch.answers, batch.targets, strict=True)]
        loss = loss + config.title_weight * injector(batch.prompts, own, batch.x_u, e)
    if config.choice_weight:
        targets = torch.tensor(batch.targets)
        choice = injector.choice_loss(batch.prompts, batch.answers, targets, batch.x_u, e, sharpness=config.sharpness)
        loss = loss + config.choice_weight * choice
    return loss


def learning_rate(config: Injection, step: int, steps: int) -> float:
    """Of this step: linear warm-up, then constant or a cosine down to 0."""
    warmup = min(config.warmup, steps)
    if step < warmup:
        return config.learning_rate * step / max(1, warmup)
    if not config.decay:
        return config.learning_rate
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def train_inject(
    injector: Injector,
    batches: Iterable[InjectBatch],
    e: Tensor,
    config: Injection,
    steps: int,
    watch: Watch = nothing,
) -> Iterator[float]:
    """Stage 2: F_U and F_I through the frozen LLM.

    Args:
      steps: of the whole training, which the learning rate goes by.
    """
    trained = [p for p in injector.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=config.learning_rate, betas=BETAS, eps=EPS)
    for step, batch in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, step, steps)
        optimiser.zero_grad()
        loss = inject_loss(injector, batch, e, config)
        loss.backward()
        watch()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(trained, config.clip)
        optimiser.step()
        yield loss.item()
