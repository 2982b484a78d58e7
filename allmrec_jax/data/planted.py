"""Planted data: what a user takes next is told by vectors alone, never by a title.

    item    1  2  3 | 4  5  6 | 7 ...      groups of `each` items
    E_i     near g1 | near g2 |            a direction for each group, and noise
    user    5  4  6                        all items of one group, in a random order
    title   ogre, lamp, ...                distinct words, drawn at random

A user's next item is the one of its group that the history lacks, so that candidates which the user never took are all
of other groups: x_u, the mean of the history's E_i, points at the right one. Every item is equally popular. Whoever
reads titles alone, or counts, is at chance; whoever is shown x_u and E_i can always be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from allmrec_jax.data.dataset import Dataset
from allmrec_jax.errors import UserError


def vectors(
    items: int, *, each: int = 5, width: int = 16, noise: float = 0.3, seed: int = 0
) -> Float[np.ndarray, "rows width"]:
    """E (items + 1, width), row 0 zeros: g of the item's group (a random unit vector), plus noise of this length."""
    random = np.random.default_rng([seed, 0])
    groups = random.normal(size=(-(-items // each), width))
    groups /= np.linalg.norm(groups, axis=1, keepdims=True)
    E = groups[np.arange(items) // each] + noise * random.normal(size=(items, width)) / np.sqrt(width)
    return np.concatenate([np.zeros((1, width)), E]).astype(np.float32)


def plant(path: Path, titles: Sequence[str], *, users: int, each: int = 5, seed: int = 0) -> Dataset:
    """The prepared data set of so many users over items with these titles.

    Another seed gives other users of the same items.

    Raises:
      UserError: if the items cannot be cut into groups of `each`, or groups are too small to leave a training target.
    """
    from allmrec_jax.data.writer import write_dataset

    items = len(titles)
    if each < 4 or items % each:
        raise UserError(f"{items} items cannot be cut into groups of {each}; groups hold at least 4")
    random = np.random.default_rng([seed, 1])
    orders = random.permuted(np.tile(np.arange(1, each + 1), (users, 1)), axis=1)
    sequences = each * random.integers(0, items // each, (users, 1)) + orders
    return write_dataset(
        path,
        name="planted",
        items=sequences.ravel(),
        offsets=np.concatenate([[0], each * np.arange(users + 1)]),
        times=None,
        ratings=None,
        user_keys=[f"u{user}" for user in range(1, users + 1)],
        item_keys=[f"i{item}" for item in range(1, items + 1)],
        titles=list(titles),
        descriptions=[None] * items,
        categories=[[]] * items,
    )


def words(tokenizer, count: int, *, seed: int = 0) -> list[str]:
    """So many distinct words, drawn at random, that are one token each between quote marks.

    Args:
      tokenizer: `models.llm.tokenizer.Tokenizer`.

    Raises:
      UserError: if it knows too few.
    """
    known = sorted(token for token in tokenizer.backend.get_vocab() if token.isalpha() and token.isascii())
    whole = [word for word, ids in zip(known, tokenizer([f'"{word}"' for word in known]), strict=True) if len(ids) == 3]
    if len(whole) < count:
        raise UserError(f"the tokenizer knows {len(whole)} words of one token, but {count} titles are asked for")
    return [whole[i] for i in np.random.default_rng([seed, 2]).permutation(len(whole))[:count]]
