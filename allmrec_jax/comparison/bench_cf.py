"""Benchmarks of stage 0: SASRec as the paper sizes it, on generated users as many and as short as the paper's Beauty.

    cf.train       sequences a second of whole training steps (drawing, forward, backward, Adam)
    cf.evaluate    users a second: x_u from the history and the scores of 20 candidates
    cf.users10, cf.users100     sequences a second at 10 and 100 times the users
    cf.items10, cf.items100     sequences a second at 100,000 and 1,000,000 items, against 10,000

The baseline of the last four is this program itself at the smaller size; that of the first two is SASRec in PyTorch as
its public code runs it: windows of 50 padded, one row after the other drawn in Python, a step at a time; evaluation
user by user. Same weights, same losses.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

from allmrec_jax.comparison.bench import Row, first_run, interleave, row
from allmrec_jax.comparison.sampling import draw_row, owned_items, popular_items, training_arrays
from allmrec_jax.config import CF
from allmrec_jax.data import batches
from allmrec_jax.models import params, sasrec
from allmrec_jax.training import cf, mesh
from allmrec_jax.training.state import create

SEED = 0
USERS, ITEMS, MEAN_LENGTH = 9930, 6141, 6.44  # the paper's Beauty (Kim et al. 2024, table 2)
BATCH, CANDIDATES = 128, 20
TIMES, SOME_ITEMS, STEPS = (10, 100), 10_000, 50


def _sequences(users: int, n_items: int) -> tuple[np.ndarray, np.ndarray]:
    """(flat items, offsets): lengths of at least 4, geometric beyond; items by a power law."""
    rng = np.random.default_rng(SEED)
    lengths = 3 + rng.geometric(1 / (MEAN_LENGTH - 3), users)
    offsets = np.concatenate([[0, 0], np.cumsum(lengths)])
    return popular_items(rng, int(offsets[-1]), n_items), offsets


def bench_cf(repeats: int, console: Console) -> list[Row]:
    """All rows. Raises ImportError without PyTorch."""
    from allmrec_jax.torch_baseline.sasrec import SASRec
    from allmrec_jax.torch_baseline.weights import load

    items, offsets = _sequences(USERS, ITEMS)
    ends = offsets[2:] - 2  # leave-one-out
    data, owned = training_arrays(items, offsets[1:-1], ends, ITEMS), owned_items(items, offsets[1:-1], ends)
    c = sasrec.SASRecConfig(ITEMS)
    tree = params.init(jax.random.key(SEED), sasrec.describe(c))
    baseline = load(SASRec(c), sasrec.describe(c), tree)
    train = _train(c, tree, data, ends - offsets[1:-1], baseline, items, offsets, ends, owned, repeats, console)
    evaluate = _evaluate(c, tree, baseline, items, offsets, ends, repeats, console)
    return [
        train,
        evaluate,
        *(_scale(f"cf.users{k}", (USERS, ITEMS), (USERS * k, ITEMS), repeats, console) for k in TIMES),
        *(_scale(f"cf.items{k}", (USERS, SOME_ITEMS), (USERS, SOME_ITEMS * k), repeats, console) for k in TIMES),
    ]


def _scale(name: str, small: tuple[int, int], large: tuple[int, int], repeats: int, console: Console) -> Row:
    """Sequences a second of training steps at the two (users, items); a ratio of 1 is no dearer a sequence."""
    runs, memory = [], {}
    for users, n_items in (small, large):
        items, offsets = _sequences(users, n_items)
        lengths = np.diff(offsets)[1:] - 3
        data = training_arrays(items, offsets[1:-1], offsets[2:] - 2, n_items)
        c, optimiser = sasrec.SASRecConfig(n_items), optax.adam(1e-3, b1=0.9, b2=0.98)
        tiers = batches.length_tiers(lengths, c.maxlen, BATCH, cf.tier_multiple(BATCH, 1))
        lazy = cf.is_lazy(CF(), n_items)
        epoch = cf.make_epoch(c, optimiser, jax.devices()[:1], batch=BATCH, steps=STEPS, tiers=tiers, lazy=lazy)
        runs.append(_Steps(epoch, cf.initial_state(jax.random.key(SEED), c, optimiser), data, STEPS))
        held = sum(leaf.nbytes for leaf in jax.tree.leaves((data, runs[-1].state)))
        memory[f"MiB of data, weights and Adam at {users:,} users, {n_items:,} items"] = f"{held / 2**20:,.0f}"
        runs[-1]()  # compiles
    seconds = interleave([("small", runs[0]), ("large", runs[1])], repeats, console)
    return row(
        name,
        "sequences/s",
        1,
        seconds["large"],
        seconds["small"],
        what=f"SASRec's training steps at {large[0]:,} users, {large[1]:,} items against {small[0]:,} users, "
        f"{small[1]:,} items",
        beside=memory,
    )


class _Steps:
    """Runs an epoch of `steps` steps, going on where the last call stopped, and says the seconds a sequence took."""

    def __init__(self, epoch: Any, state: Any, data: Any, steps: int):
        self.epoch, self.state, self.data, self.steps = epoch, state, data, steps

    def __call__(self) -> float:
        start = time.perf_counter()
        self.state, losses = self.epoch(self.state, self.data, jax.random.key(SEED))
        jax.block_until_ready(losses)
        return (time.perf_counter() - start) / (self.steps * BATCH)


def _train(c, tree, data, lengths, baseline, items, offsets, ends, owned, repeats, console) -> Row:
    import torch

    steps, baseline_steps = USERS // BATCH, 10
    optimiser = optax.adam(1e-3, b1=0.9, b2=0.98, eps=1e-8)
    devices = mesh.data_devices(BATCH)
    tiers = batches.length_tiers(lengths - 1, c.maxlen, BATCH, cf.tier_multiple(BATCH, len(devices)))
    epoch = cf.make_epoch(c, optimiser, devices, batch=BATCH, steps=steps, tiers=tiers)
    ours = _Steps(epoch, create(jax.tree.map(jax.numpy.copy, tree), optimiser), data, steps)
    compiling = first_run(ours)
    adam = torch.optim.Adam(baseline.parameters(), lr=1e-3, betas=(0.9, 0.98))
    rng = np.random.default_rng(SEED)

    def draw() -> list[Any]:
        users = rng.integers(USERS, size=BATCH).tolist()
        sequences = [items[offsets[user + 1] : ends[user]].tolist() for user in users]
        rows = [draw_row(rng, s, owned[user + 1], ITEMS, c.maxlen) for s, user in zip(sequences, users, strict=True)]
        return [torch.from_numpy(part) for part in np.stack(rows, axis=1)]

    def theirs() -> float:
        baseline.train()
        start = time.perf_counter()
        for _ in range(baseline_steps):
            adam.zero_grad()
            baseline.loss(*draw()).backward()
            adam.step()
        return (time.perf_counter() - start) / (baseline_steps * BATCH)

    theirs()
    seconds = interleave([("ours", ours), ("theirs", theirs)], repeats, console)
    return row(
        "cf.train",
        "sequences/s",
        1,
        seconds["ours"],
        seconds["theirs"],
        what=f"SASRec (d 50, 2 blocks, maxlen 50), batch {BATCH}, {USERS:,} users of {MEAN_LENGTH} items; in tiers "
        f"{', '.join(f'{rows} x {width}' for width, rows in tiers)}; against PyTorch as its users run it",
        beside={"our seconds an epoch": float(np.median(seconds["ours"])) * steps * BATCH},
        compile_seconds=compiling,
    )


def _evaluate(c, tree, baseline, items, offsets, ends, repeats, console) -> Row:
    import torch

    rng = np.random.default_rng(SEED)
    windows = np.zeros((USERS, c.maxlen), np.int32)
    for user in range(USERS):
        history = items[offsets[user + 1] : ends[user] + 1][-c.maxlen :]
        windows[user, c.maxlen - len(history) :] = history
    candidates = rng.integers(1, ITEMS + 1, (USERS, CANDIDATES))
    model, some = cf.CFModel(c, tree), 200

    def ours() -> float:
        start = time.perf_counter()
        model.scores(model.x_u(windows), candidates)
        return (time.perf_counter() - start) / USERS

    def theirs() -> float:
        baseline.eval()
        start = time.perf_counter()
        with torch.no_grad():
            for user in range(some):
                x_u = baseline.user_representation(torch.tensor(windows[user : user + 1]))
                baseline.scores(x_u, torch.tensor(candidates[user : user + 1]))
        return (time.perf_counter() - start) / some

    compiling = first_run(ours)
    theirs()
    seconds = interleave([("ours", ours), ("theirs", theirs)], repeats, console)
    return row(
        "cf.evaluate",
        "users/s",
        1,
        seconds["ours"],
        seconds["theirs"],
        what=f"x_u and the scores of {CANDIDATES} candidates; against PyTorch user by user",
        compile_seconds=compiling,
    )
