"""The figures as tables for elsewhere: CSV, a figure a line, and LaTeX, a table a scenario."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from allmrec_jax.evaluation.labels import METRIC_LABELS, SHOWN, clean, model_labels, scenario_title

FIGURES = ("value", "low", "high", "n")
SPECIAL = {**{c: f"\\{c}" for c in "&%$#_{}"}, "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def to_csv(scenarios: Mapping[str, Any]) -> str:
    """`scenario,model,metric,value,low,high,n`."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(("scenario", "model", "metric", *FIGURES))
    for scenario, models in scenarios.items():
        for model, metrics in models.items():
            for metric, figures in metrics.items():
                rows.writerow((scenario, model, metric, *(figures[name] for name in FIGURES)))
    return out.getvalue()


def to_latex(scenarios: Mapping[str, Any], facts: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """A `table` of each scenario: models by metrics, the best figure bold, the 95 % interval small beside it.

    It needs the package booktabs.
    """
    labels, parts = model_labels(about), []
    for name, models in scenarios.items():
        metrics = facts[name].get("metrics", SHOWN)
        shown = [metric for metric in metrics if any(metric in of for of in models.values())]
        best = {metric: max(of[metric]["value"] for of in models.values() if metric in of) for metric in shown}
        lines = [
            r"\begin{table}",
            rf"\caption{{{escape(scenario_title(name, facts[name], facts[name].get('candidates')))}}}",
            r"\begin{tabular}{l" + "r" * len(shown) + "}",
            r"\toprule",
            " & ".join(["", *(escape(METRIC_LABELS[metric]) for metric in shown)]) + r" \\",
            r"\midrule",
        ]
        for model, of in models.items():
            cells = [_cell(of.get(metric), best[metric]) for metric in shown]
            lines.append(" & ".join([escape(labels.get(model, model)), *cells]) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def _cell(figures: Mapping[str, float] | None, best: float) -> str:
    if figures is None:
        return "--"
    value = f"{figures['value']:.3f}"
    shown = rf"\textbf{{{value}}}" if figures["value"] == best else value
    return rf"{shown} {{\scriptsize ({figures['low']:.3f}--{figures['high']:.3f})}}"


def escape(text: object) -> str:
    """Text for LaTeX.

    >>> escape("50 % of A_1")
    '50 \\\\% of A\\\\_1'
    """
    return "".join(SPECIAL.get(c, c) for c in clean(text).replace("\\", "/"))
