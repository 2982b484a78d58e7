"""What an evaluation leaves behind: `metrics.json` for machines, tables for the terminal, `report.html` for people."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from allmrec_jax.evaluation.labels import (
    COMPARED,
    METRIC_LABELS,
    NEW,
    SHOWN,
    clean,
    hits,
    model_labels,
    p_text,
    signed,
)
from allmrec_jax.evaluation.metrics import chance
from allmrec_jax.files import write_atomically

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def write_metrics(path: str | os.PathLike, scenarios: Mapping[str, Any], **extra: Any) -> None:
    """Write {"scenarios": {NAME: {MODEL: {METRIC: {"value", "low", "high", "n"}}}}, **extra} as JSON, atomically.

    Args:
        scenarios: as `metrics.summarise` gives them, by scenario name.
        extra: further top-level keys, such as `differences` and `about` (seeds, the data's fingerprint, the config,
            versions, hardware, date, durations). Dataclasses, paths and numpy values become plain JSON.

    Raises:
        ValueError: a metric without one of the four keys or with a value that is not finite (named), or an extra value
            that JSON cannot hold.
    """
    scenarios = plain(scenarios)
    for scenario, models in scenarios.items():
        for model, metrics in models.items():
            for metric, figures in metrics.items():
                wrong = [k for k in ("value", "low", "high", "n") if not _is_finite(figures.get(k))]
                if wrong:
                    raise ValueError(f"{scenario}, {model}, {metric}: no finite {', '.join(wrong)} in {figures}")
    text = json.dumps({"scenarios": scenarios, **plain(extra)}, indent=1, allow_nan=False)
    with write_atomically(path) as file:
        file.write(f"{text}\n".encode())


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    conclusion: str,
    scenarios: Mapping[str, Any],
    differences: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]],
    about: Mapping[str, Any],
    warnings: Sequence[str],
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    not_applicable: Mapping[str, str] | None = None,
    alignment: Mapping[str, Any] | None = None,
    by_popularity: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    paper: Mapping[str, Any] | None = None,
) -> None:
    """Write the evaluation as one HTML page that needs no other file and no network, atomically.

    Args:
        conclusion: what a reader may conclude, in plain text; an empty line starts a new paragraph.
        scenarios: {NAME: {MODEL: {METRIC: {"value", "low", "high", "n"}}}}; models appear in this order.
        differences: {NAME: {A: {B: {METRIC: {"value", "low", "high", "n", "p_value"}}}}}, A minus B.
        examples: {"user", "history": [titles], "target": title, "choices": {MODEL: title}} for each example user, and
            optionally "hits": {MODEL: bool} where titles alone cannot tell.
        curves: {stage: {name: (steps, values)}}.
        about: the run's facts, shown as they are: plain values in one table, groups (dicts) under their own headings.
            Four keys are also used elsewhere: "cf" (the CF model's name), "candidates" (how many a user has, one
            number or {NAME: number}: gives the level of chance), "labels" ({MODEL: label}), and "durations" ({what:
            seconds}). "data_name" and "date" stand under the title.
        warnings: sentences the reader must see before the figures.
        facts: {NAME: who is in it}, see `labels.scenario_title`.
        not_applicable: {NAME: reason} for the scenarios that this data cannot support.
        alignment: stage 1 by itself: "sentences", "ranking" {scenario: {MODEL: ...}} with its "columns" {MODEL: label},
            and "picture", a PNG.
        by_popularity, calibration: see `breakdown`.
        paper: our figures beside the paper's, see `paper.table`.
    """
    from allmrec_jax.evaluation.page import render

    page = render(
        title=title,
        conclusion=conclusion,
        scenarios=plain(scenarios),
        differences=plain(differences),
        examples=plain(examples),
        curves=curves,
        about=plain(about),
        warnings=warnings,
        facts=plain(facts or {}),
        not_applicable=not_applicable or {},
        alignment=alignment,
        by_popularity=plain(by_popularity),
        calibration=plain(calibration),
        paper=plain(paper),
    )
    with write_atomically(path) as file:
        file.write(page.encode())


def metrics_table(
    scenario: Mapping[str, Any],
    order: Sequence[str],
    *,
    about: Mapping[str, Any] | None = None,
    candidates: int | None = None,
    title: str | None = None,
    metrics: Sequence[str] = SHOWN,
) -> Table:
    """Models x metrics with 95 % intervals, for the terminal.

    Args:
        order: models from top to bottom; those without figures are left out.
        about: names the models, see `labels.model_labels`.
        candidates: adds a row with the level of chance.
    """
    labels = model_labels(about or {})
    shown = [metric for metric in metrics if any(metric in of for of in scenario.values())]
    table = _table(title, "Model", shown)
    for model in (m for m in order if m in scenario):
        cells = [_interval(scenario[model].get(metric), "{:.3f}".format, "–") for metric in shown]
        table.add_row(_named(model, labels), *cells)
    if candidates:
        chances = [chance(candidates).get(metric.removeprefix(NEW)) for metric in shown]
        table.add_row(*(_styled(text, "dim") for text in ("Random order", *(_or_dash(c) for c in chances))))
    return table


def differences_table(
    differences: Mapping[str, Any], *, about: Mapping[str, Any] | None = None, title: str | None = None
) -> Table:
    """Paired differences of one scenario, {A: {B: {METRIC: ...}}}, A minus B, with 95 % intervals and p-values."""
    from rich.text import Text

    labels = model_labels(about or {})
    table = _table(title, "Difference", COMPARED)
    for a, of_a in differences.items():
        for b, figures in of_a.items():
            head = Text(f"{clean(labels.get(a, a))} minus {clean(labels.get(b, b))}")
            cells = [_interval(figures.get(metric), signed, " to ") for metric in COMPARED]
            table.add_row(head, *cells)
    return table


def examples_table(
    examples: Sequence[Mapping[str, Any]], order: Sequence[str], *, about: Mapping[str, Any] | None = None
) -> RenderableType:
    """Example users: history, the true next item, each model's choice; hits are marked."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    labels = model_labels(about or {})
    blocks: list[RenderableType] = []
    for example in examples:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", max_width=32)
        grid.add_column(ratio=1)
        grid.add_row("history", Text("; ".join(clean(t) for t in example["history"]) or "nothing yet"))
        grid.add_row("took next", Text(clean(example["target"]), style="bold"))
        for model in (m for m in order if m in example["choices"]):
            hit = hits(example, model)
            choice = Text(clean(example["choices"][model]) + (" ✓" if hit else ""), style="green" if hit else "")
            grid.add_row(Text(clean(labels.get(model, model))), choice)
        blocks += [Text(f"User {clean(example['user'])}", style="bold"), Padding(grid, (0, 0, 1, 2))]
    return Group(*blocks)


def plain(value: Any) -> Any:
    """The same as dicts, lists, strings, finite numbers, booleans and None: what JSON and the page can show.

    NaN and the infinities, which JSON lacks, become "nan", "inf" and "-inf".

    Raises:
        ValueError: something without a plain form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ValueError(f"{type(value).__name__} has no plain form: {value!r}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _table(title: str | None, first: str, metrics: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title and Text(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column(first, min_width=12)
    for metric in metrics:
        table.add_column(METRIC_LABELS[metric], justify="right", no_wrap=True)
    return table


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _styled(text: str, style: str) -> Any:
    from rich.text import Text

    return Text(text, style=style)


def _named(model: str, labels: Mapping[str, str]) -> Any:
    text = _styled(clean(labels.get(model, model)), "")
    return text.append(f"\n{clean(model)}", style="dim") if labels.get(model, model) != model else text


def _interval(figures: Mapping[str, float] | None, number: Callable[[float], str], between: str) -> Any:
    """The value, the p-value if there is one, and below them the interval."""
    if figures is None:
        return _styled("–", "dim")
    cell = _styled(f"{p_text(figures['p_value'])}  " if "p_value" in figures else "", "dim")
    cell.append(number(figures["value"]), style="not dim")
    return cell.append(f"\n({between.join(number(figures[end]) for end in ('low', 'high'))})", style="dim")
