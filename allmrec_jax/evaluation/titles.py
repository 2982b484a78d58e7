"""Which items free text means: equal titles, titles that contain it, or the most similar ones; doubts are kept."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from allmrec_jax.data.dataset import Dataset
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation.answers import normalise

MOST = 5  # titles that may fit a text before it is too vague


@dataclass(frozen=True)
class Match:
    """What a text was taken for, and what else it could mean.

    how: the titles are `equal` (letters of either case and spaces aside), the title contains the text (`within`), or
    is `near` it.
    """

    asked: str
    item: int
    title: str
    how: Literal["equal", "within", "near"]
    others: tuple[str, ...] = ()


def find_items(dataset: Dataset, texts: Sequence[str]) -> list[Match]:
    """The item that each text means: of several that fit, the most similar title, then the most popular item.

    Raises:
      UserError: if nothing is like a text, or more than `MOST` titles contain it; the nearest are listed.
    """
    titles, counts = dataset.titles(), dataset.train_counts()
    known: dict[str, list[int]] = {}
    for item, title in enumerate(titles):
        if title is not None and normalise(title):
            known.setdefault(normalise(title), []).append(item)
    found = []
    for text in texts:
        wanted = normalise(text)
        if not wanted:
            raise UserError("a title is empty; name at least a part of it")
        within = [name for name in known if wanted in name]
        near = difflib.get_close_matches(wanted, known, n=MOST, cutoff=0.6) if not within else []
        names = [wanted] if wanted in known else within or near
        if not names:
            raise UserError(f"there is no title like {text!r} in {dataset.name}")
        names.sort(key=lambda name: -difflib.SequenceMatcher(None, wanted, name).ratio())
        if len(names) > MOST:
            shown = "; ".join(str(titles[known[name][0]]) for name in names[:MOST])
            raise UserError(f"{text!r} fits several titles in {dataset.name} ({len(names)}); did you mean: {shown}")
        first, *same = sorted(known[names[0]], key=lambda item: (-counts[item], item))
        others = [f"{titles[item]} ({dataset.item_keys[item]})" for item in same]
        others += [str(titles[known[name][0]]) for name in names[1:]]
        how = "equal" if wanted in known else "within" if within else "near"
        found.append(Match(text, first, str(titles[first]), how, tuple(others)))
    return found


def doubts(matches: Sequence[Match]) -> list[str]:
    """What was not said exactly, in words: what it was taken for, and what else it could mean."""
    lines = []
    for match in matches:
        if match.how != "equal" or match.others:
            more = f"; it could also be {'; '.join(match.others)}" if match.others else ""
            lines.append(f"{match.asked!r} was taken for {match.title!r}{more}")
    return lines
