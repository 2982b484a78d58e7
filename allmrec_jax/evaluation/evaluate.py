"""The evaluation of a work directory: every model on the same seeded users and candidates, tables, and the report."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from allmrec_jax.config import Injection, as_dict
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import (
    alignment,
    baselines,
    breakdown,
    fused,
    labels,
    lists,
    metrics,
    paper,
    report,
    scenarios,
    scores,
    tables,
)
from allmrec_jax.evaluation.lists import Lists
from allmrec_jax.files import write_atomically
from allmrec_jax.pipeline import Pipeline
from allmrec_jax.progress import say
from allmrec_jax.training.cf import name_of

TRIVIAL = baselines.NAMES  # in every table, whatever is asked for
ORDER = (*TRIVIAL, "cf", "llm-only", "mlp-llm", "a-llmrec", "a-llmrec-q", "a-llmrec-mixed", "fused")
WIDE = 110  # columns of a terminal that has room for all of `labels.SHOWN`
SHOWN_EXAMPLES = 5  # on the terminal; the page has them all
PAIRS = (
    ("a-llmrec", "llm-only"),
    ("a-llmrec", "mlp-llm"),
    ("a-llmrec", "cf"),
    ("a-llmrec", "popularity"),
    ("mlp-llm", "llm-only"),
    ("mlp-llm", "cf"),
    ("mlp-llm", "popularity"),
    ("a-llmrec-q", "a-llmrec"),
    ("a-llmrec-mixed", "a-llmrec"),
    ("fused", "cf"),
    ("fused", "a-llmrec"),
    ("fused", "mlp-llm"),
    ("cf", "leak-check"),
)


def chosen_models(names: Iterable[str], llm: Injection) -> tuple[str, ...]:
    """The models that the names mean in a work directory with this LLM, the trivial ones with them; `all` is each.

    Raises:
      UserError: for a name that is none, or that this work directory does not have.
    """
    names, texts = list(names), ("a-llmrec-q", "a-llmrec-mixed")
    there = ("cf", "llm-only", llm.model, *(texts if llm.item_vectors == "e" else ()), "fused")
    for name in names:
        if name not in (*TRIVIAL, *there, "all"):
            what = f"llm.item_vectors is {llm.item_vectors}" if name in ORDER else "no such name is known"
            raise UserError(f"there is no model {name!r} here ({what}); choose among {', '.join(there)}, or all")
    names = there if "all" in names else names
    return tuple(name for name in ORDER if name in (*TRIVIAL, *names))


def draw_lists(pipeline: Pipeline, group: str) -> Lists:
    """The lists of a group, as many as the config asks for."""
    x = pipeline.experiment
    most = x.evaluation.validation_users if group == "validation" else x.evaluation.users
    return lists.draw(pipeline.dataset, group, seed=x.seed, most=most, candidates=x.evaluation.candidates)


def learn_fusion(pipeline: Pipeline) -> fused.Fusion | str:
    """What `fused` learns from validation users, or why it cannot."""
    x, dataset = pipeline.experiment, pipeline.dataset
    if x.cf.refit:
        return "the CF model was trained on the validation items, too (cf.refit), so none are left to learn from"
    if x.evaluation.validation_users == 0:
        return "evaluation.validation_users is 0"
    of = draw_lists(pipeline, "validation")
    found = scores.score(pipeline, of, ("cf", x.llm.model))
    counts = dataset.train_counts()
    groups = {
        name: np.isin(of.targets, dataset.scenario(f"{name}-items").items)
        if scenarios.why_not(dataset, f"{name}-items") is None
        else np.zeros(len(of.users), bool)
        for name in ("cold", "warm")
    }
    return fused.learn(
        found["cf"], found[x.llm.model], counts[of.candidates], of.column, **groups, all_counts=counts[1:]
    )


def evaluate(
    pipeline: Pipeline, names: Sequence[str] | None = None, models: Sequence[str] | None = None
) -> dict[str, Any]:
    """Runs the scenarios that are named and writes `metrics.json` and `report.html`.

    Args:
      names: by default those that need no list of their own.
      models: by default those that go through the LLM once a user.

    What `metrics.json` holds of this experiment already stays in it, figures of further scenarios and models are added;
    if nothing is missing, it is read and nothing is computed. Returns what it holds.
    """
    x = pipeline.experiment
    models = ("cf", "llm-only", x.llm.model, "fused") if models is None else models
    names, models = scenarios.asked(names, x.data.few_shot), chosen_models(models, x.llm)
    shown = {name: getattr(x.evaluation, name) for name in ("users", "validation_users", "resamples", "examples")}
    identity = json.loads(json.dumps(pipeline.identity("evaluation") | {"report": shown}))
    before = read(pipeline, identity)
    if before is not None:
        names = tuple(name for name in scenarios.NAMES if name in (*names, *before["about"]["asked"]["scenarios"]))
        models = tuple(name for name in ORDER if name in (*models, *before["about"]["asked"]["models"]))
        if {"scenarios": list(names), "models": list(models)} == before["about"]["asked"]:
            return before
    start = time.perf_counter()
    results = compute(pipeline, names, models)
    seconds = {**pipeline.seconds, "evaluation": time.perf_counter() - start - sum(pipeline.seconds.values())}
    results["about"] |= {
        "durations": seconds,
        "asked": {"scenarios": list(names), "models": list(models)},
        "identity": identity,
    }
    write(pipeline.workdir, results)
    return results


def read(pipeline: Pipeline, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What `metrics.json` holds, if it is there, whole, and of this experiment."""
    path = pipeline.workdir / "metrics.json"
    if not path.is_file() or not (pipeline.workdir / "report.html").is_file():
        return None
    try:
        found = json.loads(path.read_text())
        return found if found["about"]["identity"] == identity and found["about"]["asked"]["models"] else None
    except (ValueError, KeyError, TypeError):
        pipeline.console.print(f"{path} is damaged; evaluating again")
        return None


def compute(pipeline: Pipeline, names: Sequence[str], models: Sequence[str]) -> dict[str, Any]:
    """All that `metrics.json` holds."""
    x, dataset = pipeline.experiment, pipeline.dataset
    options = {"seed": x.seed, "resamples": x.evaluation.resamples}
    not_applicable = {name: why for name in names if (why := scenarios.why_not(dataset, name)) is not None}
    possible = [name for name in names if name not in not_applicable]
    elsewhere = [name for name in possible if name.startswith("few-shot") and x.data.few_shot is None]
    here = [name for name in possible if name not in elsewhere]
    scored: dict[str, tuple[Lists, dict[str, np.ndarray]]] = {}
    fusion = learn_fusion(pipeline) if "fused" in models and here else None
    for group in dict.fromkeys(scenarios.ROWS[name] for name in here):
        of = draw_lists(pipeline, group)
        more = ("cf", x.llm.model) if "fused" in models else ()
        found = scores.score(pipeline, of, dict.fromkeys((*models, *more)))
        if isinstance(fusion, fused.Fusion):
            found["fused"] = fusion(found["cf"], found[x.llm.model], dataset.train_counts()[of.candidates])
        scored[group] = of, {name: found[name] for name in ORDER if name in found and name in models}

    figures: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for name in here:
        of, found = scored[scenarios.ROWS[name]]
        for part, what in scenarios.parts(dataset, name, of).items():
            if not what.rows.any():
                not_applicable[part] = f"none of the {len(of.users):,} tested users' items is among them"
                continue
            figures[part], differences[part] = scenarios.figures(found, of, what.rows, PAIRS, **options)
            repeats = int((of.repeats & what.rows).sum())
            facts[part] = {"users": int(what.rows.sum()), "of": len(of.users), "repeats": repeats, **what.facts}
    for name in elsewhere:
        other = trained_within(pipeline, name, models)
        for known, part in ((figures, "scenarios"), (differences, "differences"), (facts, "facts")):
            known |= other[part]
    figures = {name: figures[name] for name in order_of(figures)}
    trained = set(models) & {*scores.INJECTED, "fused"}
    stages = ["cf", *["align"] * (x.llm.item_vectors == "e"), "llm"] if trained else ["cf"]
    results = {
        "scenarios": figures,
        "not_applicable": not_applicable,
        "facts": facts,
        "differences": differences,
        "curves": pipeline.curves(stages),
        "examples": make_examples(pipeline, *scored["test"]) if "test" in scored else [],
        "about": about(pipeline),
    }
    if isinstance(fusion, fused.Fusion):
        results["fusion"] = fusion.facts()
    elif fusion is not None:
        results["not_applicable"]["fused"] = fusion
    if "align" in stages:
        folder, how = pipeline.workdir / "align", {"seed": x.seed, "targets": x.align.targets}
        results["alignment"] = alignment.report(
            pipeline.aligned, pipeline.cf, dataset, folder, **how, console=pipeline.console
        )
    if "test" in scored:
        of, found = scored["test"]
        seen = dataset.train_counts()[of.targets]
        results["by_popularity"] = breakdown.by_popularity(found, of.column, seen, **options)
        some = {name: scores for name, scores in found.items() if name not in TRIVIAL}
        results["calibration"] = breakdown.calibration(some, of.column)
    results["conclusion"] = conclude(pipeline, figures, differences)
    return results


def trained_within(pipeline: Pipeline, name: str, models: Sequence[str]) -> dict[str, Any]:
    """The evaluation of a scenario whose models are trained otherwise, in a folder of the work directory."""
    k = int(name.removeprefix("few-shot-"))
    other = pipeline.within(name, data=dataclasses.replace(pipeline.experiment.data, few_shot=k))
    say(pipeline.console, f"{name}: all stages on {k} users, in {other.workdir}")
    found = evaluate(other, (name,), models)
    pipeline.seconds |= {f"{name}, {stage}": seconds for stage, seconds in other.seconds.items()}
    return found


def order_of(figures: Iterable[str]) -> list[str]:
    """Scenarios in the order of `scenarios.NAMES`, each with those beside it."""
    places = {name: place for place, name in enumerate(scenarios.NAMES)}
    return sorted(figures, key=lambda name: (places[name.removesuffix(scenarios.BY_RULE)], name))


def about(pipeline: Pipeline) -> dict[str, Any]:
    """What the figures are of."""
    x = pipeline.experiment
    return {
        "cf": name_of(x.cf),
        "labels": {"fused": f"{name_of(x.cf)} + {labels.MODEL_LABELS[x.llm.model]}"},
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
        title = labels.scenario_title(name, results["facts"][name], about["candidates"])
        shown = labels.SHOWN if console.width >= WIDE else labels.SHOWN[:-1]
        options = {"about": about, "candidates": about["candidates"], "title": title, "metrics": shown}
        console.print(report.metrics_table(scenario, ORDER, **options))
        console.print(report.differences_table(results["differences"][name], about=about, title="Paired differences"))
    for name, reason in results["not_applicable"].items():
        console.print(f"{name}: not applicable: {reason}", markup=False)
    if results["examples"]:
        console.print(report.examples_table(results["examples"][:SHOWN_EXAMPLES], ORDER, about=about))
    console.print(results["conclusion"])
    console.print(f"\nWritten: {workdir / 'metrics.json'} and {workdir / 'report.html'}")


def make_examples(pipeline: Pipeline, of: Lists, found: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The first few test users (not chosen by result): history, true next item, and each model's first choice."""
    titles = ["No Title" if title is None else title for title in pipeline.dataset.titles()]
    examples = []
    for row in range(min(pipeline.experiment.evaluation.examples, len(of.users))):
        shown = {name: scores for name, scores in found.items() if name not in TRIVIAL[1:]}
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
