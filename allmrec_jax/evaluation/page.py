"""`report.html`: one self-contained page, from plain data to a string.

The page loads nothing, from the network or from disk: the style sheet and the charts are inside it, and its content
security policy forbids everything else. Every text that comes from outside (titles, names, settings) is escaped.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from allmrec_jax.evaluation.figures import bar_chart, curve_panel, line_chart, reliability_panel
from allmrec_jax.evaluation.labels import (
    COMPARED,
    METRIC_LABELS,
    NEW,
    OURS,
    SCENARIO_LABELS,
    SHOWN,
    clean,
    duration,
    hits,
    model_labels,
    p_text,
    scenario_title,
    signed,
)
from allmrec_jax.evaluation.metrics import chance

HOW_TO_READ = (
    "Each model orders the same candidates for the same users; exactly one of them is the item the user took next. "
    "Hit@k: the share of users whose item is among the first k. NDCG@5: as Hit@5, but items further down count less. "
    "MRR: the mean of 1 / place. In parentheses: the 95 % interval of a bootstrap over users."
)
HOW_TO_COMPARE = (
    "Differences are taken user by user before they are averaged, which is more telling than comparing two intervals "
    "above. In parentheses: the 95 % bootstrap interval. p: two-sided, from a paired sign-flip permutation test; no "
    "correction for looking at several pairs."
)
HOW_TO_CALIBRATE = (
    "Each candidate of each test user is a case: rightwards the probability that the softmax of the user's scores "
    "gives it, upwards how often such candidates are the item taken next. On the dashed line scores mean what they say;"
    " above it the model is too timid, below it too sure. Error: the mean distance to the line, over all cases."
)
HOW_TO_READ_PAPER = (
    "Hit@1. Ours with its 95 % interval; the paper's as it prints them, with OPT-6.7B and one positive among 20 "
    "candidates."
)
HOW_TO_ALIGN = (
    "Hit@1 among 20 candidates, of all test users, without a language model: f_I's decoder takes an item's e (from the "
    "CF model) or q (from its text) back to where the CF model's items stand. In the picture e and q are in one plane."
)
CURVES = ("fused", "popularity", "llm-only", "a-llmrec", "cf", "mlp-llm", "a-llmrec-q", "a-llmrec-mixed")  # by style
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
"""


def render(
    *,
    title: str,
    conclusion: str,
    scenarios: Mapping[str, Any],
    differences: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]],
    about: Mapping[str, Any],
    warnings: Sequence[str],
    facts: Mapping[str, Mapping[str, Any]],
    not_applicable: Mapping[str, str],
    alignment: Mapping[str, Any] | None,
    by_popularity: Mapping[str, Any] | None,
    calibration: Mapping[str, Any] | None,
    paper: Mapping[str, Any] | None,
) -> str:
    """The whole page. The arguments are those of `report.write_report`, as plain values."""
    labels = model_labels(about)
    parts = [HEAD.format(title=_text(title), style=Path(__file__).with_name("page.css").read_text("utf-8"))]
    parts.append(f"<header><h1>{_text(title)}</h1>{_subtitle(scenarios, about)}</header>")
    parts.append(f'<section class="conclusion" aria-label="Conclusion">{_paragraphs(conclusion)}</section>')
    if warnings:
        items = "".join(f"<li>{_text(warning)}</li>" for warning in warnings)
        parts.append(f'<aside class="warnings" role="note"><strong>Mind this</strong><ul>{items}</ul></aside>')
    for i, (name, scenario) in enumerate(scenarios.items()):
        candidates = about.get("candidates")
        candidates = candidates.get(name) if isinstance(candidates, Mapping) else candidates
        candidates = facts.get(name, {}).get("candidates", candidates)
        who = scenario_title(name, facts[name], candidates) if name in facts else None
        metrics = facts.get(name, {}).get("metrics", SHOWN)
        parts.append(_scenario(f"s{i}", name, scenario, differences.get(name) or {}, labels, candidates, who, metrics))
    for name, reason in not_applicable.items():
        parts.append(f"<section><h2>{_heading(name)}</h2><p>Not applicable: {_text(reason)}</p></section>")
    if by_popularity:
        parts.append(_by_popularity(by_popularity, labels))
    if paper:
        parts.append(_paper(paper, labels))
    if calibration:
        panels = "".join(reliability_panel(labels.get(m, clean(m)), found) for m, found in calibration.items())
        told = f'<p class="note">{_text(HOW_TO_CALIBRATE)}</p>'
        parts.append(f'<section><h2>Calibration</h2><div class="panels">{panels}</div>{told}</section>')
    if examples:
        parts.append(f"<section><h2>Example users</h2>{''.join(_example(e, labels) for e in examples)}</section>")
    if alignment:
        parts.append(_alignment(**alignment))
    if curves:
        parts.append(f"<section><h2>Training</h2>{''.join(_stage(*stage) for stage in curves.items())}</section>")
    parts.append(_facts(about))
    return "\n".join(parts) + "\n</main>\n</body>\n</html>\n"


def _text(value: object) -> str:
    return escape(clean(value))


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_text(part)}</p>" for part in text.split("\n\n") if part.strip())


def _heading(scenario: str) -> str:
    label = SCENARIO_LABELS.get(scenario)
    return f'{_text(label)} <small class="muted">{_text(scenario)}</small>' if label else _text(scenario)


def _subtitle(scenarios: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    facts = [about[key] for key in ("data_name", "date") if about.get(key)]
    return f'<p class="muted">{" · ".join(_text(fact) for fact in facts)}</p>' if facts else ""


def _scenario(
    name: str,
    key: str,
    scenario: Mapping[str, Any],
    pairs: Mapping[str, Any],
    labels: Mapping[str, str],
    candidates: Any,
    who: str | None = None,
    metrics: Sequence[str] = SHOWN,
) -> str:
    """Chart, table and paired differences of one scenario."""
    by_chance = chance(int(candidates)) if candidates else None
    users = sorted({figures["n"] for model in scenario.values() for figures in model.values()})
    told = f"{' to '.join(str(n) for n in dict.fromkeys([users[0], users[-1]]))} users" if users else "no users"
    told = who or told + (f", {candidates} candidates each" if candidates else "")
    bars = [(labels.get(m, clean(m)), v["hit@1"], m in OURS) for m, v in scenario.items() if "hit@1" in v]
    chart = bar_chart(bars, name=name, metric="Hit@1", chance=by_chance and by_chance["hit@1"]) if bars else ""
    tables = _table(scenario, labels, by_chance, metrics) + (_pair_table(pairs, labels) if pairs else "")
    return (
        f"<section><h2>{_heading(key)}</h2><p>Hit@1, {_text(told)}. Blue: A-LLMRec and its combinations; grey: "
        f"what it is compared with. The thin line at a bar's end spans its 95 % interval.</p>{chart}{tables}</section>"
    )


def _table(
    scenario: Mapping[str, Any],
    labels: Mapping[str, str],
    by_chance: Mapping[str, float] | None,
    metrics: Sequence[str],
) -> str:
    metrics = [m for m in metrics if any(m in model for model in scenario.values())]
    rows = []
    for model, figures in scenario.items():
        cells = "".join(_cell(figures.get(metric)) for metric in metrics)
        css = ' class="ours"' if model in OURS else ""
        rows.append(f"<tr role='row'{css}>{_row_head(model, labels)}{cells}</tr>")
    if by_chance:
        chances = [by_chance.get(metric.removeprefix(NEW)) for metric in metrics]
        cells = "".join(f"<td role='cell'>{'–' if c is None else f'{c:.3f}'}</td>" for c in chances)
        rows.append(f'<tr role="row" class="chance"><th role="rowheader" scope="row">Random order</th>{cells}</tr>')
    no_width = any(f["low"] == f["high"] for model in scenario.values() for m, f in model.items() if m in metrics)
    caution = " An interval without width means that all users came out alike, not certainty." if no_width else ""
    return _wide("All figures", ["Model", *(METRIC_LABELS[m] for m in metrics)], rows, HOW_TO_READ + caution)


def _pair_table(pairs: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    metrics = [m for m in COMPARED if any(m in figures for of_a in pairs.values() for figures in of_a.values())]
    rows = []
    for a, of_a in pairs.items():
        for b, figures in of_a.items():
            head = f"{_label(a, labels)} <span class='muted'>minus</span> {_label(b, labels)}"
            cells = "".join(_cell(figures.get(metric), difference=True) for metric in metrics)
            rows.append(f'<tr role="row"><th role="rowheader" scope="row">{head}</th>{cells}</tr>')
    return "<h3>Paired differences</h3>" + _wide(
        "Paired differences", ["Difference", *(METRIC_LABELS[m] for m in metrics)], rows, HOW_TO_COMPARE
    )


def _label(model: str, labels: Mapping[str, str]) -> str:
    """The model's label, not to be broken at the hyphen of A-LLMRec."""
    return _text(labels.get(model, model)).replace("A-LLMRec", '<span class="whole">A-LLMRec</span>')


def _row_head(model: str, labels: Mapping[str, str]) -> str:
    key = f'<span class="key">{_text(model)}</span>' if labels.get(model, model) != model else ""
    return f'<th role="rowheader" scope="row">{_label(model, labels)}{key}</th>'


def _cell(figures: Mapping[str, float] | None, *, difference: bool = False) -> str:
    """Value, interval and, for a difference, p."""
    if figures is None:
        return "<td role='cell'>–</td>"
    if not difference:
        return f"<td role='cell'>{figures['value']:.3f}<small>({figures['low']:.3f}–{figures['high']:.3f})</small></td>"
    ends = " to ".join(signed(figures[end]) for end in ("low", "high"))
    p = escape(p_text(figures["p_value"]))
    return f"<td role='cell'>{signed(figures['value'])}<small>({ends})</small><small>{p}</small></td>"


def _wide(name: str, columns: Sequence[str], rows: Sequence[str], caption: str) -> str:
    """A table of figures. On a phone its rows become boxes (page.css): hence the explicit roles. It can scroll too."""
    head = "".join(f'<th role="columnheader" scope="col">{_text(column)}</th>' for column in columns)
    return (
        f'<div class="wide" role="region" aria-label="{_text(name)}" tabindex="0"><table class="figures" role="table">'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(rows)}</tbody></table></div>'
        f'<p class="note">{_text(caption)}</p>'
    )


def _example(example: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """One user: what they took so far, what they took next, what each model would have said."""
    history = "".join(f"<li><bdi>{_text(t)}</bdi></li>" for t in example["history"]) or "<li>nothing yet</li>"
    rows = []
    for model, choice in example["choices"].items():
        hit = hits(example, model)
        mark = '<span class="hit">✓ hit</span>' if hit else '<span class="muted">miss</span>'
        rows.append(
            f'<tr><th scope="row">{_label(model, labels)}</th>'
            f'<td><bdi>{_text(choice)}</bdi></td><td class="mark">{mark}</td></tr>'
        )
    return (
        f'<article class="user"><h3>User {_text(example["user"])}</h3>'
        f'<p class="next"><span class="muted">Took next:</span> '
        f"<strong><bdi>{_text(example['target'])}</bdi></strong></p>"
        f'<div class="halves"><div><h4>History, oldest first</h4><ol>{history}</ol></div>'
        f"<div><h4>First choice of each model</h4><table>{''.join(rows)}</table></div></div></article>"
    )


def _by_popularity(found: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """Hit@1 from cold to warm targets: a chart, and the same as a table."""
    drawn = [name for name in CURVES if name in found["models"]]
    ticks = [f"{b['least']:,}" if b["least"] == b["most"] else f"{b['least']:,}–{b['most']:,}" for b in found["bins"]]
    lines = [(labels.get(name, clean(name)), found["models"][name]) for name in drawn]
    x = "training interactions of the test item"
    chart = line_chart(lines, ticks, name="pop", title=f"Hit@1 by {x}", x=x)
    rows = []
    for name, points in found["models"].items():
        css = ' class="ours"' if name in OURS else ""
        rows.append(f"<tr role='row'{css}>{_row_head(name, labels)}{''.join(map(_cell, points))}</tr>")
    columns = ["Model", *(f"{tick} ({b['users']:,} users)" for tick, b in zip(ticks, found["bins"], strict=True))]
    table = _wide("Hit@1 by popularity", columns, rows, "Hit@1 in bins of the test item's training interactions.")
    return (
        "<section><h2>From cold to warm items</h2>"
        f"{chart}<details><summary>The same as a table</summary>{table}</details></section>"
    )


def _paper(found: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """Our Hit@1 beside the paper's on each of its data sets."""
    rows = []
    for row in found["rows"]:
        head = f"{_text(row['scenario'])}, {_label(row['model'], labels)}"
        theirs = []
        for name, figure in zip(found["columns"], row["paper"], strict=True):
            shown = "–" if figure is None else f"{figure:.3f}"
            if figure is not None and name == found["same"]:
                shown += f"<small>ours {signed(row['ours']['value'] - figure)}</small>"
            theirs.append(f"<td role='cell'>{shown}</td>")
        rows.append(
            f"<tr role='row'><th role='rowheader' scope='row'>{head}</th>{_cell(row['ours'])}{''.join(theirs)}</tr>"
        )
    same = found["same"]
    told = HOW_TO_READ_PAPER + (
        f" Our data set is its {same}."
        if same
        else " Our data set is none of its own: only the pattern can be compared."
    )
    columns = ["Scenario, model", "Ours", *found["columns"]]
    return f"<section><h2>Beside the paper</h2>{_wide('Beside the paper', columns, rows, told)}</section>"


def _alignment(sentences: Sequence[str], columns: Mapping[str, str], ranking: Mapping[str, Any], picture: bytes) -> str:
    """What stage 1 by itself is worth."""
    told = "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    rows = []
    for scenario, models in ranking.items():
        cells = "".join(_cell(models[name]["hit@1"]) for name in columns)
        users = f'<span class="key">{models["cf"]["hit@1"]["n"]:,} users</span>'
        rows.append(f'<tr role="row"><th role="rowheader" scope="row">{_text(scenario)}{users}</th>{cells}</tr>')
    table = _wide("Ranking by embeddings", ["Test items", *columns.values()], rows, HOW_TO_ALIGN) if rows else ""
    image = f'<img alt="e and q of items in one plane" src="data:image/png;base64,{b64encode(picture).decode()}">'
    return f"<section><h2>Joint embeddings of stage 1</h2><ul>{told}</ul>{table}{image}</section>"


def _stage(stage: str, curves: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> str:
    panels = "".join(curve_panel(clean(stage), clean(name), *curve) for name, curve in curves.items())
    return f'<h3>{_text(stage)}</h3><div class="panels">{panels}</div>'


def _facts(about: Mapping[str, Any]) -> str:
    """Everything in `about`: single facts in one table, each group of facts behind its own heading."""
    single = {key: value for key, value in about.items() if not isinstance(value, Mapping)}
    groups = {key: value for key, value in about.items() if isinstance(value, Mapping)}
    parts = [_fact_table({_spaced(key): value for key, value in _flat(single).items()})] if single else []
    for key, group in groups.items():
        told = (
            {k: duration(v) if isinstance(v, int | float) else v for k, v in group.items()}
            if key == "durations"
            else group
        )
        opened = " open" if key in ("durations", "hardware", "seeds") else ""
        parts.append(f"<details{opened}><summary>{_text(_spaced(key))}</summary>{_fact_table(_flat(told))}</details>")
    return f"<section><h2>The run</h2>{''.join(parts)}</section>"


def _fact_table(facts: Mapping[str, Any]) -> str:
    rows = "".join(f'<tr><th scope="row">{_text(k)}</th><td>{_text(v)}</td></tr>' for k, v in facts.items())
    return f'<table class="facts">{rows}</table>'


def _spaced(key: str) -> str:
    """A key as a heading: `data_fingerprint` -> `Data fingerprint`."""
    return "CF model" if key == "cf" else (key[:1].upper() + key[1:]).replace("_", " ")


def _flat(group: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists on one line."""
    flat: dict[str, Any] = {}
    for key, value in group.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return flat
