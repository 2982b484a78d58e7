"""`allmrec bench --scale`: how the cost of a unit of work grows with what it depends on, beside PyTorch's.

    scale.batch       a training step of SASRec, by sequences a batch
    scale.length      the same, by the length of the window; users have half as many items on average
    scale.catalogue   the same, by items in the table
    scale.candidates  ranking one user's candidates through an LLM, by candidates

Names are `scale.WHAT=VALUE`; rates are units a second, so cost is one over them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from allmrec_jax.comparison.bench import Row, first_run, interleave, row
from allmrec_jax.comparison.sampling import draw_row, owned_items, popular_items, training_arrays
from allmrec_jax.config import CF
from allmrec_jax.data import batches
from allmrec_jax.data.packing import pack
from allmrec_jax.data.prompts import Prompt
from allmrec_jax.evaluation.passes import item_vectors
from allmrec_jax.files import write_atomically
from allmrec_jax.models import params, projection, sasrec
from allmrec_jax.models.llm import llama
from allmrec_jax.models.llm.load import build
from allmrec_jax.training import cf, inject, mesh
from allmrec_jax.training.inject_step import make_scorer
from allmrec_jax.training.state import create

SEED, USERS, ITEMS, BATCH, LENGTH, STEPS = 0, 5000, 6000, 128, 50, 5
SWEEPS: dict[str, tuple[int, ...]] = {
    "batch": (32, 64, 128, 256, 512),
    "length": (25, 50, 100, 200),
    "catalogue": (1_000, 10_000, 100_000),
    "candidates": (5, 10, 20, 40),
}
LLM = llama.LlamaConfig(
    vocab_size=8192,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=4096,
)
"""SmolLM2-135M's layers, four of them."""
TITLE, SENTENCE, HISTORY, JOINT = 12, 40, 5, 128


def bench_scale(repeats: int, console: Console) -> list[Row]:
    """All rows. Raises ImportError without PyTorch."""
    rows = [_training(f"scale.batch={n}", n, LENGTH, ITEMS, repeats, console) for n in SWEEPS["batch"]]
    rows += [_training(f"scale.length={n}", BATCH, n, ITEMS, repeats, console) for n in SWEEPS["length"]]
    rows += [_training(f"scale.catalogue={n}", BATCH, LENGTH, n, repeats, console) for n in SWEEPS["catalogue"]]
    world = _Ranking()
    return rows + [_ranking(world, n, repeats, console) for n in SWEEPS["candidates"]]


def _training(name: str, batch: int, length: int, n_items: int, repeats: int, console: Console) -> Row:
    """Steps a second of SASRec, drawing included, ours and PyTorch's."""
    import torch

    from allmrec_jax.torch_baseline.sasrec import SASRec
    from allmrec_jax.torch_baseline.weights import load

    rng = np.random.default_rng(SEED)
    mean = length / 2 if name.startswith("scale.length") else 6.44
    lengths = 3 + rng.geometric(1 / max(1.5, mean - 3), USERS)
    offsets = np.concatenate([[0, 0], np.cumsum(lengths)])
    items = popular_items(rng, int(offsets[-1]), n_items)
    starts, ends = offsets[1:-1], offsets[2:] - 2
    c, optimiser = sasrec.SASRecConfig(n_items, maxlen=length), optax.adam(1e-3, b1=0.9, b2=0.98)
    tree, data = params.init(jax.random.key(SEED), sasrec.describe(c)), training_arrays(items, starts, ends, n_items)
    devices, lazy = mesh.data_devices(batch), cf.is_lazy(CF(), n_items)
    multiple = cf.tier_multiple(batch, len(devices))
    tiers = batches.length_tiers(ends - starts - 1, length, batch, multiple)
    epoch = cf.make_epoch(c, optimiser, devices, batch=batch, steps=STEPS, tiers=tiers, lazy=lazy)
    state = create(jax.tree.map(jnp.copy, tree), optimiser)

    def ours() -> float:
        nonlocal state
        start = time.perf_counter()
        state, losses = epoch(state, data, jax.random.key(SEED))
        jax.block_until_ready(losses)
        return (time.perf_counter() - start) / STEPS

    owned, model = owned_items(items, starts, ends), load(SASRec(c), sasrec.describe(c), tree)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98))

    def theirs() -> float:
        start = time.perf_counter()
        users = rng.integers(USERS, size=batch)
        sequences = [items[starts[user] : ends[user]].tolist() for user in users]
        drawn = [draw_row(rng, s, owned[user + 1], n_items, length) for s, user in zip(sequences, users, strict=True)]
        adam.zero_grad()
        model.loss(*(torch.from_numpy(part) for part in np.stack(drawn, axis=1))).backward()
        adam.step()
        return time.perf_counter() - start

    compiling = first_run(ours)
    theirs()
    seconds = interleave([("ours", ours), ("theirs", theirs)], repeats, console)
    what = f"SASRec's training step, batch {batch}, window {length}, {n_items:,} items"
    return row(name, "steps/s", 1, seconds["ours"], seconds["theirs"], what=what, compile_seconds=compiling)


class _Ranking:
    """An LLM, heads and titles that both sides share."""

    def __init__(self) -> None:
        from allmrec_jax.torch_baseline.inject import Injector
        from allmrec_jax.torch_baseline.llm import in_transformers
        from allmrec_jax.torch_baseline.weights import load

        self.rng, d = np.random.default_rng(SEED), 50
        weights = jax.device_get(params.init(jax.random.key(SEED), llama.describe(LLM)))
        self.one = mesh.make_mesh(1, 1)
        self.llm = build(LLM, weights, None, mesh=self.one)
        self.x_u = self.rng.normal(size=(1, d)).astype(np.float32)
        self.e = self.rng.uniform(size=(1000, JOINT)).astype(np.float32)
        self.heads = inject.init_heads(
            jax.random.key(1), jnp.asarray(self.x_u), jnp.asarray(self.e), jnp.asarray(weights["embed"])
        )
        self.injector = Injector(in_transformers(LLM, weights), d, JOINT).eval()
        for head, theirs in (("F_U", self.injector.log_proj), ("F_I", self.injector.item_proj)):
            load(theirs, projection.describe(*self.heads[head]["dense1"]["kernel"].shape), self.heads[head])

    def prompt(self, candidates: int) -> tuple[Prompt, list[list[int]]]:
        """A prompt of that many candidates, and the title of each."""

        def words(n: int) -> list[int]:
            return self.rng.integers(5, LLM.vocab_size, n).tolist()

        tokens, slots, titles = [0, *words(SENTENCE)], [], []
        for _ in range(HISTORY + candidates):
            titles.append(words(TITLE))
            tokens += titles[-1]
            slots.append(len(tokens))
            tokens.append(0)
        items = self.rng.integers(1, len(self.e), len(slots)).tolist()
        return Prompt([*tokens, *words(5)], slots, items, 0), [[*title, 2] for title in titles[HISTORY:]]


def _ranking(world: _Ranking, candidates: int, repeats: int, console: Console) -> Row:
    """Users a second whose candidates are ranked by likelihood."""
    import torch

    from allmrec_jax.torch_baseline.ranking import likelihoods

    prompt, answers = world.prompt(candidates)
    frozen, shardings = inject.freeze(world.llm, world.one)
    scorer = make_scorer(world.llm.graph, shardings, world.one, answers=candidates, normalise=True)
    tables = {
        "O_u": projection.F_U(world.heads["F_U"], jnp.asarray(world.x_u)),
        "O_i": jnp.asarray(item_vectors(world.heads["F_I"], world.e, jax.devices()[:1])),
    }
    x_u, e, found = torch.tensor(world.x_u), torch.tensor(world.e), {}

    def timed(name: str, score: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            found[name] = np.asarray(score())
            return time.perf_counter() - start

        return run

    ours = timed("ours", lambda: scorer(tables, frozen, pack([prompt], [answers], rows=np.zeros(1, int))))
    theirs = timed("theirs", lambda: likelihoods(world.injector, [prompt], [answers], x_u, e))
    compiling = first_run(ours)
    theirs()
    np.testing.assert_allclose(found["ours"], found["theirs"], rtol=1e-3, atol=1e-3)
    seconds = interleave([("ours", ours), ("theirs", theirs)], repeats, console)
    what = f"one user's {candidates} candidates, {len(prompt.tokens)} tokens of prompt, 4 layers of SmolLM2-135M's size"
    name = f"scale.candidates={candidates}"
    return row(name, "users/s", 1, seconds["ours"], seconds["theirs"], what=what, compile_seconds=compiling)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Seconds a unit of work by what it depends on, a panel each, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    swept: dict[str, list[tuple[int, Row]]] = {}
    for entry in rows:
        what, _, value = entry.name.removeprefix("scale.").partition("=")
        swept.setdefault(what, []).append((int(value), entry))
    figure, axes = pyplot.subplots(1, len(swept), figsize=(3.6 * len(swept), 3.2), squeeze=False)
    for axis, (what, points) in zip(axes[0], swept.items(), strict=True):
        values = [value for value, _ in points]
        axis.plot(values, [1 / entry.baseline for _, entry in points], "s--", label="PyTorch")
        axis.plot(values, [1 / entry.ours for _, entry in points], "o-", label="JAX")
        axis.set(xscale="log", yscale="log", xlabel=what, ylabel=f"seconds a {points[0][1].unit.split('/')[0][:-1]}")
        axis.legend()
    figure.tight_layout()
    with write_atomically(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
