"""Ranking against PyTorch: a user's candidates in one pass, against 20 sequences in a batch and against `generate`.

The LLM, the lengths of prompts and the weights are those of `bench_llm`; the words are made up.
"""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from allmrec_jax.comparison import bench_llm
from allmrec_jax.comparison.bench import Row, interleave, row
from allmrec_jax.comparison.bench_llm import HISTORY, ITEMS, JOINT, SEED, SPREAD, TITLE, D
from allmrec_jax.config import Injection
from allmrec_jax.data.prompts import PromptBuilder, template_of
from allmrec_jax.evaluation.rank import Ranker
from allmrec_jax.models import params, projection
from allmrec_jax.models.llm import llama
from allmrec_jax.models.llm.load import build
from allmrec_jax.training import inject, mesh

CONFIG = Injection()
USERS = 4  # the public code's batch at inference
NEW = 64  # tokens that the baseline generates
EOS = 2


class _Words:
    """A tokenizer of made-up words: one id for each word and each quote mark, with the comma before it."""

    bos, eos = None, EOS

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        size = bench_llm.SMOLLM2.vocab_size - 5
        return [[5 + zlib.crc32(word.encode()) % size for word in re.findall(r'\w+|,?"|[^\w\s]', t)] for t in texts]


class _World:
    """What both sides share: weights, tables, users with their candidates."""

    def __init__(self) -> None:
        rng, shape, c = np.random.default_rng(SEED), (TITLE / SPREAD) ** 2, bench_llm.SMOLLM2
        words = [max(1, n - 2) for n in rng.gamma(shape, TITLE / shape, ITEMS + 1).astype(int)]
        titles = [" ".join(f"word{w}" for w in rng.integers(0, 10**6, n)) for n in words]
        self.weights = params.init(jax.random.key(SEED), llama.describe(c))
        self.x_u = rng.normal(size=(USERS, D)).astype(np.float32)
        self.e = rng.uniform(size=(ITEMS + 1, JOINT)).astype(np.float32)
        drawn = [rng.choice(ITEMS, 10 + CONFIG.candidates, replace=False) + 1 for _ in range(USERS)]
        self.histories = [items[: min(CONFIG.history, rng.geometric(1 / HISTORY))] for items in drawn]
        self.candidates = np.stack([items[10:] for items in drawn])
        self.builder = PromptBuilder(_Words(), titles, template_of(CONFIG), context=c.max_position_embeddings)
        self.heads = inject.init_heads(
            jax.random.key(1), jnp.asarray(self.x_u), jnp.asarray(self.e[1:]), self.weights["embed"]
        )


def _ours(world: _World) -> Ranker:
    devices = mesh.make_mesh(1, 1)
    llm = build(bench_llm.SMOLLM2, world.weights, None, mesh=devices)
    options = {"builder": world.builder, "e": world.e, "mesh": devices, "candidates": CONFIG.candidates}
    ranker = Ranker(llm, world.heads, **options)
    ranker.arrange(world.histories, world.candidates)
    return ranker


class _Theirs:
    def __init__(self, world: _World):
        import torch

        from allmrec_jax.torch_baseline.inject import Injector
        from allmrec_jax.torch_baseline.llm import in_transformers
        from allmrec_jax.torch_baseline.weights import load

        c = bench_llm.SMOLLM2
        self.world, self.x_u, self.e = world, torch.tensor(world.x_u), torch.tensor(world.e)
        self.injector = Injector(in_transformers(c, world.weights), D, JOINT)
        load(self.injector.log_proj, projection.describe(D, c.hidden_size), world.heads["F_U"])
        load(self.injector.item_proj, projection.describe(JOINT, c.hidden_size), world.heads["F_I"])

    def score(self) -> tuple[float, np.ndarray]:
        """(seconds, scores): a user's candidates as sequences of one batch, one user after the other."""
        import torch

        start, scores, world = time.perf_counter(), [], self.world
        with torch.inference_mode():
            for prompt, items, x_u in zip(self._prompts(), world.candidates, self.x_u, strict=True):
                answers = world.builder.answers(items.tolist())
                rows = [prompt] * len(answers), answers, x_u.expand(len(answers), -1)
                totals = self.injector.log_likelihoods(*rows, self.e, answers_only=True)
                scores.append(totals.numpy() / [len(answer) for answer in answers])
        return time.perf_counter() - start, np.stack(scores)

    def generate(self) -> float:
        """Seconds of `NEW` greedy tokens for all users in a batch."""
        import torch

        start = time.perf_counter()
        with torch.inference_mode():
            self.injector.generate(self._prompts(), self.x_u, self.e, new=NEW)
        return time.perf_counter() - start

    def _prompts(self) -> list:
        return self.world.builder.prompts(self.world.histories, self.world.candidates)


def bench_rank(repeats: int, console: Console) -> list[Row]:
    """`rank.score20` and `rank.generate`. Raises ImportError without PyTorch, AssertionError if scores differ."""
    world = _World()
    ours, theirs = _ours(world), _Theirs(world)

    def seconds() -> float:
        start = time.perf_counter()
        ours(world.histories, world.candidates, world.x_u)
        return time.perf_counter() - start

    first = seconds()
    scores = ours(world.histories, world.candidates, world.x_u)
    np.testing.assert_allclose(scores, theirs.score()[1], rtol=1e-3)
    runs = [("ours", seconds), ("score", lambda: theirs.score()[0]), ("generate", theirs.generate)]
    found = interleave(runs, repeats, console)
    prompts = world.builder.prompts(world.histories, world.candidates)
    answers = ours.answers(world.candidates)
    beside = {
        "our first run with compilation (s)": first,
        "our padding": f"{ours.padding:.1%}",
        "tokens a prompt": float(np.mean([len(p.tokens) for p in prompts])),
        "of a user's answers": float(np.mean([sum(map(len, many)) for many in answers])),
    }
    lead = f"{CONFIG.candidates} candidates of {USERS} users ranked by an LLM of SmolLM2-135M's sizes, float32"
    sequences = "the candidates as sequences of one batch a user (SDPA, logits of the answers alone)"
    against = {
        "rank.score20": ("score", f"PyTorch with transformers, {sequences}"),
        "rank.generate": ("generate", f"PyTorch's greedy `generate` of {NEW} new tokens, all users in a batch"),
    }
    return [
        row(name, "users/s", USERS, found["ours"], found[side], what=f"{lead}; against {words}", beside=beside)
        for name, (side, words) in against.items()
    ]
