"""Who is tested, and among which candidates: drawn once, so that every model answers the same questions.

test         users with a test item: the scenarios overall, cold-items, warm-items and genres are rows of it
cold-users   users in no training example, with their last item
validation   users with a validation item, from which `fused` learns; no test item is ever among the candidates
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from allmrec_jax.data.candidates import SEED_STREAM, draw_for_test
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.errors import UserError

ROWS = 4096  # histories that are looked at together


@dataclass(frozen=True, eq=False)
class Lists:
    """A row each: a user, the candidates in a seeded random order, and the column of the item taken next.

    recency: of each candidate, 1 for the oldest item of the user's history, more for later ones, 0 if it is not in it.
    """

    group: str
    users: Int[np.ndarray, " rows"]
    candidates: Int[np.ndarray, "rows candidates"]
    column: Int[np.ndarray, " rows"]
    recency: Int[np.ndarray, "rows candidates"]

    @property
    def split(self) -> str:
        return "validation" if self.group == "validation" else "test"

    @property
    def targets(self) -> Int[np.ndarray, " rows"]:
        return self.candidates[np.arange(len(self.users)), self.column]

    @property
    def repeats(self) -> Bool[np.ndarray, " rows"]:
        """Whether the target is an item that the user had before: then copying from the history finds it."""
        return self.recency[np.arange(len(self.users)), self.column] > 0


def members(dataset: Dataset, group: str, *, seed: int, most: int | None) -> Int[np.ndarray, " rows"]:
    """The first `most` of a seeded random order of the group's users; of more or fewer users the beginning is the same.

    Raises:
      UserError: if there are none.
    """
    if group == "cold-users":
        users = dataset.scenario("cold-users").users
    else:
        users = np.flatnonzero(dataset.has_target("validation" if group == "validation" else "test"))
    if not len(users):
        raise UserError(f"{dataset.name}: no user has three items, so there is nothing to test on")
    more = [] if group == "test" else [1 if group == "validation" else 2]
    return np.random.default_rng([seed, SEED_STREAM, *more]).permutation(users)[:most].astype(np.int64)


def recency(
    dataset: Dataset, users: Int[np.ndarray, " rows"], candidates: Int[np.ndarray, "rows candidates"], split: str
) -> Int[np.ndarray, "rows candidates"]:
    """See `Lists`: the place of each candidate's last occurrence in the whole history, counted from the oldest item."""
    found = np.zeros(candidates.shape, np.int32)
    for start in range(0, len(users), ROWS):
        part = slice(start, start + ROWS)
        longest = int(max(2, dataset.lengths[users[part][users[part] <= dataset.n_users]].max(initial=2)))
        histories = dataset.histories(users[part], longest, split)
        place = np.cumsum(histories > 0, axis=1)
        for column in range(candidates.shape[1]):
            same = (histories == candidates[part, column, None]) & (histories > 0)
            found[part, column] = np.where(same, place, 0).max(axis=1)
    return found


def draw(dataset: Dataset, group: str, *, seed: int, most: int | None, candidates: int) -> Lists:
    """The lists of a group of at most `most` users. See `draw_for_test` for what is raised."""
    users = members(dataset, group, seed=seed, most=most)
    split = "validation" if group == "validation" else "test"
    drawn, column = draw_for_test(dataset, users, seed=seed, count=candidates, split=split)
    return Lists(group, users, drawn, column, recency(dataset, users, drawn, split))
