"""What a generated text says: which title it names, and whether that is the right one (SPEC of the public protocol).

' "Toy Story (1995)"\n...'   first line, lower-cased, between the first and the last quote mark   toy story (1995)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

RULES = ("exact", "substring")
# What transformers' clean-up of tokenisation spaces takes a space from, in its order.
SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def clean_up(text: str) -> str:
    """Without the spaces that tokenizers once left before punctuation and contractions.

    >>> clean_up("It 's here , is n't it ?")
    "It's here, isn't it?"
    """
    for spaced in SPACED:
        text = text.replace(spaced, spaced.strip())
    return text


def parse(text: str) -> str:
    """The answer of a generated text: its first line, lower-cased, between its first and last quote mark.

    With one quote mark it is empty, without any the whole line.

    >>> parse('"Heat" is what I recommend, or "Alien" perhaps')
    'heat" is what i recommend, or "alien'
    >>> parse('"Heat'), parse("Heat")
    ('', 'heat')
    """
    lines = clean_up(text).strip().splitlines()
    line = lines[0].lower() if lines else ""
    first, last = line.find('"'), line.rfind('"')
    return line if first < 0 else line[first + 1 : last]


def normalise(title: str) -> str:
    """What equal titles have in common: letters of either case, the clean-up's and repeated spaces aside."""
    return re.sub(r"\s+", " ", clean_up(title).lower()).strip()


def hits(answers: Sequence[str], targets: Sequence[str], rule: str = "exact") -> Bool[np.ndarray, " rows"]:
    """Whether each answer names its target.

    exact      the normalised titles are equal (an empty answer names nothing)
    substring  the lower-cased title is contained in the answer (public code; an empty title always is)

    Raises:
      ValueError: for another rule.
    """
    if rule not in RULES:
        raise ValueError(f"there is no rule {rule!r}; choose {' or '.join(RULES)}")
    pairs = zip(answers, targets, strict=True)
    if rule == "substring":
        return np.array([target.lower() in answer for answer, target in pairs], bool)
    return np.array([_same(answer, target) for answer, target in pairs], bool)


def valid(answers: Sequence[str], candidates: Sequence[Sequence[str]]) -> Bool[np.ndarray, " rows"]:
    """Whether each answer is the title of one of its row's candidates; their mean is the valid ratio."""
    pairs = zip(answers, candidates, strict=True)
    return np.array([any(_same(answer, title) for title in titles) for answer, titles in pairs], bool)


def _same(answer: str, title: str) -> bool:
    return bool(normalise(answer)) and normalise(answer) == normalise(title)
