"""Ranking and generating in PyTorch; side by side with `evaluation.rank` and `evaluation.generate`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from allmrec_jax.data.prompts import Prompt
from allmrec_jax.torch_baseline.inject import Injector

PENALTY = 1.5  # of the public code's decoding


def likelihoods(
    injector: Injector,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Sequence[int]]],
    x_u: Float[Tensor, "users d"],
    e: Float[Tensor, "items joint"],
    *,
    mean: bool = True,
) -> Float[Tensor, "users answers"]:
    """Of each user's answers, every (prompt, answer) a row of its own; divided by the answer's tokens if `mean`."""
    found = []
    with torch.no_grad():
        for prompt, own, x in zip(prompts, answers, x_u, strict=True):
            n = len(own)
            totals = injector.log_likelihoods([prompt] * n, own, x.expand(n, -1), e)
            found.append(totals / torch.tensor([len(answer) for answer in own]) if mean else totals)
    return torch.stack(found)


def embedded(injector: Injector, prompt: Prompt, x_u: Float[Tensor, " d"], e: Tensor) -> Float[Tensor, "time h"]:
    """The prompt as the LLM reads it, O_u and O_i in their places."""
    F_U, F_I = injector.heads()
    x = injector.llm.get_input_embeddings()(torch.tensor(prompt.tokens)).clone()
    if prompt.slots:
        x[prompt.slots] = F_I(e[prompt.slot_items])
    if prompt.user_slot is not None:
        x[prompt.user_slot] = F_U(x_u[None])[0]
    return x


class Penalty(nn.Module):
    """The repetition penalty over the tokens generated so far and, from the first step on, the end token: a negative
    logit is multiplied by it, another one divided."""

    def __init__(self, end: int, penalty: float = PENALTY):
        super().__init__()
        self.end, self.penalty = end, penalty

    def forward(self, generated: Tensor, logits: Tensor) -> Tensor:
        ids = torch.cat([generated, generated.new_full((len(generated), 1), self.end)], dim=1)
        chosen = logits.gather(1, ids)
        return logits.scatter(1, ids, torch.where(chosen < 0, chosen * self.penalty, chosen / self.penalty))


def generate(
    injector: Injector,
    prompts: Sequence[Prompt],
    x_u: Float[Tensor, "users d"],
    e: Tensor,
    *,
    end: int,
    penalty: float = PENALTY,
    most: int = 511,
) -> list[list[int]]:
    """The tokens that follow each prompt, chosen greedily, up to the end token, which is left out."""
    from transformers import LogitsProcessorList

    with torch.no_grad():
        rows = [embedded(injector, prompt, x, e) for prompt, x in zip(prompts, x_u, strict=True)]
        longest = max(map(len, rows))
        x = torch.stack([nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        found = injector.llm.generate(
            inputs_embeds=x,
            attention_mask=mask,
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
            logits_processor=LogitsProcessorList([Penalty(end, penalty)]),
        )
    return [row[: row.index(end)] if end in row else row for row in found.tolist()]


def answer_of(text: str) -> str:
    """What the public code takes for the answer: of the first line, lower-cased, what stands between its first and its
    last quote mark; nothing if there is one mark, the whole line if there is none."""
    line = text.split("\n")[0].lower()
    first, last = line.find('"'), line.rfind('"')
    return line if first < 0 else line[first + 1 : last] if last > first else ""


def hit(answer: str, title: str) -> bool:
    """Whether the public code counts the answer: the lower-cased title is contained in it."""
    return title.lower() in answer
