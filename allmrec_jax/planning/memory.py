"""How memory grows with the users of a pass: a line through two compiles; the largest pass, confirmed by a third."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from allmrec_jax.planning.programs import Programs

MORE = 2  # compiles that may correct a wrong prediction


@dataclass(frozen=True)
class Survey:
    """bytes a chip = fixed + slope * users of a pass."""

    fixed: float
    slope: float
    largest: int
    """The most users that were seen to fit; 0 is none."""
    confirmed: bool
    """Whether it is the line's prediction (or was limited by `most`), not just the largest that was tried."""
    seen: dict[int, tuple[int | None, bool]] = field(default_factory=dict)
    """Users: (bytes, whether they fit), of all that were compiled."""


def survey(
    measure: Callable[[int], tuple[int | None, bool]], first: int, multiple: int, usable: int, most: int
) -> Survey:
    """The line through two sizes, then the size that it predicts to be the largest.

    Args:
      measure: users of a pass -> (bytes a chip or None, whether they fit).
      first: the size asked for, a multiple of `multiple`.
      usable: bytes a chip.
      most: users beyond which nobody cares.
    """
    seen = {first: measure(first)}

    def down(users: float) -> int:
        return max(0, min(int(users), most) // multiple * multiple)

    second = 2 * first if seen[first][1] else max(multiple, down(first / 2))
    if second not in seen:
        seen[second] = measure(second)
    known = {users: used for users, (used, _) in seen.items() if used is not None}
    slope = (known[second] - known[first]) / (second - first) if len(known) == 2 else 0.0
    used = next(iter(known.values()), usable)
    fixed = used - slope * next(iter(known), 0)
    if slope <= 0:
        fitting = [users for users, (_, fits) in seen.items() if fits]
        return Survey(used, 0.0, max(fitting, default=0), False, seen)
    predicted = target = down((usable - fixed) / slope)
    for _ in range(1 + MORE):
        if target < multiple or target in seen:
            break
        seen[target] = used, fits = measure(target)
        if fits:
            break
        # Between the largest that fits and this one: along the line through both, or half way.
        below = max((users for users, (_, fits) in seen.items() if fits), default=0)
        at_below = fixed if below == 0 else seen[below][0]
        share = (usable - at_below) / (used - at_below) if used is not None else 0.5
        target = min(target - multiple, down(below + share * (target - below)))
    largest = max((users for users, (_, fits) in seen.items() if fits), default=0)
    return Survey(fixed, slope, largest, largest == predicted, seen)


def activations(programs: Programs, users: int) -> float:
    """Bytes a chip of what the backward pass finds again, from the traced shapes.

    Rows are cut over `data`, heads, MLP and vocabulary over `model`.
    """
    data, model = programs.mesh.shape["data"], programs.mesh.shape["model"]
    layer = programs.layer
    cut = {n for n in (layer.heads, layer.mlp, programs.llm_config.vocab_size) if n % model == 0}
    total = 0.0
    for shape, bytes_ in programs.kept:
        own = shape[1:] if shape and shape[0] == layer.layers else shape
        total += bytes_ / (model if cut & set(own) else 1)
    return total * users / data


def temporaries(programs: Programs, users: int) -> float:
    """Bytes a chip that one layer's backward pass and the logits work with, by formula (float32), a user:

    3 n T^2 (scores, their softmax, its gradient) + 3 T f (the MLP) + 3 A V (logits, softmax, gradient)
    """
    room, layer = programs.lengths.train, programs.layer
    data, model = programs.mesh.shape["data"], programs.mesh.shape["model"]
    values = layer.heads * room.time**2 + room.time * layer.mlp + room.answers * programs.llm_config.vocab_size
    return 3 * 4 * values * users / data / model
