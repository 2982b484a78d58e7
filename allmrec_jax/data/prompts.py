"""Prompts: text with injection slots, cut into token arrays (SPEC of the paper's stage 2, templates as data).

One row holds one prompt and any number of *answers*, each a branch that continues the prompt (see
`models.llm.attention.branch_mask`). Training has one answer, ranking has one for each candidate:

    tokens   O_u  is a user ... "T1" O_i ,"T2" O_i ... set, "C1" O_i ... is _ | " T 1 " | " C 2 "
    branch    0   0  0  0   0    0    0    0    0         0    0       0   0 | 1 1 1 1 | 2 2 2 2
    slots     ^ user_slot        ^ slots   ^ slots             ^ slots

The last prompt token predicts the first token of every answer; a branch's last token predicts the end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from allmrec_jax.errors import UserError

Items = Sequence[int] | Integer[np.ndarray, "_"]
PLACEHOLDER = 0  # token id that stands in a slot; its embedding is replaced


@dataclass(frozen=True)
class Template:
    """The sentence, with the words of one domain. `{history}` and `{candidates}` are lists of quoted titles."""

    done: str = "bought"
    noun: str = "item"
    do: str = "buy"
    user: str = " is a user representation. "
    text: str = (
        "This user has {done} {history} in the previous. Recommend one next {noun} for this user to {do} next "
        "from the following {noun} title set, {candidates}. The recommendation is "
    )


DOMAINS = {
    "movies": Template("watched", "movie", "watch"),
    "games": Template("played", "game", "play"),
    "shopping": Template("bought", "item", "buy"),
}


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
      titles: title of each item id; index 0 is unused; None becomes `No Title`.
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
            text += following
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


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def pack(
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    rows: Items,
    targets: Items | None = None,
    batch: int | None = None,
    tier: int = 32,
) -> dict[str, np.ndarray]:
    """Token arrays of a batch, one prompt with all its answers a row.

    Shapes are rounded up (time to `tier`, answers to 64, slots to 8, rows to `batch`), so that few programs are
    compiled.

    Returns:
      tokens, branch (batch, time); slots, slot_items (batch, slot), a slot of `time` is dropped; user_slot (batch,);
      rows (batch,), the row of x_u; target (batch,), the number of the answer that is the target; answer_at,
      answer_token, answer_of (batch, answer): position that predicts, token predicted, and number of the answer it
      belongs to; answer_weight (batch, answer), 0 for padding.
    """
    size = batch or len(prompts)
    length = [len(p.tokens) + sum(len(a) - 1 for a in many) for p, many in zip(prompts, answers, strict=True)]
    count = [sum(len(a) for a in many) for many in answers]
    time = _round_up(max(length), tier)
    n_answers = _round_up(max(count), 64)
    n_slots = _round_up(max(1, *(len(p.slots) for p in prompts)), 8)
    out = {
        "tokens": np.zeros((size, time), np.int32),
        "branch": np.full((size, time), -1, np.int32),
        "slots": np.full((size, n_slots), time, np.int32),
        "slot_items": np.zeros((size, n_slots), np.int32),
        "user_slot": np.full((size,), time, np.int32),
        "rows": np.zeros((size,), np.int32),
        "target": np.zeros((size,), np.int32),
        "answer_at": np.zeros((size, n_answers), np.int32),
        "answer_token": np.zeros((size, n_answers), np.int32),
        "answer_of": np.zeros((size, n_answers), np.int32),
        "answer_weight": np.zeros((size, n_answers), np.float32),
    }
    for b, (prompt, many) in enumerate(zip(prompts, answers, strict=True)):
        n = len(prompt.tokens)
        out["tokens"][b, :n], out["branch"][b, :n] = prompt.tokens, 0
        out["slots"][b, : len(prompt.slots)] = prompt.slots
        out["slot_items"][b, : len(prompt.slots)] = prompt.slot_items
        out["rows"][b] = rows[b]
        out["target"][b] = 0 if targets is None else targets[b]
        if prompt.user_slot is not None:
            out["user_slot"][b] = prompt.user_slot
        at, filled = n, 0
        for k, answer in enumerate(many):
            inputs, here = len(answer) - 1, slice(filled, filled + len(answer))
            out["tokens"][b, at : at + inputs], out["branch"][b, at : at + inputs] = answer[:-1], k + 1
            out["answer_at"][b, here] = [n - 1, *range(at, at + inputs)]
            out["answer_token"][b, here] = answer
            out["answer_of"][b, here] = k
            out["answer_weight"][b, here] = 1
            at, filled = at + inputs, here.stop
    return out
