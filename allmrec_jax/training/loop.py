"""The loop that every stage runs: resumable, saved, watched for NaN, with a progress bar and curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from allmrec_jax.errors import UserError
from allmrec_jax.training.checkpoint import Checkpoints, Curves


def progress_bar(console: Console | None) -> Progress:
    """A bar with rate and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def run(
    step: Callable[[Any, int], tuple[Any, dict[str, jax.Array]]],
    state: Any,
    *,
    steps: int,
    checkpoints: Checkpoints,
    label: str,
    items_per_step: float,
    item_name: str,
    log_every: int,
    save_every: int,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    console: Console | None = None,
    logs: Path | None = None,
) -> tuple[Any, Curves]:
    """Runs `state, metrics = step(state, i)` for i in 0..steps-1, going on from the newest checkpoint.

    `metrics` are arrays (a scalar, or one value for each optimiser step that `step` makes); they are fetched only every
    `log_every` steps, so the device is never waited for in between. A checkpoint is saved every `save_every` steps and at
    the end, after `evaluate(state)` where given, and only if everything up to there is finite.

    Raises:
      UserError: if a metric is not finite; it names the step and the last good checkpoint.
    """
    console = console or Console()
    restored = checkpoints.restore(state, warn=console.print)
    start, curves = 0, {}
    if restored is not None:
        start, state, meta = restored
        curves = meta["curves"]
        if start < steps:
            console.print(f"{label}: going on from step {start} of {steps}")
    if start >= steps:
        return state, curves
    writer = None
    if logs is not None:
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(str(logs), purge_step=start)

    def record(name: str, at: int, value: float) -> None:
        curves.setdefault(name, []).append([at, value])
        if writer is not None:
            writer.add_scalar(name, value, at)

    pending: list[tuple[int, dict[str, jax.Array]]] = []
    saved = start

    def drain() -> dict[str, float]:
        """Fetches what is pending, checks it and appends its means to the curves."""
        fetched = [(i, {k: np.atleast_1d(np.asarray(v)) for k, v in m.items()}) for i, m in pending]
        pending.clear()
        means: dict[str, float] = {}
        for i, metrics in fetched:
            for name, values in metrics.items():
                bad = np.flatnonzero(~np.isfinite(values))
                if bad.size:
                    where = i * values.size + int(bad[0]) + 1
                    kept = f"the checkpoint of step {saved} is kept" if saved else "nothing was saved yet"
                    raise UserError(f"{label}: {name} is {values[bad[0]]} at step {where}; {kept}; lower the learning rate")
        if fetched:
            last = fetched[-1][0] + 1
            for name in fetched[0][1]:
                means[name] = float(np.mean(np.concatenate([m[name] for _, m in fetched])))
                record(name, last, means[name])
        return means

    try:
        with progress_bar(console) as bar:
            task = bar.add_task(label, total=steps, completed=start, note="")
            for i in range(start, steps):
                state, metrics = step(state, i)
                pending.append((i, metrics))
                done = i + 1
                save_now = done % save_every == 0 or done == steps
                if done % log_every == 0 or save_now:
                    means = drain()
                    speed = bar.tasks[0].speed
                    rate = f"{speed * items_per_step:,.1f} {item_name}/s " if speed else ""
                    bar.update(task, note=rate + " ".join(f"{k} {v:.4g}" for k, v in means.items()))
                if save_now:
                    found = evaluate(state) if evaluate is not None else {}
                    for name, value in found.items():
                        if not math.isfinite(value):
                            raise UserError(f"{label}: {name} is {value} after step {done}; lower the learning rate")
                        record(name, done, value)
                    checkpoints.save(done, state, {"curves": curves}, metrics=found or None)
                    saved = done
                bar.update(task, completed=done)
    finally:
        if writer is not None:
            writer.close()
    return state, curves
