"""Stage 2 in PyTorch: embeddings injected into a frozen transformers causal LM; side by side with `training.inject`.

Every (prompt, answer) is a row of its own, as a user of transformers writes it: `inputs_embeds`, an attention mask, and
labels of -100 wherever a token is not part of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from allmrec_jax.data.prompts import Prompt
from allmrec_jax.torch_baseline import projection

IGNORED = -100  # the label of tokens that are not predicted


class Injector(nn.Module):
    """F_U (`log_proj`) and F_I (`item_proj`), trained through the frozen `llm`.

    Args:
      llm: a transformers `...ForCausalLM`; its parameters are frozen here.
      d: width of x_u.
      joint: width of e.
      logit_rows: the vocabulary's first entries among which a token is predicted; None is all.

    Attributes:
      held: x_u and e of some users and items; where they are given, O_u and O_i keep the mean and the spread of the
        token embeddings over them (`llm.init held`).
    """

    def __init__(self, llm: nn.Module, d: int, joint: int, *, logit_rows: int | None = None):
        super().__init__()
        self.logit_rows = logit_rows
        self.held: tuple[Tensor, Tensor] | None = None
        self.llm = llm.requires_grad_(False).eval()
        h = llm.get_input_embeddings().embedding_dim
        self.log_proj, self.item_proj = projection.F_U(d, h), projection.F_I(joint, h)

    def train(self, mode: bool = True) -> Injector:
        """As in PyTorch, but the frozen LLM stays in evaluation mode."""
        super().train(mode)
        self.llm.eval()
        return self

    def heads(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """F_U and F_I as the prompt sees them."""
        if self.held is None:
            return self.log_proj, self.item_proj
        tokens = self.llm.get_input_embeddings().weight.float()
        return tuple(
            projection.settled(head, inputs, tokens)
            for head, inputs in zip((self.log_proj, self.item_proj), self.held, strict=True)
        )

    def logits(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[int]],
        x_u: Float[Tensor, "batch d"],
        e: Float[Tensor, "items joint"],
        *,
        answers_only: bool = False,
    ) -> tuple[Float[Tensor, "batch time vocab"], Tensor]:
        """Logits at every position of prompt + answer, and the label that each of them predicts (-100: none).

        Args:
          answers_only: leave out the positions before the first that predicts an answer in any row.
        """
        rows, labels = self._embedded(prompts, answers, x_u, e), []
        for prompt, answer in zip(prompts, answers, strict=True):
            target = torch.tensor([*prompt.tokens, *answer])
            target[: len(prompt.tokens)] = IGNORED
            labels.append(F.pad(target[1:], (0, 1), value=IGNORED))
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(x), dtype=torch.long) for x in rows], batch_first=True)
        x = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        keep = x.shape[1] - min(len(prompt.tokens) for prompt in prompts) + 1 if answers_only else x.shape[1]
        logits = self.llm(inputs_embeds=x, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
        return logits[..., : self.logit_rows], labels[:, -keep:]

    def _embedded(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[int]],
        x_u: Float[Tensor, "batch d"],
        e: Float[Tensor, "items joint"],
    ) -> list[Tensor]:
        """Embeddings of each prompt + answer, O_u and O_i injected."""
        embed, rows = self.llm.get_input_embeddings(), []
        F_U, F_I = self.heads()
        for prompt, answer, O_u in zip(prompts, answers, F_U(x_u), strict=True):
            x = embed(torch.tensor([*prompt.tokens, *answer])).clone()
            if prompt.slots:
                x[prompt.slots] = F_I(e[prompt.slot_items])
            if prompt.user_slot is not None:
                x[prompt.user_slot] = O_u
            rows.append(x)
        return rows

    def generate(
        self,
        prompts: Sequence[Prompt],
        x_u: Float[Tensor, "batch d"],
        e: Float[Tensor, "items joint"],
        *,
        new: int,
        **options: Any,
    ) -> Int[Tensor, "batch new"]:
        """At most `new` tokens of each answer, by transformers' `generate` (greedy, if `options` say nothing else)."""
        rows = self._embedded(prompts, [[]] * len(prompts), x_u, e)
        mask = [torch.ones(len(x), dtype=torch.long) for x in rows]
        x, mask = (nn.utils.rnn.pad_sequence(y, batch_first=True, padding_side="left") for y in (rows, mask))
        return self.llm.generate(
            inputs_embeds=x, attention_mask=mask, max_new_tokens=new, **{"do_sample": False} | options
        )

    def forward(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[int]],
        x_u: Float[Tensor, "batch d"],
        e: Float[Tensor, "items joint"],
    ) -> Float[Tensor, ""]:
        """Cross-entropy of the answers' tokens, mean over all of them together."""
        logits, labels = self.logits(prompts, answers, x_u, e)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    def log_likelihoods(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[int]],
        x_u: Float[Tensor, "batch d"],
        e: Float[Tensor, "items joint"],
        *,
        answers_only: bool = False,
    ) -> Float[Tensor, " batch"]:
        """Sum over each answer's tokens of their log-likelihood."""
        logits, labels = self.logits(prompts, answers, x_u, e, answers_only=answers_only)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return -losses.reshape(labels.shape).sum(1)

    def choice_loss(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Sequence[Sequence[int]]],
        targets: Int[Tensor, " users"],
        x_u: Float[Tensor, "users d"],
        e: Float[Tensor, "items joint"],
        *,
        sharpness: float,
    ) -> Float[Tensor, ""]:
        """Cross-entropy of each user's target in a softmax over `sharpness` times the mean log-likelihoods.

        `candidates` holds the answer of each candidate of each user; the prompt is read anew for each.
        """
        count = len(candidates[0])
        answers = [answer for own in candidates for answer in own]
        repeated = [prompt for prompt in prompts for _ in range(count)]
        totals = self.log_likelihoods(repeated, answers, x_u.repeat_interleave(count, dim=0), e)
        means = totals / torch.tensor([len(answer) for answer in answers])
        return F.cross_entropy(sharpness * means.reshape(-1, count), targets)
