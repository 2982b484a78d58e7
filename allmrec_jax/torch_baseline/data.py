"""Batches for the training loops, drawn with NumPy; side by side with `data.batches`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from allmrec_jax.config import CF, Alignment, Injection
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.data.prompts import PromptBuilder
from allmrec_jax.torch_baseline.training import AlignBatch, CFBatch, InjectBatch

Represent = Callable[[Int[np.ndarray, "users maxlen"], Int[np.ndarray, " users"]], Tensor]  # windows, users -> x_u


class Negatives:
    """Items that a user does not have among the training items, uniform: drawn, and drawn again where they have."""

    def __init__(self, dataset: Dataset, rng: np.random.Generator):
        items, offsets = dataset.distinct("train")
        self.n_items, self.rng = dataset.n_items, rng
        self.counts = np.diff(offsets)
        self.pairs = np.repeat(np.arange(len(self.counts)), self.counts) * (self.n_items + 1) + items  # ascending

    def _had(self, users: np.ndarray, items: np.ndarray) -> Bool[np.ndarray, " n"]:
        wanted = users * (self.n_items + 1) + items
        at = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        return self.pairs[at] == wanted

    def __call__(self, users: Int[np.ndarray, " users"], count: int) -> Int[np.ndarray, "users count"]:
        """`count` for each user; 0 for one who has every item."""
        owners = np.repeat(users, count)
        drawn = np.zeros(len(owners), np.int64)
        left = np.flatnonzero(self.counts[owners] < self.n_items)
        while len(left):
            drawn[left] = self.rng.integers(1, self.n_items + 1, len(left))
            left = left[self._had(owners[left], drawn[left])]
        return drawn.reshape(len(users), count)

    def distinct(self, user: int, count: int) -> Int[np.ndarray, " count"]:
        """`count` different ones for one user."""
        chosen: list[int] = []
        if self.n_items - self.counts[user] < count:
            raise ValueError(f"user {user} leaves only {self.n_items - self.counts[user]} items for {count} candidates")
        while len(chosen) < count:
            chosen += [item for item in self(np.array([user]), count)[0].tolist() if item not in chosen]
            chosen = list(dict.fromkeys(chosen))
        return np.array(chosen[:count])


def cf_batches(dataset: Dataset, config: CF, rng: np.random.Generator, steps: int) -> Iterator[CFBatch]:
    """Users uniform with replacement among those with two training items; what follows each item, and what does not."""
    negatives, L = Negatives(dataset, rng), config.maxlen
    ends = dataset.history_end("test") if config.refit else dataset.offsets[:-1] + dataset.n_train
    eligible = np.flatnonzero(ends - dataset.offsets[:-1] > 1)
    each, shared = (config.negatives, 0) if config.loss == "bce" else (1, config.negatives)
    for _ in range(steps):
        users = rng.choice(eligible, config.batch)
        last = ends[users]
        if config.crop:
            spare = np.maximum(last - dataset.offsets[users] - 1 - L, 0)
            last = last - rng.integers(0, spare + 1)
        whole = dataset.windows(last, L + 1, users)
        windows, positives = whole[:, :-1], np.where(whole[:, :-1] > 0, whole[:, 1:], 0)
        drawn = negatives(users, L * each).reshape(len(users), L, each)
        others = torch.from_numpy(rng.integers(1, dataset.n_items + 1, shared)) if shared else None
        parts = (torch.from_numpy(np.asarray(part, np.int64)) for part in (users, windows, positives, drawn))
        yield CFBatch(*parts, others)


def align_batches(
    dataset: Dataset,
    config: Alignment,
    represent: Represent,
    E: Tensor,
    texts: tuple[np.ndarray, np.ndarray],
    maxlen: int,
    rng: np.random.Generator,
) -> Iterator[AlignBatch]:
    """All epochs: (history, next item, random negative) of each user.

    Args:
      texts: ids (items, longest) and lengths of all items' texts.
      represent: gives x_u; it decides on dropout.
    """
    users, ends, targets = dataset.examples(config.targets, single=config.single_items)
    negatives, windows = Negatives(dataset, rng), dataset.windows(ends, maxlen, users)
    chunk = config.chunk or config.batch
    for _ in range(config.epochs):
        order = np.arange(len(users)) if config.order == "file" else rng.permutation(len(users))
        for start in range(0, len(order), config.batch):
            batch = order[start : start + config.batch]
            for at in range(0, len(batch), chunk):
                rows = batch[at : at + chunk]
                positive = targets[rows]
                negative = np.where(positive > 0, negatives(users[rows], 1)[:, 0], 0)
                yield AlignBatch(
                    represent(windows[rows], users[rows]),
                    E[positive],
                    E[negative],
                    _padded(texts, positive),
                    _padded(texts, negative),
                    first=at == 0,
                )


def _padded(texts: tuple[np.ndarray, np.ndarray], items: np.ndarray) -> tuple[Tensor, Tensor]:
    """(tokens, mask) of the items' texts, to the longest of them."""
    tokens, lengths = texts
    longest = int(lengths[items].max())
    mask = np.arange(longest)[None] < lengths[items][:, None]
    return torch.from_numpy(tokens[items, :longest].astype(np.int64)), torch.from_numpy(mask)


class InjectBatches:
    """The batches of stage 2: each user's prompt among candidates that are drawn anew in every epoch."""

    def __init__(
        self,
        dataset: Dataset,
        config: Injection,
        builder: PromptBuilder,
        represent: Represent,
        maxlen: int,
        rng: np.random.Generator,
    ):
        self.users, self.ends, self.targets = dataset.examples(config.targets, single=config.single_items)
        self.config, self.builder, self.represent, self.rng = config, builder, represent, rng
        self.negatives = Negatives(dataset, rng)
        self.windows = dataset.windows(self.ends, maxlen, self.users)
        self.histories = dataset.windows(self.ends, config.history, self.users)
        self.steps = max(1, round(-(-len(self.users) // config.batch) * config.epochs))

    def __iter__(self) -> Iterator[InjectBatch]:
        order: list[int] = []
        for _ in range(self.steps):
            order = order or self.rng.permutation(len(self.users)).tolist()
            rows, order = order[: self.config.batch], order[self.config.batch :]
            yield self._batch(np.array(rows))

    def _batch(self, rows: np.ndarray) -> InjectBatch:
        lists, columns = [], []
        for row in rows:
            others = self.negatives.distinct(int(self.users[row]), self.config.candidates - 1)
            shuffled = self.rng.permutation(np.append(others, self.targets[row]))
            lists.append(shuffled)
            columns.append(int(np.flatnonzero(shuffled == self.targets[row])[0]))
        prompts = self.builder.prompts([h[h != 0] for h in self.histories[rows]], np.stack(lists))
        if self.config.choice_weight:
            answers = [self.builder.answers(row.tolist()) for row in lists]
        else:
            answers, columns = [[a] for a in self.builder.answers(self.targets[rows].tolist())], [0] * len(rows)
        return InjectBatch(prompts, answers, columns, self.represent(self.windows[rows], self.users[rows]))


def representer(model: Any, *, dropout: bool) -> Represent:
    """x_u by a CF model that is not trained any more, its dropout on or off (the public code never turns it off)."""

    def represent(windows: np.ndarray, users: np.ndarray) -> Tensor:
        model.train(dropout)
        with torch.no_grad():
            return model.user_representation(torch.from_numpy(np.asarray(windows, np.int64)))

    return represent
