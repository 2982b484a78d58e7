"""Prompts and answers as token arrays of few static shapes.

One row holds one prompt and any number of *answers*, each a branch that continues the prompt (see
`models.llm.attention.branch_mask`). Training on titles has one answer, ranking has one for each candidate:

    tokens   O_u  is a user ... "T1" O_i ,"T2" O_i ... set, "C1" O_i ... is _ | " T 1 " | " C 2 "
    branch    0   0  0  0   0    0    0    0    0         0    0       0   0 | 1 1 1 1 | 2 2 2 2
    slots     ^ user_slot        ^ slots   ^ slots             ^ slots

(`prompts.Template` says where O_u and O_i stand; here as in the paper). The last prompt token predicts the first token
of every answer; a branch's last token predicts the end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from allmrec_jax.data.prompts import Items, Prompt
from allmrec_jax.data.text_groups import text_widths

MOST_TIERS = 4  # lengths of rows that are compiled; a row longer than all of them rounds up to a multiple of TIER
TIER = 32


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class Room(NamedTuple):
    """What a row has room for: tokens, tokens of answers, slots."""

    time: int
    answers: int
    slots: int


Answers = Sequence[Sequence[Sequence[int]]]


def row_length(prompt: Prompt, answers: Sequence[Sequence[int]]) -> int:
    """Tokens of a row: the prompt's, and all but the last of each answer."""
    return len(prompt.tokens) + sum(len(answer) - 1 for answer in answers)


def room_for(prompts: Sequence[Prompt], answers: Answers, tier: int = TIER) -> Room:
    """What these rows need, rounded up."""
    return Room(
        _round_up(max(map(row_length, prompts, answers)), tier),
        _round_up(max(sum(map(len, many)) for many in answers), 64),
        _round_up(max(1, *(len(p.slots) for p in prompts)), 8),
    )


def pack(
    prompts: Sequence[Prompt],
    answers: Answers,
    *,
    rows: Items,
    targets: Items | None = None,
    batch: int | None = None,
    tier: int = TIER,
    least: Room | None = None,
    whole: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """Token arrays of a batch, one prompt with all its answers a row.

    Shapes are rounded up (time to `tier`, answers to 64, slots to 8, rows to `batch`), so that few programs are
    compiled.

    Args:
      least: the room there is at least, whatever is needed.
      whole: (target tokens, users) of the optimiser step that this is a part of; None if it is all of it.

    Returns:
      tokens, branch (batch, time); slots, slot_items (batch, slot), a slot of `time` is dropped; user_slot (batch,);
      rows (batch,), the row of x_u; target (batch,), the number of the answer that is the target; answer_at,
      answer_token, answer_of (batch, answer): position that predicts, token predicted, and number of the answer it
      belongs to; answer_weight (batch, answer), 0 for padding; token_share and row_share (batch,): one over the target
      tokens and over the users of the whole step, 0 for rows that only fill up.
    """
    size = batch or len(prompts)
    room = room_for(prompts, answers, tier)
    if least is not None:
        room = Room(*map(max, zip(room, least, strict=True)))
    time, n_answers, n_slots = room
    own = [len(many[0 if targets is None else targets[b]]) for b, many in enumerate(answers)]
    target_tokens, users = whole or (sum(own), len(prompts))
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
        "token_share": np.zeros((size,), np.float32),
        "row_share": np.zeros((size,), np.float32),
    }
    out["token_share"][: len(prompts)], out["row_share"][: len(prompts)] = 1 / target_tokens, 1 / users
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


class Tiers:
    """Cuts a batch into parts of `rows` prompts of like lengths, each padded to one of few lengths.

    The lengths are those with the least padding over `lengths`, rows as `room` has seen them. Counts the real and the
    computed tokens of all that it has packed.

    Args:
      most: lengths that are compiled.
      answers: tokens of each of these rows' answers, where they differ much: a length has room for what its own rows
        and the shorter ones have.
    """

    def __init__(
        self,
        rows: int,
        lengths: Integer[np.ndarray, " rows"],
        room: Room,
        *,
        most: int = MOST_TIERS,
        answers: Integer[np.ndarray, " rows"] | None = None,
    ):
        self.rows, self.room, self.widths = rows, room, text_widths(lengths, most=most)
        self.rooms = {width: room._replace(time=width) for width in self.widths}
        if answers is not None:
            for width in self.widths:
                most_tokens = _round_up(int(answers[lengths <= width].max(initial=0)), 64)
                self.rooms[width] = Room(width, most_tokens, room.slots)
        self.real = self.computed = 0

    def parts(
        self, prompts: Sequence[Prompt], answers: Answers, *, rows: Items, targets: Items | None = None
    ) -> list[dict[str, np.ndarray]]:
        """The batch as `pack` gives it, in parts; their shares are of the batch."""
        lengths = np.array(list(map(row_length, prompts, answers)))
        targets = [0] * len(prompts) if targets is None else list(targets)
        whole = sum(len(many[target]) for many, target in zip(answers, targets, strict=True)), len(prompts)
        order, parts = np.argsort(lengths, kind="stable"), []
        for start in range(0, len(order), self.rows):
            chosen = order[start : start + self.rows]
            longest = int(lengths[chosen].max())
            time = next((width for width in self.widths if width >= longest), 0)
            part = pack(
                [prompts[i] for i in chosen],
                [answers[i] for i in chosen],
                rows=np.asarray(rows)[chosen],
                targets=np.asarray(targets)[chosen],
                batch=self.rows,
                tier=1 if time else TIER,
                least=self.rooms.get(time, self.room._replace(time=0)),
                whole=whole,
            )
            self.real, self.computed = self.real + int(lengths[chosen].sum()), self.computed + part["tokens"].size
            parts.append(part)
        return parts
