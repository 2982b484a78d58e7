"""What needs no learning: a model that does not beat these has found nothing that counting does not.

popularity   training interactions of the item
repeat       items of the user's history, the latest first; then by popularity
markov       how often the item came next after the user's last item, in training; then by popularity
leak-check   items of the history, then by how often an item came next after one of the last three, then by
             popularity: how far copying gets where people come back to items and no other candidate is an old one
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from allmrec_jax.data.dataset import Dataset
from allmrec_jax.evaluation.labels import TRIVIAL
from allmrec_jax.evaluation.lists import Lists

NAMES = TRIVIAL
LAST = 3  # items of the history that the leak check looks at


class Transitions:
    """How often each item came right after each other in training."""

    def __init__(self, dataset: Dataset):
        self.n_items = dataset.n_items
        users, train = dataset.users_of_items(), dataset.is_train
        next_to = train[1:] & train[:-1] & (users[1:] == users[:-1])
        pairs = dataset.items[:-1][next_to].astype(np.int64) * (self.n_items + 1) + dataset.items[1:][next_to]
        self.pairs, self.counts = np.unique(pairs, return_counts=True)

    def __call__(
        self, before: Int[np.ndarray, " rows"], after: Int[np.ndarray, "rows candidates"]
    ) -> Int[np.ndarray, "rows candidates"]:
        """Counts of `before` -> `after`; of item 0, none."""
        wanted = before.astype(np.int64)[:, None] * (self.n_items + 1) + after
        if not len(self.pairs):
            return np.zeros(after.shape, np.int64)
        at = np.searchsorted(self.pairs, wanted).clip(max=len(self.pairs) - 1)
        return np.where(self.pairs[at] == wanted, self.counts[at], 0)


def in_order(*keys: Int[np.ndarray, "rows candidates"]) -> Float[np.ndarray, "rows candidates"]:
    """One score that orders by the first key, then by the second, and so on; equal where all keys are.

    >>> in_order(np.array([[0, 2, 0, 0]]), np.array([[5, 1, 7, 5]])).tolist()
    [[0.0, 3.0, 2.0, 0.0]]
    """
    order = np.lexsort(keys[::-1], axis=1)
    differs = np.zeros((len(order), order.shape[1] - 1), bool)
    for key in keys:
        differs |= np.diff(np.take_along_axis(key, order, 1), axis=1) != 0
    place = np.where(differs, np.arange(1, order.shape[1]), 0)
    place = np.maximum.accumulate(np.pad(place, ((0, 0), (1, 0))), axis=1)
    scores = np.empty(order.shape)
    np.put_along_axis(scores, order, place.astype(float), axis=1)
    return scores


def score(dataset: Dataset, lists: Lists) -> dict[str, Float[np.ndarray, "rows candidates"]]:
    """The scores of each of `NAMES`."""
    candidates = lists.candidates
    popularity = dataset.train_counts()[candidates]
    last = dataset.histories(lists.users, LAST, lists.split)
    after = Transitions(dataset)
    followed = [after(last[:, k], candidates) for k in range(LAST)]
    return {
        "popularity": popularity.astype(float),
        "repeat": in_order(lists.recency, popularity),
        "markov": in_order(followed[-1], popularity),
        "leak-check": in_order((lists.recency > 0).astype(int), np.sum(followed, axis=0), popularity),
    }
