"""Prompts: text with injection slots, tokenised piece by piece (paper, section 4.2; templates are data)."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

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

    user: what follows O_u; not in the prompt of the LLM alone.
    strip: take white space beside an O_i away, as the public code's tokenizer did.
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
    return replace(DOMAINS[config.domain], user=config.user_sentence, text=text, strip=config.strip_around_special)


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt. `slots` and `slot_items` say where the O_i of which item goes; `user_slot` is 0 or None."""

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
        self.tokenizer, self.template, self.context, self.inject = tokenizer, template, context, inject
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
        """Pieces of text, each with the item whose slot follows it (None: no slot)."""
        t = self.template
        before, rest = t.text.format(done=t.done, noun=t.noun, do=t.do, history="\0", candidates="{candidates}").split(
            "\0"
        )
        middle, after = rest.split("{candidates}")
        if not self.inject:
            quoted = [",".join(f'"{self.titles[i]}"' for i in items) for items in (history, candidates)]
            return [(f"{before}{quoted[0]}{middle}{quoted[1]}{after}", None)]
        plan, text = [], t.user + before
        for items, following in ((history, middle), (candidates, after)):
            for k, item in enumerate(items):
                plan.append((f'{text}{"," if k else ""}"{self.titles[item]}"', int(item)))
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
        tokens: list[int] = [PLACEHOLDER] if self.inject else []
        if self.tokenizer.bos is not None:
            tokens.append(self.tokenizer.bos)
        slots, items = [], []
        for text, item in plan:
            tokens.extend(self._pieces[text])
            if item is not None:
                slots.append(len(tokens))
                items.append(item)
                tokens.append(PLACEHOLDER)
        return Prompt(tokens, slots, items, 0 if self.inject else None)
