"""The evaluation of a work directory: every model on the same seeded users and candidates, scenario by scenario."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from allmrec_jax.config import Injection
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import (
    alignment,
    baselines,
    beside,
    breakdown,
    cross_domain,
    full_catalogue,
    fused,
    genres,
    lists,
    present,
    scenarios,
    scores,
    written,
)
from allmrec_jax.evaluation.labels import ORDER, PAIRS
from allmrec_jax.evaluation.lists import Lists
from allmrec_jax.pipeline import Pipeline
from allmrec_jax.progress import say

TRIVIAL = baselines.NAMES  # in every table, whatever is asked for


@dataclass(frozen=True)
class Asked:
    """What is evaluated.

    on, wording: the other data set of `cross-domain`, and the domain whose words its prompt has.
    beside: work directories whose models join the tables.
    """

    scenarios: tuple[str, ...]
    models: tuple[str, ...]
    on: str | None = None
    wording: str | None = None
    beside: tuple[str, ...] = ()

    def with_(self, before: dict[str, Any]) -> Asked:
        """What is asked for now, and what was before."""
        return Asked(
            tuple(name for name in scenarios.NAMES if name in (*self.scenarios, *before["scenarios"])),
            tuple(name for name in ORDER if name in (*self.models, *before["models"])),
            self.on or before["on"],
            self.wording if self.on else before["wording"],
            tuple(dict.fromkeys((*before["beside"], *self.beside))),
        )


@dataclass
class Found:
    """What has been found so far, by scenario."""

    scenarios: dict[str, Any] = field(default_factory=dict)
    differences: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    not_applicable: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, figures: Any, differences: Any, facts: Any) -> None:
        self.scenarios[name], self.differences[name], self.facts[name] = figures, differences, facts


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
    pipeline: Pipeline,
    names: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    *,
    on: str | None = None,
    wording: str | None = None,
    beside: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs the scenarios that are named and writes `metrics.json`, `report.html` and the tables.

    Args:
      names: by default those that need no list of their own.
      models: by default those that go through the LLM once a user.
      on, wording, beside: see `Asked`.

    What `metrics.json` holds of this experiment already stays in it, figures of further scenarios and models are added;
    if nothing is missing, it is read and nothing is computed. Returns what it holds.
    """
    x = pipeline.experiment
    models = ("cf", "llm-only", x.llm.model, "fused") if models is None else models
    asked = Asked(scenarios.asked(names, x.data.few_shot), chosen_models(models, x.llm), on, wording, tuple(beside))
    identity = identity_of(pipeline, asked)
    before = read(pipeline, identity)
    if before is not None:
        asked = asked.with_(before["about"]["asked"])
        if json.loads(json.dumps(dataclasses.asdict(asked))) == before["about"]["asked"]:
            return before
        identity = identity_of(pipeline, asked)
    start = time.perf_counter()
    results = compute(pipeline, asked)
    seconds = {**pipeline.seconds, "evaluation": time.perf_counter() - start - sum(pipeline.seconds.values())}
    results["about"] |= {"durations": seconds, "asked": dataclasses.asdict(asked), "identity": identity}
    present.write(pipeline.workdir, results)
    return results


def identity_of(pipeline: Pipeline, asked: Asked) -> dict[str, Any]:
    """What the figures depend on; not on the LLM, where no model with it is asked for."""
    shown = ("users", "validation_users", "candidates", "score", "new_tokens", "resamples", "examples")
    through_llm = set(asked.models) - {*TRIVIAL, "cf"}
    found = pipeline.identity("evaluation" if through_llm else "cf")
    found["report"] = {name: getattr(pipeline.experiment.evaluation, name) for name in shown}
    return json.loads(json.dumps(found))


def read(pipeline: Pipeline, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What `metrics.json` holds, if it is there, whole, and of this experiment."""
    path = pipeline.workdir / "metrics.json"
    if not path.is_file() or not (pipeline.workdir / "report.html").is_file():
        return None
    try:
        found = json.loads(path.read_text())
        before, _ = found["about"]["identity"], found["about"]["asked"]["on"]
        return found if all(before[name] == identity[name] for name in before.keys() & identity.keys()) else None
    except (ValueError, KeyError, TypeError):
        pipeline.console.print(f"{path} is damaged; evaluating again")
        return None


def compute(pipeline: Pipeline, asked: Asked) -> dict[str, Any]:
    """All that `metrics.json` holds."""
    x, dataset = pipeline.experiment, pipeline.dataset
    options = {"seed": x.seed, "resamples": x.evaluation.resamples}
    found, scored = Found(), {}
    possible = [name for name in asked.scenarios if not _excluded(pipeline, name, asked, found)]
    here = [name for name in possible if name in scenarios.ROWS and not _trained_within(pipeline, name)]
    others = beside.names(asked.beside, x.llm)
    pairs = [*PAIRS, *((x.llm.model, name) for name in others if "@" in name)]
    fusion = learn_fusion(pipeline) if "fused" in asked.models and here else None
    for group in dict.fromkeys(scenarios.ROWS[name] for name in here):
        scored[group] = score_group(pipeline, group, asked.models, fusion, others)
    for name in here:
        of, of_models = scored[scenarios.ROWS[name]]
        for part, what in scenarios.parts(dataset, name, of).items():
            if not what.rows.any():
                found.not_applicable[part] = f"none of the {len(of.users):,} tested users' items is among them"
                continue
            figures, differences = scenarios.figures(of_models, of, what.rows, pairs, **options)
            repeats = int((of.repeats & what.rows).sum())
            facts = {"users": int(what.rows.sum()), "of": len(of.users), "repeats": repeats, **what.facts}
            found.add(part, figures, differences, facts | {"candidates": x.evaluation.candidates})
    for name in (name for name in possible if name not in here):
        elsewhere(pipeline, name, asked, found)
    ordered = scenarios.in_order(found.scenarios)
    injected = set(asked.models) & {*scores.INJECTED, "fused"}
    stages = ["cf", *["align"] * (x.llm.item_vectors == "e"), "llm"] if injected else ["cf"]
    results = {
        "scenarios": {name: found.scenarios[name] for name in ordered},
        "not_applicable": found.not_applicable,
        "facts": found.facts,
        "differences": found.differences,
        "curves": pipeline.curves(stages),
        "examples": present.make_examples(pipeline, *scored["test"]) if "test" in scored else [],
        "about": present.about(pipeline, others),
    }
    if isinstance(fusion, fused.Fusion):
        results["fusion"] = fusion.facts()
    elif fusion is not None:
        found.not_applicable["fused"] = fusion
    if "align" in stages:
        folder, how = pipeline.workdir / "align", {"seed": x.seed, "targets": x.align.targets}
        results["alignment"] = alignment.report(
            pipeline.aligned, pipeline.cf, dataset, folder, **how, console=pipeline.console
        )
    if "test" in scored:
        of, of_models = scored["test"]
        seen = dataset.train_counts()[of.targets]
        results["by_popularity"] = breakdown.by_popularity(of_models, of.column, seen, **options)
        some = {name: scores for name, scores in of_models.items() if name not in TRIVIAL}
        results["calibration"] = breakdown.calibration(some, of.column)
    results["conclusion"] = present.conclude(pipeline, results["scenarios"], found.differences)
    return results


def score_group(
    pipeline: Pipeline,
    group: str,
    models: Sequence[str],
    fusion: fused.Fusion | str | None,
    others: dict[str, str],
) -> tuple[Lists, dict[str, np.ndarray]]:
    """(the lists of a group, the scores of the models, in their order, and of those `beside`)."""
    of, own = draw_lists(pipeline, group), pipeline.experiment.llm.model
    found = scores.score(pipeline, of, dict.fromkeys((*models, *(("cf", own) if "fused" in models else ()))))
    if isinstance(fusion, fused.Fusion):
        found["fused"] = fusion(found["cf"], found[own], pipeline.dataset.train_counts()[of.candidates])
    found = {name: scores for name, scores in found.items() if name in models} | beside.scores(others, of)
    return of, {name: found[name] for name in (*ORDER, *others) if name in found}


def _trained_within(pipeline: Pipeline, name: str) -> bool:
    """Whether the scenario's models are others than those of this work directory."""
    return name.startswith("few-shot") and pipeline.experiment.data.few_shot is None


def _excluded(pipeline: Pipeline, name: str, asked: Asked, found: Found) -> bool:
    """Whether the scenario does not apply; the reason goes into `found`."""
    reason = cross_domain.why_not(asked.on) if name == "cross-domain" else scenarios.why_not(pipeline.dataset, name)
    if reason is not None:
        found.not_applicable[name] = reason
    return reason is not None


def elsewhere(pipeline: Pipeline, name: str, asked: Asked, found: Found) -> None:
    """A scenario that needs other models, other data, or another prompt, in a folder of the work directory."""
    resamples = pipeline.experiment.evaluation.resamples
    if name == "genres":
        users = draw_lists(pipeline, "test").users
        answer = genres.evaluate(pipeline, users, asked.models, PAIRS, resamples=resamples)
    elif name == "full-catalogue":
        users = draw_lists(pipeline, "test").users
        answer = full_catalogue.evaluate(pipeline, users, asked.models, resamples=resamples)
    elif name == "generated":
        answer = written.evaluate(pipeline, draw_lists(pipeline, "test"), asked.models, PAIRS, resamples=resamples)
    elif name == "cross-domain":
        answer = cross_domain.evaluate(pipeline, asked.on, asked.wording, asked.models, PAIRS)
    else:
        k = int(name.removeprefix("few-shot-"))
        other = pipeline.within(name, data=dataclasses.replace(pipeline.experiment.data, few_shot=k))
        say(pipeline.console, f"{name}: all stages on {k} users, in {other.workdir}")
        results = evaluate(other, (name,), asked.models)
        pipeline.seconds |= {f"{name}, {stage}": seconds for stage, seconds in other.seconds.items()}
        answer = tuple(results[part][name] for part in ("scenarios", "differences", "facts"))
    if isinstance(answer, str):
        found.not_applicable[name] = answer
    else:
        found.add(name, *answer)
