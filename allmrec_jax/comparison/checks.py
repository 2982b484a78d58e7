"""What a comparison finds: differences of numbers and of trees of numbers, held to stated tolerances.

    max_abs    the largest absolute difference
    max_rel    the largest difference in units of the largest number of the same array

A check passes if `max_rel` is at most its tolerance. Both are of float32 on one machine, dropout off.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

TOLERANCES = {
    "output": 1e-4,
    "score": 1e-4,
    "loss": 1e-4,
    "gradient": 1e-3,
    "parameters": 1e-3,
}
"""By kind of check; of parameters see `moved`."""
SMALL = 1e-2
"""An array of gradients is measured against its own largest number, or this share of the largest of all arrays: where
the true gradient is 0 (that of attention's key bias, which shifts all logits alike; that of the last bias of heads held
among the token embeddings) what is left is the rounding of terms as large as the others, which cancel."""
INERT = 1e-4
"""Elements whose gradients stayed below this share of the largest are left out of `moved`: Adam divides by the
gradient's own size, and turns what is rounding there into whole steps."""


@dataclass(frozen=True)
class Check:
    """One comparison. `worst`: the array that differs most; `parts`: the first layer at which the traces part."""

    name: str
    max_abs: float
    max_rel: float
    tolerance: float
    passed: bool
    worst: str = ""
    parts: str = ""


class Run(NamedTuple):
    """What some training steps of one side gave, all in our layout.

    gradients: of the first step. squares: sums of the gradients' squares over all steps; of our side alone.
    """

    losses: list[float]
    gradients: Any
    start: Any
    end: Any
    squares: Any = None


Pairs = Sequence[tuple[str, Any, Any]]  # (name, ours, theirs)
Trace = Sequence[Callable[[], Pairs]]  # in the order of the forward pass, each building on those before


def difference(ours: Any, theirs: Any, least: float = 0.0) -> tuple[float, float]:
    """(max_abs, max_rel) of two arrays; infinite if one is not finite where the other is, or the shapes differ.

    Args:
      least: what the difference is measured against at least.
    """
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape or not np.isfinite(a).all() or not np.isfinite(b).all():
        return math.inf, math.inf
    if not a.size:
        return 0.0, 0.0
    largest, scale = float(np.abs(a - b).max()), max(float(np.abs(b).max()), least)
    return largest, largest / scale if scale else (math.inf if largest else 0.0)


def leaves(tree: Any) -> dict[str, np.ndarray]:
    """`a/b/c` -> array."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in found}


def check(name: str, kind: str, ours: Any, theirs: Any) -> Check:
    """A check of arrays or trees of arrays, each array against its own largest number."""
    a, b = leaves(ours), leaves(theirs)
    least = max((float(np.abs(leaf).max(initial=0)) for leaf in b.values()), default=0.0)
    least *= SMALL if kind == "gradient" else 0.0
    found = {path: difference(a.get(path, np.nan), leaf, least) for path, leaf in b.items()}
    worst = max(found, key=lambda path: found[path][1])
    return _check(name, kind, max(pair[0] for pair in found.values()), found[worst][1], worst)


def _check(name: str, kind: str, max_abs: float, max_rel: float, worst: str) -> Check:
    return Check(name, max_abs, max_rel, TOLERANCES[kind], max_rel <= TOLERANCES[kind], worst)


def check_runs(name: str, ours: Run, theirs: Run, steps: int) -> list[Check]:
    """Losses of all steps, gradients of the first, and the parameters at the end."""
    return [
        check(f"{name}: losses of {steps} steps", "loss", np.array(ours.losses), np.array(theirs.losses)),
        check(f"{name}: gradients", "gradient", ours.gradients, theirs.gradients),
        moved(f"{name}: parameters after {steps} steps", ours, theirs),
    ]


def moved(name: str, ours: Run, theirs: Run) -> Check:
    """Parameters by what the optimiser added to each array, which is small beside the array itself: the norm of the
    difference in units of the norm of what was added."""
    end, other, start, squares = (leaves(tree) for tree in (ours.end, theirs.end, ours.start, ours.squares))
    largest = max(float(array.max()) for array in squares.values())
    found, greatest = {"": 0.0}, 0.0
    for path, before in start.items():
        active = squares[path] > INERT**2 * largest
        a, b = ((after[path] - before)[active].astype(np.float64) for after in (end, other))
        if a.size:
            found[path] = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
            greatest = max(greatest, float(np.abs(a - b).max()))
    worst = max(found, key=found.__getitem__)
    return _check(name, "parameters", greatest, found[worst], worst)


def check_order(name: str, ours: np.ndarray, theirs: np.ndarray) -> Check:
    """Whether both scores put the candidates of each user in the same order, but where they are as good as equal: the
    largest difference between two scores of a user that stand in another order there."""
    worst = scale = 0.0
    for a, b in zip(np.asarray(ours, np.float64), np.asarray(theirs, np.float64), strict=True):
        crossed = (a[:, None] > a[None]) & (b[:, None] < b[None])
        worst = max(worst, float(np.where(crossed, b[None] - b[:, None], 0).max()))
        scale = max(scale, float(np.abs(b).max()))
    return _check(name, "score", worst, worst / scale if scale else 0.0, "")


def first_parting(trace: Trace, tolerance: float) -> str:
    """The name of the first part of a forward pass whose outputs differ by more than the tolerance; empty if none does.

    Found by bisection: what builds on something that differs differs as well.
    """

    def parted(k: int) -> str:
        return next((name for name, a, b in trace[k]() if difference(a, b)[1] > tolerance), "")

    low, high, found = 0, len(trace), ""
    while low < high:
        middle = (low + high) // 2
        if name := parted(middle):
            high, found = middle, name
        else:
            low = middle + 1
    return found


def recorder() -> optax.GradientTransformation:
    """Leaves gradients as they are, and keeps those of the first step and the sums of all their squares."""

    def init(trained: Any) -> dict[str, Any]:
        zeros = jax.tree.map(jnp.zeros_like, trained)
        return {"steps": jnp.zeros((), jnp.int32), "first": zeros, "squares": jax.tree.map(jnp.zeros_like, trained)}

    def keep(gradients: Any, kept: dict[str, Any], _: Any = None) -> tuple[Any, dict[str, Any]]:
        first = jax.tree.map(lambda new, old: jnp.where(kept["steps"] == 0, new, old), gradients, kept["first"])
        squares = jax.tree.map(lambda new, old: old + new * new, gradients, kept["squares"])
        return gradients, {"steps": kept["steps"] + 1, "first": first, "squares": squares}

    return optax.GradientTransformation(init, keep)


def recorded(optimiser: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimiser, and what it is given: `state.opt_state[0]` is the `recorder`'s."""
    return optax.chain(recorder(), optimiser)


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """`{"passed", "checks": [{"name", "max_abs", "max_rel", "tolerance", "passed", ...}]}`; JSON knows no infinity."""

    def written(entry: Check) -> dict[str, Any]:
        numbers = {name: min(getattr(entry, name), sys.float_info.max) for name in ("max_abs", "max_rel")}
        return asdict(entry) | numbers

    return {"passed": all(entry.passed for entry in checks), "checks": [written(entry) for entry in checks]}
