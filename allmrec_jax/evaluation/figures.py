"""The charts of `report.html` as inline SVG: in the page's own colours (light or dark), sharp, and small.

Lengths along the x axis are percentages, so that a chart fills whatever width it gets while its text keeps its size; a
drawing scaled as a whole would be unreadable on a phone. Colours come from the page's style sheet through classes.
Everything a chart shows is also in a table or in its text alternative.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

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


def line_chart(
    lines: Sequence[tuple[str, Sequence[Mapping[str, float]]]], ticks: Sequence[str], *, name: str, title: str, x: str
) -> str:
    """Lines over named places on the x axis, from 0 up, with 95 % intervals as whiskers and a legend.

    Args:
        lines: (label, {"value", "low", "high"} at each place), of at most as many as the style sheet has styles (8).
        ticks: what the places are called; x: what they are; title: what the lines are of.
    """
    top, height, left = 10, 240, 8.0
    end = _axis_end(max(point["high"] for _, points in lines for point in points))
    places = [left + (100 - left) * (i + 0.5) / len(ticks) for i in range(len(ticks))]

    def y(value: float) -> float:
        return top + height * (1 - min(max(value, 0.0), end) / end)

    parts = []
    for i in range(6):
        value = end * i / 5
        parts.append(f'<line class="grid" x1="{left}%" x2="100%" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 1}%" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2g}</text>')
    for at, tick in zip(places, ticks, strict=True):
        row = f'x="{at:.2f}%" y="{top + height + 18}" text-anchor="middle"'
        parts.append(f'<text class="tick" {row}>{escape(tick)}</text>')
    parts.append(f'<text class="tick" x="100%" y="{top + height + 36}" text-anchor="end">{escape(x)}</text>')
    told = []
    for k, (label, points) in enumerate(lines):
        # Whiskers of several lines at one place stand beside each other.
        shifted = [at + (k - (len(lines) - 1) / 2) * 0.7 for at in places]
        spots = [(at, y(point["value"])) for at, point in zip(shifted, points, strict=True)]
        for (a, b), (c, d) in itertools.pairwise(spots):
            parts.append(f'<line class="line l{k}" x1="{a:.2f}%" y1="{b:.1f}" x2="{c:.2f}%" y2="{d:.1f}"/>')
        for (at, middle), point in zip(spots, points, strict=True):
            ends = f'y1="{y(point["low"]):.1f}" y2="{y(point["high"]):.1f}"'
            parts.append(f'<line class="spread l{k}" x1="{at:.2f}%" x2="{at:.2f}%" {ends}/>')
            parts.append(f'<circle class="dot l{k}" cx="{at:.2f}%" cy="{middle:.1f}" r="3.5"/>')
        told.append("{}: {}".format(label, ", ".join(f"{point['value']:.3f}" for point in points)))
    legend = "".join(
        f'<span class="entry"><svg width="28" height="12" aria-hidden="true"><line class="line l{k}" x1="1" x2="27" '
        f'y1="6" y2="6"/><circle class="dot l{k}" cx="14" cy="6" r="3.5"/></svg> {escape(label)}</span>'
        for k, (label, _) in enumerate(lines)
    )
    return (
        f'<svg class="lines" width="100%" height="{top + height + 44}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape("; ".join(told))}</desc>'
        f'{"".join(parts)}</svg><p class="legend">{legend}</p>'
    )


def reliability_panel(label: str, found: Mapping[str, Any]) -> str:
    """How often a candidate is the target (upwards) against the probability that its score gives it (rightwards).

    The dashed diagonal is where both agree; a dot is the larger the more candidates it stands for.

    Args:
        found: {"bins": [{"p", "hit", "n"}], "error"}, see `breakdown.calibration`.
    """
    bins = found["bins"]
    line = " ".join(f"{100 * b['p']:.2f},{100 - 100 * b['hit']:.2f}" for b in bins)
    told = "; ".join(f"{b['p']:.2f}: {b['hit']:.2f} of {b['n']}" for b in bins)
    dots = "".join(
        f'<circle class="dot l0" cx="{100 * b["p"]:.2f}%" cy="{100 - 100 * b["hit"]:.2f}%" '
        f'r="{min(7, 2 + math.log10(b["n"])):.1f}"/>'
        for b in bins
    )
    return (
        f'<figure class="panel"><figcaption>{escape(label)} <span>error {found["error"]:.3f}</span></figcaption>'
        '<div class="plot square"><div class="y" aria-hidden="true"><span>1</span><span>.5</span><span>0</span></div>'
        f'<div class="layers" role="img" aria-label="{escape(f"{label}: {told}")}">'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        '<line class="grid" x1="0" x2="100" y1="0" y2="0"/><line class="grid" x1="0" x2="100" y1="100" y2="100"/>'
        f'<line class="diagonal" x1="0" x2="100" y1="100" y2="0"/><polyline class="curve" points="{line}"/></svg>'
        f'<svg aria-hidden="true">{dots}</svg></div>'
        '<div class="x" aria-hidden="true"><span>0</span><span>probability</span><span>1</span></div></div></figure>'
    )


def _averaged(column: np.ndarray) -> np.ndarray:
    """`MOST_POINTS` means of equal runs."""
    return np.array([run.mean() for run in np.array_split(column, MOST_POINTS)])


def _axis_end(highest: float) -> float:
    """The least round number that leaves room above `highest`, at most 1."""
    return next((end for end in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8) if end >= 1.02 * highest), 1.0)
