"""The evaluation of a work directory: every model on the same seeded users and candidates, tables, and the report."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from allmrec_jax.config import as_dict
from allmrec_jax.data.candidates import SEED_STREAM, draw_for_test
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import alignment, metrics, report
from allmrec_jax.evaluation.labels import MODEL_LABELS
from allmrec_jax.evaluation.rank import score_users
from allmrec_jax.pipeline import Pipeline
from allmrec_jax.training.cf import name_of
from allmrec_jax.training.checkpoint import claim_folder

BESIDE = ("llm-only", "cf", "popularity")  # what the injected LLM is compared with


def test_users(pipeline: Pipeline) -> np.ndarray:
    """The seeded test users: the first `evaluation.users` of a random order of all who have a test item."""
    dataset, wanted = pipeline.dataset, pipeline.experiment.evaluation.users
    users = np.flatnonzero(dataset.has_target("test"))
    if not len(users):
        raise UserError(f"{dataset.name}: no user has three items, so there is nothing to test on")
    order = np.random.default_rng([pipeline.experiment.seed, SEED_STREAM]).permutation(users)
    return order[:wanted]


def score_overall(pipeline: Pipeline) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(users, candidates, target column, scores of each model) of the scenario `overall`.

    Each user's test item stands among distinct items that the user never interacted with, in a seeded random order.
    """
    x, dataset = pipeline.experiment, pipeline.dataset
    config, prompt = x.evaluation, x.llm
    folder = pipeline.workdir / "evaluation"
    # The stages come first: their folders are claimed by the same check, before anything is scored.
    pipeline.heads  # noqa: B018
    claim_folder(folder, pipeline.identity("evaluation"))
    users = test_users(pipeline)
    candidates, column = draw_for_test(dataset, users, seed=x.seed, count=config.candidates)
    ends = dataset.history_end("test")[users]
    x_u = pipeline.cf.x_u(dataset.windows(ends, x.cf.maxlen, users), users)
    histories = [row[row != 0] for row in dataset.windows(ends, prompt.history, users)]

    scores = {
        "popularity": dataset.train_counts()[candidates].astype(np.float32),
        "cf": pipeline.cf.scores(x_u, candidates),
    }
    for name, heads in (("llm-only", None), (prompt.model, pipeline.heads)):
        scores[name] = score_users(
            pipeline.ranker(heads, candidates=config.candidates),
            histories,
            candidates,
            x_u,
            saved=folder / f"overall.{name}.npy",
            label=f"evaluation: {name}",
            batch=config.batch,
            console=pipeline.console,
        )
    scores["fused"] = metrics.mean_rank(scores["cf"], scores[prompt.model])
    return users, candidates, column, scores


def evaluate(pipeline: Pipeline) -> dict[str, Any]:
    """Runs the evaluation, writes `metrics.json` and `report.html`, and returns what `metrics.json` holds.

    If `metrics.json` is already that of this experiment, it is read and nothing is computed.
    """
    path = pipeline.workdir / "metrics.json"
    shown = {name: getattr(pipeline.experiment.evaluation, name) for name in ("resamples", "examples")}
    identity = json.loads(json.dumps(pipeline.identity("evaluation") | {"report": shown}))
    if path.is_file() and (pipeline.workdir / "report.html").is_file():
        try:
            found = json.loads(path.read_text())
            if found["about"]["identity"] == identity:
                return found
        except (ValueError, KeyError, TypeError):
            pipeline.console.print(f"{path} is damaged; evaluating again")
    x = pipeline.experiment
    start = time.perf_counter()
    users, candidates, column, scores = score_overall(pipeline)
    stage_1 = alignment.report(
        pipeline.aligned,
        pipeline.cf,
        pipeline.dataset,
        pipeline.workdir / "align",
        seed=x.seed,
        console=pipeline.console,
    )
    seconds = {**pipeline.seconds, "evaluation": time.perf_counter() - start - sum(pipeline.seconds.values())}
    options = {"seed": x.seed, "resamples": x.evaluation.resamples}
    scenario = metrics.summarise(scores, column, **options)
    pairs = [*((x.llm.model, other) for other in BESIDE), ("fused", "cf")]
    differences = metrics.differences(scores, column, pairs, **options)
    examples = make_examples(pipeline, users, candidates, column, scores)
    about = {
        "cf": name_of(x.cf),
        "labels": {"fused": f"{name_of(x.cf)} + {MODEL_LABELS[x.llm.model]} (mean rank)"},
        "candidates": x.evaluation.candidates,
        "data_name": pipeline.dataset.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "durations": seconds,
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("allmrec-jax", "jax", "flax", "optax", "orbax-checkpoint")},
        "experiment": as_dict(x),
        "identity": identity,
    }
    results = {
        "scenarios": {"overall": scenario},
        "differences": {"overall": differences},
        "alignment": stage_1,
        "examples": examples,
        "curves": pipeline.curves,
        "conclusion": conclude(pipeline, scenario, differences),
        "about": about,
    }
    write(pipeline.workdir, results)
    return results


def write(workdir: Path, results: dict[str, Any]) -> None:
    """Writes `report.html`, then `metrics.json`, each atomically."""
    about = {k: v for k, v in results["about"].items() if k != "identity"}
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
        alignment=alignment.for_page(results["alignment"], workdir / "align"),
    )
    rest = {k: v for k, v in results.items() if k != "scenarios"}
    report.write_metrics(workdir / "metrics.json", results["scenarios"], **rest)


def show(results: dict[str, Any], console: Console, workdir: Path) -> None:
    """Prints the tables, the examples and the conclusion."""
    about = results["about"]
    for name, scenario in results["scenarios"].items():
        n = scenario["cf"]["hit@1"]["n"]
        title = f"{name}: {n} users, {about['candidates']} candidates each, 95 % bootstrap intervals"
        console.print(
            report.metrics_table(scenario, tuple(scenario), about=about, candidates=about["candidates"], title=title)
        )
        console.print(report.differences_table(results["differences"][name], about=about, title="Paired differences"))
    console.print(report.examples_table(results["examples"], tuple(results["scenarios"]["overall"]), about=about))
    console.print(results["conclusion"])
    console.print(f"\nWritten: {workdir / 'metrics.json'} and {workdir / 'report.html'}")


def make_examples(
    pipeline: Pipeline, users: np.ndarray, candidates: np.ndarray, column: np.ndarray, scores: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """The first few test users (not chosen by result): history, true next item, and each model's first choice."""
    titles = ["No Title" if title is None else title for title in pipeline.dataset.titles()]
    prompt, dataset = pipeline.experiment.llm, pipeline.dataset
    examples = []
    for row in range(min(pipeline.experiment.evaluation.examples, len(users))):
        first = {name: int(np.argmax(scores[name][row])) for name in scores}
        examples.append(
            {
                "user": dataset.user_keys[users[row]],
                "history": [titles[i] for i in dataset.history(int(users[row]))[-prompt.history :]],
                "target": titles[candidates[row, column[row]]],
                "choices": {name: titles[candidates[row, choice]] for name, choice in first.items()},
                "hits": {name: bool(choice == column[row]) for name, choice in first.items()},
            }
        )
    return examples


def conclude(pipeline: Pipeline, scenario: dict[str, Any], differences: dict[str, Any]) -> str:
    """What a reader may conclude, in words that follow from the intervals."""
    x = pipeline.experiment
    cf, chance, ours = name_of(x.cf), metrics.chance(x.evaluation.candidates), MODEL_LABELS[x.llm.model]

    def compare(a: str, b: str, name: str) -> str:
        parts = []
        for metric, label in (("hit@1", "Hit@1"), ("ndcg@5", "NDCG@5")):
            d = differences[a][b][metric]
            verdict = "better" if d["low"] > 0 else "worse" if d["high"] < 0 else "not distinguishable"
            parts.append(f"{verdict} by {label} ({d['value']:+.3f}, 95 % interval {d['low']:+.3f} to {d['high']:+.3f})")
        return f"against {name}: {' and '.join(parts)}"

    n = scenario["cf"]["hit@1"]["n"]
    eligible = int(np.sum(pipeline.dataset.has_target("train")))
    shown = min(eligible, round(x.llm.epochs * eligible))
    text = (
        f"On {n} test users, {ours} {compare(x.llm.model, 'llm-only', 'the LLM given titles alone')}; "
        f"{compare(x.llm.model, 'cf', cf)}. Their mean-rank combination {compare('fused', 'cf', cf)}. "
        f"{ours} {compare(x.llm.model, 'popularity', 'popularity')}. "
        f"A random order gives Hit@1 {chance['hit@1']:.3f} and MRR {chance['mrr']:.3f}."
    )
    if x.llm.epochs < 1:
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
