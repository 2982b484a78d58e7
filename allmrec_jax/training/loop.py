"""The loop that every stage runs: resumable, saved, watched for NaN, with a progress bar and curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from allmrec_jax.errors import UserError
from allmrec_jax.progress import progress, say
from allmrec_jax.training.checkpoint import Checkpoints, Curves


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every floating-point number of the tree is finite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


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
    step_name: str = "step",
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    evaluated_on: str = "validation",
    console: Console | None = None,
    logs: Path | None = None,
) -> tuple[Any, Curves]:
    """Runs `state, metrics = step(state, i)` for i in 0..steps-1, going on from the newest checkpoint.

    `metrics` are arrays (a scalar, or one value for each optimiser step that `step` makes); they are fetched only every
    `log_every` steps, and one step is always on its way while the next is made ready. A checkpoint is saved every
    `save_every` steps and at the end, after `evaluate(state)` where given, and only if the metrics up to there and the
    state itself are finite.

    Args:
      step_name: what the user calls a step of this loop; `epoch` where it makes several optimiser steps.
      evaluated_on: what `evaluate`'s figures are of, for whoever watches.

    Raises:
      UserError: if a metric or the state is not finite; it names the step and the last good checkpoint.
    """
    console = console or Console()
    restored = checkpoints.restore(state, warn=lambda text: say(console, text))
    start, curves = 0, {}
    if restored is not None:
        start, state, meta = restored
        curves = meta["curves"]
        if start < steps:
            say(console, f"{label}: going on from {step_name} {start} of {steps}")
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

    shown: dict[str, float] = {}

    def notes() -> list[str]:
        return [f"{name} {value:.4g}" for name, value in shown.items()]

    pending: list[tuple[int, dict[str, jax.Array]]] = []
    saved = start

    def stop(what: str, where: str) -> UserError:
        kept = f"the checkpoint of {step_name} {saved} is kept" if saved else "nothing was saved yet"
        return UserError(f"{label}: {what} {where}; {kept}; lower the learning rate")

    def drain() -> dict[str, float]:
        """Fetches what is pending, checks it and appends its means to the curves."""
        fetched = [(i, {k: np.atleast_1d(np.asarray(v)) for k, v in m.items()}) for i, m in pending]
        pending.clear()
        for i, metrics in fetched:
            first_bad = {
                name: int(np.argmin(np.isfinite(values)))
                for name, values in metrics.items()
                if not np.isfinite(values).all()
            }
            if first_bad:
                name = min(first_bad, key=first_bad.__getitem__)
                values, at = metrics[name], first_bad[name]
                inside = f", optimiser step {at + 1} of {values.size}" if values.size > 1 else ""
                raise stop(f"{name} is {values[at]}", f"in {step_name} {i + 1}{inside}")
        last, names = fetched[-1][0] + 1, sorted(fetched[0][1], key=lambda name: (name != "loss", name))
        means = {name: float(np.mean(np.concatenate([m[name] for _, m in fetched]))) for name in names}
        for name, value in means.items():
            record(name, last, value)
        return means

    try:
        with progress(label, steps, done=start, unit=item_name, per_step=items_per_step, console=console) as bar:
            for i in range(start, steps):
                state, metrics = step(state, i)
                pending.append((i, metrics))
                done = i + 1
                save_now = done % save_every == 0 or done == steps
                if done % log_every == 0 or save_now:
                    shown |= drain()
                    bar.update(done, notes())
                elif len(pending) > 1:
                    # One step ahead keeps the device busy; more would only hold memory and let the bar run ahead.
                    jax.block_until_ready(pending[-2][1])
                    bar.update(i)
                if save_now:
                    found = evaluate(state) if evaluate is not None else {}
                    for k, (name, value) in enumerate(found.items()):
                        if not math.isfinite(value):
                            raise stop(f"{name} is {value}", f"after {step_name} {done}")
                        record(name, done, value)
                        shown[name if k else f"{evaluated_on}: {name}"] = value
                    bar.update(done, notes())
                    if not all_finite(state):
                        raise stop("the weights are not finite", f"after {step_name} {done}")
                    checkpoints.save(done, state, {"curves": curves}, metrics=found or None)
                    saved = done
    finally:
        if writer is not None:
            writer.close()
    return state, curves
