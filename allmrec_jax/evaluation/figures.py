"""The charts of `report.html` as inline SVG: in the page's own colours (light or dark), sharp, and small.

Lengths along the x axis are percentages, so that a chart fills whatever width it gets while its text keeps its size; a
drawing scaled as a whole would be unreadable on a phone. Colours come from the page's style sheet through classes.
Everything a chart shows is also in a table or in its text alternative.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import ArrayLike

MOST_POINTS = 150  # of a drawn curve; more are averaged in equal runs


def bar_chart(
    rows: Sequence[tuple[str, Mapping[str, float], bool]], *, name: str, metric: str, chance: float | None = None
) -> str:
    """Horizontal bars from 0 with interval whiskers and, dashed, the level of chance.

    Args:
        rows: (label, {"value", "low", "high"}, whether the bar is emphasised), top to bottom.
        name: distinguishes the chart's element ids on the page.
        metric: what is measured, for the text alternative.
        chance: the value that a random order would give.
    """
    top, pitch = 20, 46
    end = _axis_end(max([row["high"] for _, row, _ in rows] + [chance or 0.0]))
    bottom = top + pitch * len(rows)
    step = next(s for s in (0.05, 0.1, 0.2, 0.25) if end / s <= 5.001)
    ticks = [i * step for i in range(round(end / step) + 1)]

    def x(value: float) -> str:
        return f"{100 * min(max(value, 0.0), end) / end:.2f}%"

    parts = []
    for tick in ticks:
        anchor = "start" if tick == 0 else "end" if tick == ticks[-1] else "middle"
        parts.append(f'<line class="grid" x1="{x(tick)}" x2="{x(tick)}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x(tick)}" y="{bottom + 16}" text-anchor="{anchor}">{tick:g}</text>')
    if chance is not None:
        at, anchor = x(chance), "start" if chance < 0.7 * end else "end"
        parts.append(f'<line class="chance" x1="{at}" x2="{at}" y1="{top - 4}" y2="{bottom}"/>')
        parts.append(f'<text class="chance-label" x="{at}" y="11" text-anchor="{anchor}">chance {chance:.3g}</text>')
    for i, (label, row, emphasised) in enumerate(rows):
        y = top + pitch * i
        figures = f"{row['value']:.3f} <tspan class='muted'>({row['low']:.3f}–{row['high']:.3f})</tspan>"
        parts.append(f'<text class="label" x="0" y="{y + 16}">{escape(label)}</text>')
        parts.append(f'<text class="label" x="100%" y="{y + 16}" text-anchor="end">{figures}</text>')
        css = "bar ours" if emphasised else "bar"
        parts.append(f'<rect class="{css}" x="0" y="{y + 23}" width="{x(row["value"])}" height="14"/>')
        low, high, middle = x(row["low"]), x(row["high"]), y + 30
        parts.append(f'<line class="whisker" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>')
        parts += [f'<line class="whisker" x1="{p}" x2="{p}" y1="{middle - 5}" y2="{middle + 5}"/>' for p in (low, high)]
    told = "; ".join(f"{label} {row['value']:.3f}, {row['low']:.3f} to {row['high']:.3f}" for label, row, _ in rows)
    told += f". Chance: {chance:.3g}." if chance is not None else "."
    return (
        f'<svg class="bars" width="100%" height="{bottom + 22}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(metric)} of each model with its 95 % interval</title>'
        f'<desc id="{name}-d">{escape(told)}</desc>{"".join(parts)}</svg>'
    )


def curve_panel(stage: str, name: str, steps: ArrayLike, values: ArrayLike) -> str:
    """One small plot of a training curve: a figure with its last value, axis ends and the line.

    Values that are not finite are left out and counted in the caption. The y axis is logarithmic if the values are
    positive and span a factor above 20; it then says so.

    Raises:
        ValueError: as many steps as values are needed.
    """
    steps, values = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if steps.shape != values.shape or steps.ndim != 1:
        raise ValueError(f"{stage}, {name}: {steps.shape} steps for {values.shape} values")
    finite = np.isfinite(values) & np.isfinite(steps)
    notes = [] if finite.all() else [f"{(~finite).sum()} values not finite"]
    steps, values = steps[finite], values[finite]
    if not values.size:
        return (
            f'<figure class="panel"><figcaption>{escape(name)}</figcaption><p class="note">no finite value</p></figure>'
        )
    if values.size > MOST_POINTS:
        notes.append(f"each point the mean of about {round(values.size / MOST_POINTS)} values")
        steps, values = (_averaged(column) for column in (steps, values))
    logarithmic = bool(values.min() > 0 and values.max() / values.min() > 20)
    notes += ["log scale"] if logarithmic else []

    drawn = np.log(values) if logarithmic else values
    low, high = float(drawn.min()), float(drawn.max())
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    across = (steps - steps[0]) / ((steps[-1] - steps[0]) or 1.0) * 100
    down = (high - drawn) / (high - low) * 100
    line = " ".join(f"{a:.2f},{d:.2f}" for a, d in zip(across, down, strict=True))
    marks = [math.exp(v) if logarithmic else v for v in (high, (high + low) / 2, low)]
    told = f"{stage}, {name}: {values[0]:.4g} at step {steps[0]:.0f}, {values[-1]:.4g} at step {steps[-1]:.0f}"
    return "".join(
        [
            f'<figure class="panel"><figcaption>{escape(name)} <span>last {values[-1]:.4g}</span></figcaption>',
            '<div class="plot"><div class="y" aria-hidden="true">',
            *(f"<span>{mark:.3g}</span>" for mark in marks),
            f'</div><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(told)}">',
            *(f'<line class="grid" x1="0" x2="100" y1="{y}" y2="{y}"/>' for y in (0, 50, 100)),
            # A line of no length with round ends is a dot, whatever the scaling.
            f'<polyline class="curve" points="{line}"/>' if values.size > 1 else '<path class="curve" d="M50 50h0"/>',
            '</svg><div class="x" aria-hidden="true">',
            *(f"<span>{part}</span>" for part in (f"{steps[0]:.0f}", "step", f"{steps[-1]:.0f}")),
            "</div></div>",
            f'<p class="note">{escape("; ".join(notes))}</p>' if notes else "",
            "</figure>",
        ]
    )


def _averaged(column: np.ndarray) -> np.ndarray:
    """`MOST_POINTS` means of equal runs."""
    return np.array([run.mean() for run in np.array_split(column, MOST_POINTS)])


def _axis_end(highest: float) -> float:
    """The least round number that leaves room above `highest`, at most 1."""
    return next((end for end in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8) if end >= 1.02 * highest), 1.0)
