"""What `allmrec compare` found, for people: a table on the console, a Markdown page and an HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from allmrec_jax.comparison.compare import Comparison
from allmrec_jax.evaluation.labels import METRIC_LABELS, clean
from allmrec_jax.evaluation.page import HEAD
from allmrec_jax.files import write_atomically

TITLE = "A-LLMRec in JAX and in PyTorch"
COLUMNS = ("check", "largest difference", "relative", "allowed", "")
EXPLAINED = (
    "The same weights and batches in both programs, float32, dropout off. Relative: in units of the largest number of "
    "the same array; of parameters, in units of what the optimiser added to them; of metrics, in units of the 95 % "
    "interval."
)
SIDES = {"ours": "JAX", "theirs": "PyTorch"}


def rows_of(found: Comparison) -> list[tuple[str, ...]]:
    """One a check, as `COLUMNS` says; failed ones say where."""
    rows = []
    for entry in found.checks:
        verdict = "agrees" if entry.passed else "DIFFERS"
        if not entry.passed:
            where = f"first in {entry.parts}" if entry.parts else ""
            worst = f"most in {entry.worst}" if entry.worst else ""
            verdict = "; ".join(part for part in (verdict, where, worst) if part)
        rows.append((entry.name, f"{entry.max_abs:.2g}", f"{entry.max_rel:.2g}", f"{entry.tolerance:g}", verdict))
    return rows


def conclusion(found: Comparison) -> str:
    """One line."""
    failed = [entry for entry in found.checks if not entry.passed]
    if not failed:
        return f"All {len(found.checks)} checks agree."
    first = failed[0]
    where = f", first in {first.parts}" if first.parts else ""
    return f"{len(failed)} of {len(found.checks)} checks differ; the first is {first.name}{where}."


def metric_rows(found: Comparison) -> list[tuple[str, ...]]:
    """Stage, metric, and its value and interval by either program."""
    return [
        (stage, METRIC_LABELS[metric], *(_interval(sides[side][metric]) for side in SIDES))
        for stage, sides in found.metrics.items()
        for metric in sides["ours"]
    ]


def _interval(figure: Mapping[str, Any]) -> str:
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f}), n {figure['n']}"


def console_table(found: Comparison) -> Table:
    table = Table(*COLUMNS, title=TITLE, title_justify="left")
    for row in rows_of(found):
        table.add_row(*row, style=None if row[-1] == "agrees" else "bold red")
    return table


def markdown(found: Comparison, about: Mapping[str, Any]) -> str:
    """The report as Markdown."""

    def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join("| " + " | ".join(clean(cell).replace("|", "\\|") for cell in row) + " |" for row in lines)

    parts = [f"# {TITLE}", conclusion(found), EXPLAINED, *(f"Note: {clean(note)}." for note in found.notes)]
    parts.append(table(COLUMNS, rows_of(found)))
    if found.metrics:
        parts += ["## Metrics", table(("stage", "metric", *SIDES.values()), metric_rows(found))]
    parts += ["## The run", table(("", ""), [(key, str(value)) for key, value in about.items()])]
    return "\n\n".join(parts) + "\n"


def html(found: Comparison, about: Mapping[str, Any], picture: bytes | None) -> str:
    """The report as one page that loads nothing."""
    from allmrec_jax import evaluation

    def cell(text: str, tag: str = "td") -> str:
        return f"<{tag}>{escape(clean(text))}</{tag}>"

    def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        body = "".join(f"<tr>{cell(first, 'th')}{''.join(map(cell, rest))}</tr>" for first, *rest in rows)
        top = f"<thead><tr>{''.join(cell(name, 'th') for name in head)}</tr></thead>"
        return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'

    style = (Path(evaluation.__file__).parent / "page.css").read_text("utf-8")
    parts = [HEAD.format(title=TITLE, style=style), f"<h1>{TITLE}</h1>"]
    parts.append(f'<section class="conclusion"><p>{escape(clean(conclusion(found)))}</p></section>')
    parts += [f"<p>{EXPLAINED}</p>", *(f"<p>{escape(clean(note))}.</p>" for note in found.notes)]
    parts.append(table(COLUMNS, rows_of(found)))
    if found.metrics:
        parts += ["<h2>Metrics</h2>", table(("stage", "metric", *SIDES.values()), metric_rows(found))]
    if picture is not None:
        encoded = base64.b64encode(picture).decode()
        parts.append(f'<h2>Losses</h2><img alt="losses by step" src="data:image/png;base64,{encoded}">')
    parts += ["<h2>The run</h2>", table(("", ""), [(key, str(value)) for key, value in about.items()])]
    return "\n".join(parts) + "\n</main>\n</body>\n</html>\n"


def loss_curves(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Both programs' losses by step, a panel a stage, as PNG. Each point is the mean of a run of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.2), squeeze=False)
    for axis, (stage, sides) in zip(axes[0], curves.items(), strict=True):
        for side, style in (("theirs", {"linewidth": 3, "alpha": 0.4}), ("ours", {"linewidth": 1})):
            runs = np.array_split(np.asarray(sides[side]), min(len(sides[side]), 200))
            ends = np.cumsum([len(run) for run in runs])
            axis.plot(ends, [run.mean() for run in runs], label=SIDES[side], **style)
        axis.set(title=stage, xlabel="step", ylabel="loss")
        axis.legend()
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    pyplot.close(figure)
    return out.getvalue()


def write(found: Comparison, about: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes `compare.md`, `compare.html` and, of a whole training, `compare.png`; returns their paths."""
    picture = loss_curves(found.curves) if found.curves else None
    contents = {"compare.md": markdown(found, about).encode(), "compare.html": html(found, about, picture).encode()}
    if picture is not None:
        contents["compare.png"] = picture
    for name, content in contents.items():
        with write_atomically(folder / name) as file:
            file.write(content)
    return [folder / name for name in contents]
