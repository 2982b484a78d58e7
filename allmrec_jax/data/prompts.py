"""Prompts: text with injection slots, tokenised piece by piece (paper, section 4.2; templates are data)."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Integer

from allmrec_jax.config import Injection
from allmrec_jax.errors import UserError

Items = Sequence[int] | Integer[np.ndarray, "_"]
PLACES = {"done", "noun", "do", "history", "candidates"}
PLACEHOLDER = 0  # token id that stands in a slot; its embedding is replaced


@dataclass(frozen=True)
class Template:
    """The sentence, with the words of one domain. `{history}` and `{candidates}` are lists of quoted titles.

        user  item
        first after    O_u is a user representation. This user has watched "T1" O_1 ,"T2" O_2 in the ... is
        last  before   This user has watched  O_1 "T1", O_2 "T2" in the ... The recommendation is  O_u

    user: what follows O_u at the front; not in a prompt without it, or with O_u at the end.
    strip: take white space behind an O_i away, as the public code's tokenizer did.
    user_place, item_place: of O_u and of each O_i beside its title; None: not in the prompt.
    """

    done: str = "bought"
    noun: str = "item"
    do: str = "buy"
    user: str = " is a user representation. "
    text: str = (
        "This user has {done} {history} in the previous. Recommend one next {noun} for this user to {do} next "
        "from the following {noun} title set, {candidates}. The recommendation is "
    )
    strip: bool = False
    user_place: Literal["first", "last"] | None = "first"
    item_place: Literal["after", "before"] | None = "after"


DOMAINS = {
    "movies": Template("watched", "movie", "watch"),
    "games": Template("played", "game", "play"),
    "shopping": Template("bought", "item", "buy"),
    "none": Template(text="{history}{candidates}. The recommendation is "),  # the public code's, elsewhere
}


def template_of(config: Injection) -> Template:
    """The prompt that a config asks for.

    Raises:
      UserError: if its sentence lacks a place for the history or the candidates, or has an unknown one.
    """
    text = DOMAINS[config.domain].text if config.sentence is None else config.sentence
    fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    if fields.count("history") != 1 or fields.count("candidates") != 1 or set(fields) - PLACES:
        raise UserError(
            "llm.sentence must hold {history} and then {candidates} once each, and of others only {done}, {noun}, {do}"
        )
    if fields.index("history") > fields.index("candidates"):
        raise UserError("llm.sentence must hold {history} before {candidates}")
    return replace(
        DOMAINS[config.domain],
        user=config.user_sentence,
        text=text,
        strip=config.strip_around_special,
        user_place=config.user_place if config.user_vector else None,
        item_place=None if config.item_vectors == "none" else config.item_place,
    )


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt. `slots` and `slot_items` say where the O_i of which item goes, `user_slot` where O_u."""

    tokens: list[int]
    slots: list[int]
    slot_items: list[int]
    user_slot: int | None


class PromptBuilder:
    """Tokenises prompts piece by piece: the text is split at the slots and each distinct piece is tokenised once.

    Args:
      tokenizer: texts -> ids (`models.llm.tokenizer.Tokenizer`).
      titles: title of each item id; None becomes `No Title`.
      inject: with False the prompt holds titles only (the LLM-only baseline): no O_u, no O_i.
    """

    def __init__(
        self, tokenizer, titles: Sequence[str | None], template: Template, *, context: int, inject: bool = True
    ):
        self.tokenizer, self.context = tokenizer, context
        self.template = template if inject else replace(template, user_place=None, item_place=None)
        self.titles = ["No Title" if title is None else title for title in titles]
        self._pieces: dict[str, list[int]] = {}
        self._answers: dict[int, list[int]] = {}

    def answers(self, items: Items) -> list[list[int]]:
        """Tokens of `"Title"` and the end token for each item: a text of its own, without the tokenizer's BOS."""
        new = [item for item in dict.fromkeys(items) if item not in self._answers]
        for item, ids in zip(new, self.tokenizer([f'"{self.titles[item]}"' for item in new]), strict=True):
            self._answers[item] = [*ids, self.tokenizer.eos]
        return [self._answers[item] for item in items]

    def prompts(
        self, histories: Sequence[Items], candidates: Sequence[Items] | Integer[np.ndarray, "_ _"]
    ) -> list[Prompt]:
        """One prompt a user. A prompt longer than the context loses its oldest history first.

        Raises:
          UserError: if it does not fit even without history.
        """
        plans = [self._plan(h, c) for h, c in zip(histories, candidates, strict=True)]
        new = [
            piece for piece in dict.fromkeys(text for plan in plans for text, _ in plan) if piece not in self._pieces
        ]
        self._pieces.update(zip(new, self.tokenizer(new), strict=True))
        return [self._fit(h, c, plan) for h, c, plan in zip(histories, candidates, plans, strict=True)]

    def _plan(self, history: Items, candidates: Items) -> list[tuple[str, int | None]]:
        """Pieces of text, each with the item whose slot follows it (None, for the last one: no slot)."""
        t = self.template
        before, rest = t.text.format(done=t.done, noun=t.noun, do=t.do, history="\0", candidates="{candidates}").split(
            "\0"
        )
        middle, after = rest.split("{candidates}")
        plan, text = [], (t.user if t.user_place == "first" else "") + before
        for items, following in ((history, middle), (candidates, after)):
            for k, item in enumerate(items):
                text, title = text + ("," if k else ""), f'"{self.titles[item]}"'
                if t.item_place is None:
                    text += title
                elif t.item_place == "before":
                    plan.append((text, int(item)))
                    text = title
                else:
                    plan.append((text + title, int(item)))
                    text = ""
            # The public code's tokenizer dropped white space behind an O_i; a title's quote mark stands before it.
            text += following.lstrip() if t.strip and plan and not text else following
        return [*plan, (text, None)]

    def _fit(self, history: Items, candidates: Items, plan: list[tuple[str, int | None]]) -> Prompt:
        longest = max(len(answer) for answer in self.answers(candidates))
        while True:
            prompt = self._assemble(plan)
            if len(prompt.tokens) + longest <= self.context:
                return prompt
            if not len(history):
                raise UserError(
                    f"a prompt of {len(prompt.tokens)} tokens and an answer of {longest} do not fit the LLM's context "
                    f"of {self.context}; use fewer candidates or an LLM with a longer context"
                )
            history = history[1:]
            plan = self._plan(history, candidates)
            new = [text for text, _ in plan if text not in self._pieces]
            self._pieces.update(zip(new, self.tokenizer(new), strict=True))

    def _assemble(self, plan: list[tuple[str, int | None]]) -> Prompt:
        place = self.template.user_place
        tokens: list[int] = [PLACEHOLDER] if place == "first" else []
        if self.tokenizer.bos is not None:
            tokens.append(self.tokenizer.bos)
        slots, items = [], []
        for text, item in plan:
            tokens.extend(self._pieces[text])
            if item is not None:
                slots.append(len(tokens))
                items.append(item)
                tokens.append(PLACEHOLDER)
        if place == "last":
            tokens.append(PLACEHOLDER)
        return Prompt(tokens, slots, items, {"first": 0, "last": len(tokens) - 1, None: None}[place])
