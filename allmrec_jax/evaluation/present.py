"""What an evaluation says: its files, its tables on the terminal, example users, and a conclusion in words."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from rich.console import Console

from allmrec_jax.config import as_dict
from allmrec_jax.evaluation import alignment, baselines, labels, metrics, paper, report, scenarios, tables
from allmrec_jax.evaluation.lists import Lists
from allmrec_jax.files import write_atomically
from allmrec_jax.pipeline import Pipeline
from allmrec_jax.training.cf import name_of

WIDE = 110  # columns of a terminal that has room for all of `labels.SHOWN`
SHOWN_EXAMPLES = 5  # on the terminal; the page has them all


def about(pipeline: Pipeline, beside: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """What the figures are of, with the work directories of the models `beside`."""
    x = pipeline.experiment
    named = {"fused": f"{name_of(x.cf)} + {labels.MODEL_LABELS[x.llm.model]}"}
    for name in (name for name in beside if "@" in name):
        model, _, folder = name.partition("@")
        named[name] = f"{labels.MODEL_LABELS[model]} ({folder})"
    return {
        "cf": name_of(x.cf),
        "labels": named,
        "beside": dict(beside),
        "candidates": x.evaluation.candidates,
        "data_name": pipeline.dataset.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("allmrec-jax", "jax", "flax", "optax", "orbax-checkpoint")},
        "experiment": as_dict(x),
    }


def write(workdir: Path, results: dict[str, Any]) -> None:
    """Writes `report.html`, `metrics.csv` and `metrics.tex`, then `metrics.json`, each atomically."""
    about = {k: v for k, v in results["about"].items() if k not in ("identity", "asked")}
    stage_1 = results.get("alignment")
    report.write_report(
        workdir / "report.html",
        title=f"A-LLMRec: {about['experiment']['name']}",
        conclusion=results["conclusion"],
        scenarios=results["scenarios"],
        differences=results["differences"],
        examples=results["examples"],
        curves={
            stage: {name: tuple(np.asarray(points, float).T) for name, points in curves.items()}
            for stage, curves in results["curves"].items()
        },
        about=about,
        warnings=[],
        facts=results["facts"],
        not_applicable=results["not_applicable"],
        alignment=stage_1 and alignment.for_page(stage_1, workdir / "align"),
        by_popularity=results.get("by_popularity"),
        calibration=results.get("calibration"),
        paper=paper.table(results["scenarios"], cf=about["cf"], data_name=about["data_name"]),
    )
    for name, text in (
        ("metrics.csv", tables.to_csv(results["scenarios"])),
        ("metrics.tex", tables.to_latex(results["scenarios"], results["facts"], about)),
    ):
        with write_atomically(workdir / name) as file:
            file.write(text.encode())
    rest = {k: v for k, v in results.items() if k != "scenarios"}
    report.write_metrics(workdir / "metrics.json", results["scenarios"], **rest)


def show(results: dict[str, Any], console: Console, workdir: Path) -> None:
    """Prints the tables, the examples and the conclusion."""
    about = results["about"]
    for name, scenario in results["scenarios"].items():
        candidates = results["facts"][name]["candidates"]
        title = labels.scenario_title(name, results["facts"][name], candidates)
        shown = labels.SHOWN if console.width >= WIDE else labels.SHOWN[:-1]
        shown = results["facts"][name].get("metrics", shown)
        options = {"about": about, "candidates": candidates, "title": title, "metrics": shown}
        console.print(report.metrics_table(scenario, tuple(scenario), **options))
        console.print(report.differences_table(results["differences"][name], about=about, title="Paired differences"))
    for name, reason in results["not_applicable"].items():
        console.print(f"{name}: not applicable: {reason}", markup=False)
    if examples := results["examples"][:SHOWN_EXAMPLES]:
        console.print(report.examples_table(examples, tuple(examples[0]["choices"]), about=about))
    console.print(results["conclusion"])
    console.print(f"\nWritten: {workdir / 'metrics.json'} and {workdir / 'report.html'}")


def make_examples(pipeline: Pipeline, of: Lists, found: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The first few test users (not chosen by result): history, true next item, and each model's first choice."""
    titles = ["No Title" if title is None else title for title in pipeline.dataset.titles()]
    examples = []
    for row in range(min(pipeline.experiment.evaluation.examples, len(of.users))):
        shown = {name: scores for name, scores in found.items() if name not in baselines.NAMES[1:]}
        first = {name: int(np.argmax(scores[row])) for name, scores in shown.items()}
        user = int(of.users[row])
        examples.append(
            {
                "user": pipeline.dataset.user_keys[user],
                "history": [titles[i] for i in pipeline.dataset.history(user)[-pipeline.experiment.llm.history :]],
                "target": titles[of.targets[row]],
                "choices": {name: titles[of.candidates[row, choice]] for name, choice in first.items()},
                "hits": {name: bool(choice == of.column[row]) for name, choice in first.items()},
            }
        )
    return examples


def conclude(pipeline: Pipeline, figures: dict[str, Any], differences: dict[str, Any]) -> str:
    """What a reader may conclude, in words that follow from the intervals."""
    x = pipeline.experiment
    named = {**labels.model_labels(about(pipeline)), "llm-only": "the LLM given titles alone"}

    def compare(a: str, b: str, pairs: dict[str, Any]) -> str:
        parts = []
        for metric, label in (("hit@1", "Hit@1"), ("ndcg@5", "NDCG@5")):
            if metric not in pairs[a][b]:
                continue
            d = pairs[a][b][metric]
            verdict = "better" if d["low"] > 0 else "worse" if d["high"] < 0 else "not distinguishable"
            parts.append(f"{verdict} by {label} ({d['value']:+.3f}, 95 % interval {d['low']:+.3f} to {d['high']:+.3f})")
        return f"against {named.get(b, b)}: {' and '.join(parts)}"

    chance, compared = metrics.chance(x.evaluation.candidates), ("llm-only", "cf", x.llm.model)
    sentences = []
    for name, pairs in differences.items():
        if name.endswith(scenarios.BY_RULE):
            continue
        told = [
            f"{named[a]} {'; '.join(compare(a, b, pairs) for b in compared if b in pairs[a])}."
            for a in (x.llm.model, "fused")
            if set(pairs.get(a, ())) & set(compared)
        ]
        if told:
            n = max(figures[name][a]["hit@1"]["n"] for a in figures[name])
            sentences.append(f"{name}, {n:,} test users: {' '.join(told)}")
    sentences.append(f"A random order gives Hit@1 {chance['hit@1']:.3f} and MRR {chance['mrr']:.3f}.")
    text = "\n\n".join(sentences)
    if x.llm.epochs < 1 and x.llm.model in differences.get("overall", ()):
        eligible = int(np.sum(pipeline.dataset.has_target("train")))
        shown = min(eligible, round(x.llm.epochs * eligible))
        text += (
            f"\n\nThe heads F_U and F_I saw {shown} of {eligible} users once, through an LLM of "
            f"{parameters(pipeline) / 1e6:,.0f}M parameters. So short a training shows whether the injected embeddings "
            "carry anything that titles do not; it does not show what the method can reach. The paper trains for 5 "
            f"epochs on 9,930 to 297,498 users through OPT-6.7B, {6.7e9 / parameters(pipeline):,.0f} times this LLM."
        )
    if x.name == "demo":
        text += (
            " `make demo-full` trains on every user, two and a half times, and tests on all of them: three times the "
            "examples, and narrower intervals."
        )
    return text


def parameters(pipeline: Pipeline) -> int:
    """Number of parameters of the frozen LLM."""
    return pipeline.llm.parameters()


def hardware() -> dict[str, Any]:
    """What this ran on."""
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
