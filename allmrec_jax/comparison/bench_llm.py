"""Stage 2 against PyTorch: one step of the heads through the frozen LLM, the same prompts, weights and losses.

The LLM has SmolLM2-135M's sizes and random weights, the prompts the lengths of the paper's Beauty: 20 candidates, up to
10 history items, titles of 18 tokens on average.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from allmrec_jax.comparison.bench import Row, interleave, peak_memory, reset_peak_memory, row
from allmrec_jax.config import Injection
from allmrec_jax.data import packing
from allmrec_jax.data.prompts import Prompt
from allmrec_jax.models import params, projection
from allmrec_jax.models.llm import llama
from allmrec_jax.models.llm.load import build
from allmrec_jax.training import inject, mesh
from allmrec_jax.training.inject_step import make_step
from allmrec_jax.training.state import create

SEED = 0
SMOLLM2 = llama.LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rope_theta=100000.0,
    max_position_embeddings=8192,
)
D, JOINT, ITEMS = 50, 128, 6141
SENTENCE, TITLE, SPREAD, HISTORY = 40, 17.7, 8.7, 2.9  # tokens, and items; measured on Beauty with SmolLM2's tokenizer
CONFIG = Injection()
STEPS = 4  # in the first the losses of both are compared; each shape of prompts is compiled before


class _World:
    """What both sides share: weights, tables and prompts."""

    def __init__(self) -> None:
        rng = np.random.default_rng(SEED)
        shape = (TITLE / SPREAD) ** 2
        self.titles = [
            rng.integers(5, SMOLLM2.vocab_size, max(3, n)).tolist()
            for n in rng.gamma(shape, TITLE / shape, ITEMS + 1).astype(int)
        ]
        self.sentence = rng.integers(5, SMOLLM2.vocab_size, SENTENCE).tolist()
        self.weights = params.init(jax.random.key(SEED), llama.describe(SMOLLM2))
        self.x_u = rng.normal(size=(STEPS * CONFIG.batch, D)).astype(np.float32)
        self.e = rng.uniform(size=(ITEMS + 1, JOINT)).astype(np.float32)
        self.heads = inject.init_heads(
            jax.random.key(1), jnp.asarray(self.x_u), jnp.asarray(self.e[1:]), self.weights["embed"]
        )
        drawn = [self._prompt(rng) for _ in range(STEPS * CONFIG.batch)]
        self.prompts, self.answers = [prompt for prompt, _ in drawn], [answer for _, answer in drawn]
        self.lengths = np.array([packing.row_length(p, [a]) for p, a in drawn])

    def _prompt(self, rng: np.random.Generator) -> tuple[Prompt, list[int]]:
        tokens, slots, items = [0, *self.sentence[:20]], [], []
        history = min(CONFIG.history, rng.geometric(1 / HISTORY))
        for item in rng.integers(1, ITEMS + 1, history + CONFIG.candidates).tolist():
            tokens += self.titles[item]
            slots, items = [*slots, len(tokens)], [*items, item]
            tokens.append(0)
        return Prompt([*tokens, *self.sentence[20:]], slots, items, 0), [*self.titles[items[-1]], 2]

    def step(self, i: int) -> tuple[list[Prompt], list[list[int]], range]:
        here = range(i * CONFIG.batch, (i + 1) * CONFIG.batch)
        return [self.prompts[k] for k in here], [self.answers[k] for k in here], here


class _Ours:
    def __init__(self, world: _World):
        self.world, self.optimiser = world, inject.make_optimiser(CONFIG, STEPS)
        devices = mesh.make_mesh(1, 1)
        llm = build(SMOLLM2, world.weights, None, mesh=devices)
        self.frozen, shardings = inject.freeze(llm, devices, x_u=world.x_u, e=world.e)
        self.step = make_step(llm.graph, shardings, devices, self.optimiser, CONFIG)
        answers = [[answer] for answer in world.answers]
        rows = inject.rows_of_a_pass(CONFIG, 1)
        self.tiers = packing.Tiers(rows, world.lengths, packing.room_for(world.prompts, answers))

    def __call__(self) -> tuple[float, list[float]]:
        """(seconds, losses) of all steps, from the start."""
        state = create(jax.tree.map(jnp.copy, self.world.heads), self.optimiser)
        losses, start = [], time.perf_counter()
        for i in range(STEPS):
            prompts, answers, rows = self.world.step(i)
            parts = self.tiers.parts(prompts, [[answer] for answer in answers], rows=rows)
            state, terms = self.step(state, self.frozen, parts)
            losses.append(terms["loss"])
        jax.block_until_ready(state)
        return time.perf_counter() - start, [float(loss) for loss in losses]


class _Theirs:
    def __init__(self, world: _World):
        import torch

        from allmrec_jax.torch_baseline.inject import Injector
        from allmrec_jax.torch_baseline.llm import in_transformers

        self.world = world
        self.injector = Injector(in_transformers(SMOLLM2, world.weights), D, JOINT)
        self.x_u, self.e = torch.tensor(world.x_u), torch.tensor(world.e)

    def __call__(self) -> tuple[float, list[float]]:
        import torch

        from allmrec_jax.torch_baseline.weights import load

        h = SMOLLM2.hidden_size
        load(self.injector.log_proj, projection.describe(D, h), self.world.heads["F_U"])
        load(self.injector.item_proj, projection.describe(JOINT, h), self.world.heads["F_I"])
        trained = [p for p in self.injector.parameters() if p.requires_grad]
        adam = torch.optim.Adam(trained, lr=CONFIG.learning_rate, betas=(0.9, 0.98))
        losses, start = [], time.perf_counter()
        for i in range(STEPS):
            prompts, answers, rows = self.world.step(i)
            adam.zero_grad()
            loss = self.injector(prompts, answers, self.x_u[list(rows)], self.e)
            loss.backward()
            adam.step()
            losses.append(loss.item())
        return time.perf_counter() - start, losses


def _alone(kind: str) -> float:
    """MiB that one side takes at most, in a process of its own."""
    code = f"from allmrec_jax.comparison.bench_llm import _child; _child({kind!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) / 2**20


def _child(kind: str) -> None:
    world = _World()
    side = {"ours": _Ours, "theirs": _Theirs}[kind](world)
    world.weights = None  # each side has its own by now
    reset_peak_memory()
    side()
    print(json.dumps(peak_memory()))


def bench_llm(repeats: int, console: Console) -> list[Row]:
    """The row `llm.train`. Raises ImportError without PyTorch, AssertionError if the losses differ."""
    import torch  # noqa: F401

    memory = {"our peak memory (MiB)": _alone("ours"), "PyTorch's": _alone("theirs")}
    world = _World()
    ours, theirs = _Ours(world), _Theirs(world)
    start = time.perf_counter()
    _, losses = ours()
    first = time.perf_counter() - start
    found: dict[str, Any] = {"losses": theirs()[1]}
    np.testing.assert_allclose(losses, found["losses"], rtol=1e-3)
    seconds = interleave([("ours", lambda: ours()[0]), ("theirs", lambda: theirs()[0])], repeats, console)
    padding = 1 - ours.tiers.real / ours.tiers.computed
    beside = memory | {
        "our padding": f"{padding:.1%}",
        "tokens a prompt": float(world.lengths.mean()),
    }
    return [
        row(
            "llm.train",
            "users/s",
            STEPS * CONFIG.batch,
            seconds["ours"],
            seconds["theirs"],
            what=f"{STEPS} steps of {CONFIG.batch} users through an LLM of SmolLM2-135M's sizes, float32, "
            f"{CONFIG.candidates} candidates in the prompt; against PyTorch with transformers (SDPA, logits at every "
            "position, one padded batch a step)",
            beside=beside,
            compile_seconds=first,
        )
    ]
