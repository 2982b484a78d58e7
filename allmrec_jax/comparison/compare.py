"""`allmrec compare`: every stage of this program against PyTorch, number by number.

The same weights and the same batches go through both, in float32, dropout off. PyTorch makes its own x_u, e and Q from
those weights all the way, so that what differs early shows later, too. Where a check fails, the forward passes of that
stage are walked through to the first part at which they do not agree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from allmrec_jax.comparison import checks, stage_align, stage_cf, stage_llm
from allmrec_jax.comparison.checks import TOLERANCES, Check, Trace, check, check_order, check_runs
from allmrec_jax.comparison.exporting import trained_stages
from allmrec_jax.comparison.stage_llm import Asked, Inputs
from allmrec_jax.data.prompts import PromptBuilder
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import lists, metrics
from allmrec_jax.models import collaborative, params
from allmrec_jax.models.llm.load import FrozenLLM, load_llm
from allmrec_jax.pipeline import Pipeline
from allmrec_jax.progress import progress
from allmrec_jax.training import align, brought, inject, mesh
from allmrec_jax.training.cf import CFModel

TEXTS, MOST_USERS = 32, 512


@dataclass
class Comparison:
    """What was found: checks, the metrics of both programs by stage, and what a reader should know."""

    checks: list[Check] = field(default_factory=list)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Of whole trainings: stage -> side -> the loss of each step."""

    @property
    def passed(self) -> bool:
        return all(entry.passed for entry in self.checks)


class Parts:
    """The parts of a work directory: trained ones, and initial ones where a stage has not been trained."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline, self.x = pipeline, pipeline.experiment
        self.trained = trained_stages(pipeline.workdir)

    @functools.cached_property
    def cf(self) -> CFModel:
        if "cf" in self.trained:
            return CFModel(self.pipeline.cf.config, jax.device_get(self.pipeline.cf.params), self.pipeline.cf.fold_in)
        config, dataset = self.x.cf, self.pipeline.dataset
        if config.model == "given":
            raise UserError("cf.model given trains nothing: compare a work directory that was trained")
        c = brought.configure(config, dataset, self.pipeline.workdir / "cf")
        tree = params.init(jax.random.key(self.x.seed), collaborative.module_of(c).describe(c))
        return CFModel(c, jax.device_get(tree))

    @functools.cached_property
    def aligned(self) -> Any:
        """f_I, f_T and, if it is trained, the encoder."""
        if "align" in self.trained:
            return jax.device_get(self.pipeline.aligned.parameters)
        return jax.device_get(self.begin.trained)

    @functools.cached_property
    def begin(self) -> align.SetUp:
        config = stage_align.plain(self.x.align)
        return align.set_up(config, self.pipeline.dataset, self.cf, self.pipeline.encoder, seed=self.x.seed)

    @functools.cached_property
    def trained_heads(self) -> Any:
        """F_U and F_I of the work directory; None if they are not there yet."""
        if "llm" not in self.trained:
            return None
        heads = jax.device_get(self.pipeline.heads)
        self.pipeline.__dict__.pop("llm", None)  # it may be in another precision, and is loaded anew
        return heads

    @functools.cached_property
    def llm(self) -> FrozenLLM:
        """In float32 on one device."""
        self.trained_heads  # noqa: B018, first: two LLMs at once may be too many
        return load_llm(self.pipeline.llm_folder, dtype=jnp.float32, mesh=mesh.make_mesh(1, 1))

    @functools.cached_property
    def examples(self) -> tuple[inject.Examples, jax.Array]:
        return stage_llm.examples_of(self.x.llm, self.pipeline.dataset, self.llm, seed=self.x.seed)

    def heads(self, inputs: Inputs) -> Any:
        """F_U and F_I, trained or as they start."""
        if self.trained_heads is not None:
            return self.trained_heads
        table = self.llm.weights["weights"]["embed"]
        start = self.examples[1], jnp.asarray(inputs.x_u), jnp.asarray(inputs.table[1:]), table
        return jax.device_get(inject.init_heads(*start, self.x.llm.init))


class Users:
    """The test users whose candidates are ranked: as many as asked for, of the evaluation's order."""

    def __init__(self, parts: Parts, count: int):
        x, dataset = parts.x, parts.pipeline.dataset
        found = lists.draw(dataset, "test", seed=x.seed, most=count, candidates=x.evaluation.candidates)
        self.ids, self.candidates, self.column = found.users, found.candidates, found.column
        ends = dataset.history_end("test")[self.ids]
        self.windows = dataset.windows(ends, parts.cf.config.maxlen, self.ids)
        self.asked = Asked([row[row != 0] for row in dataset.windows(ends, x.llm.history, self.ids)], self.candidates)


def compare(
    pipeline: Pipeline, *, steps: int = 5, users: int = 8, stages: tuple[str, ...] = ("cf", "align", "llm")
) -> Comparison:
    """All checks.

    Args:
      steps: optimiser steps of each stage.
      users: whose candidates the LLM ranks on both sides; the CF models rank for up to 512.

    Raises:
      UserError: for a work directory or an experiment that cannot be read.
    """
    found, parts = Comparison(), Parts(pipeline)
    untrained = [stage for stage in stages if stage not in parts.trained]
    if untrained:
        found.notes.append(f"not trained, so compared with initial weights: {', '.join(untrained)}")
    run: dict[str, Callable[[Comparison, Parts, int, int], None]] = {"cf": _cf, "align": _align, "llm": _llm}
    with progress("comparing", len(stages), unit="stages", console=pipeline.console) as bar:
        for done, stage in enumerate(stages):
            run[stage](found, parts, steps, users)
            bar.update(done + 1)
    return found


def versions() -> dict[str, str]:
    """Of what computes on either side."""
    return {name: version(name) for name in ("jax", "torch", "transformers")}


def _explain(made: list[Check], trace: Callable[[], Trace]) -> list[Check]:
    """The checks, those that failed with the first part at which the forward passes part."""
    if all(entry.passed for entry in made):
        return made
    where = checks.first_parting(trace(), TOLERANCES["output"]) or "none: the forward passes agree"
    return [entry if entry.passed else Check(**asdict(entry) | {"parts": where}) for entry in made]


def check_metrics(
    name: str, scores: dict[str, np.ndarray], column: np.ndarray, seed: int
) -> tuple[Check, dict[str, Any]]:
    """Whether each metric of ours lies within PyTorch's interval, and the other way round. `max_rel` is the largest
    difference in units of what an interval allows."""
    summary = metrics.summarise(scores, column, seed=seed, resamples=1000)
    largest = share = 0.0
    for metric, a in summary["ours"].items():
        b = summary["theirs"][metric]
        gap = abs(a["value"] - b["value"])
        low, high = (a, b) if a["value"] < b["value"] else (b, a)
        room = min(low["high"] - low["value"], high["value"] - high["low"])
        largest = max(largest, gap)
        share = max(share, gap / room if room > 0 else (0.0 if gap == 0 else float("inf")))
    return Check(name, largest, share, 1.0, share <= 1.0), summary


def _their_x_u(parts: Parts, windows: np.ndarray, users: np.ndarray, parameters: Any = None) -> np.ndarray:
    c = parts.cf.config
    if not isinstance(c, stage_cf.COMPARED):
        return parts.cf.x_u(windows, users)
    return stage_cf.representation(c, parts.cf.params if parameters is None else parameters, windows, users)


def _cf(found: Comparison, parts: Parts, steps: int, _: int) -> None:
    cf, c, x, dataset = parts.cf, parts.cf.config, parts.x, parts.pipeline.dataset
    if not isinstance(c, stage_cf.COMPARED):
        found.notes.append(f"stage 0: {x.cf.model} has no counterpart in PyTorch; its x_u is used on both sides")
        return
    asked = Users(parts, MOST_USERS)
    x_u = cf.x_u(asked.windows, asked.ids), stage_cf.representation(c, cf.params, asked.windows, asked.ids)
    scores = {
        "ours": cf.scores(x_u[0], asked.candidates),
        "theirs": stage_cf.scores(c, cf.params, x_u[1], asked.ids, asked.candidates),
    }
    runs = [run(x.cf, c, cf.params, dataset, seed=x.seed, steps=steps) for run in (stage_cf.ours, stage_cf.theirs)]
    of_metrics, found.metrics["stage 0"] = check_metrics("stage 0: metrics", scores, asked.column, x.seed)
    made = [
        check("stage 0: x_u", "output", *x_u),
        check("stage 0: scores of candidates", "score", scores["ours"], scores["theirs"]),
        check_order("stage 0: ranking", scores["ours"], scores["theirs"]),
        *check_runs("stage 0", *runs, steps),
        of_metrics,
    ]
    found.checks += _explain(made, lambda: stage_cf.trace(c, cf.params, cf.params, asked.windows[:64]))


def _align(found: Comparison, parts: Parts, steps: int, _: int) -> None:
    config, dataset, cf, encoder, seed = (
        parts.x.align,
        parts.pipeline.dataset,
        parts.cf,
        parts.pipeline.encoder,
        parts.x.seed,
    )
    begin, trained = parts.begin, parts.aligned
    steps = steps if config.train_encoder else min(steps, len(begin.steps.spans))
    users, ends, _positives = dataset.examples(config.targets, single=config.single_items)
    x_u = _their_x_u(parts, dataset.windows(ends, cf.config.maxlen, users), users)
    items, E = np.unique(begin.drawing["positives"])[:TEXTS], np.asarray(cf.E)
    modules = stage_align.baseline(encoder.config, trained, encoder.weights["weights"])
    ours = stage_align.our_tables(begin, encoder, trained, E, items)
    theirs = stage_align.tables(begin, modules, E, items)
    options = {"seed": seed, "steps": steps}
    runs = (
        stage_align.ours(config, dataset, cf, encoder, trained, **options),
        stage_align.theirs(config, dataset, cf, encoder, trained, x_u, **options),
    )
    made = [check(f"stage 1: {name}", "output", ours[name], theirs[name]) for name in ("Q", "q", "e")]
    made += check_runs("stage 1", *runs, steps)

    def trace() -> Trace:
        def heads() -> list[tuple[str, Any, Any]]:
            return [("f_I's e", ours["e"], theirs["e"]), ("f_T's q", ours["q"], theirs["q"])]

        return [*stage_align.trace(begin, encoder, trained, trained, items), heads]

    found.checks += _explain(made, trace)


def inputs_of(parts: Parts, x_u: np.ndarray, E: np.ndarray, e: np.ndarray | None) -> Inputs:
    """What the heads read on one side: x_u, and e of that side unless the experiment puts another in its place."""
    x, model = parts.x, CFModel(parts.cf.config, {"E": E})
    return Inputs(x_u, np.asarray(inject.item_table(x.llm, model, lambda: e, width=x.align.joint, seed=x.seed)))


def _llm(found: Comparison, parts: Parts, steps: int, users: int) -> None:
    x, dataset, cf, llm = parts.x, parts.pipeline.dataset, parts.cf, parts.llm
    config, (examples, _) = x.llm, parts.examples
    E, windows = np.asarray(cf.E), dataset.windows(examples.ends, cf.config.maxlen, examples.users)
    e: tuple[Any, Any] = (None, None)
    if config.item_vectors in ("e", "none"):
        modules = stage_align.baseline(
            parts.pipeline.encoder.config, parts.aligned, parts.pipeline.encoder.weights["weights"]
        )
        some = np.ones(1, int)
        ours = stage_align.our_tables(parts.begin, parts.pipeline.encoder, parts.aligned, E, some)
        e = ours["e"], stage_align.tables(parts.begin, modules, E, some)["e"]
    x_u = cf.x_u(windows, examples.users), _their_x_u(parts, windows, examples.users)
    inputs = tuple(inputs_of(parts, x_u[side], E, e[side]) for side in (0, 1))
    heads, model = parts.heads(inputs[0]), stage_llm.transformer(llm, parts.pipeline.llm_folder)
    shown = stage_llm.in_use(config, llm, heads, inputs[0])
    asked = Users(parts, users)
    test_x_u = cf.x_u(asked.windows, asked.ids), _their_x_u(parts, asked.windows, asked.ids)
    builder: PromptBuilder = examples.builder
    scores = {
        "ours": stage_llm.our_scores(config, llm, builder, shown, inputs[0].table, test_x_u[0], asked.asked),
        "theirs": stage_llm.their_scores(config, model, builder, shown, inputs[1].table, test_x_u[1], asked.asked),
    }
    runs = (
        stage_llm.ours(config, examples, llm, heads, inputs[0], steps),
        stage_llm.theirs(config, examples, model, heads, inputs[1], steps),
    )
    of_metrics, found.metrics["stage 2"] = check_metrics("stage 2: metrics", scores, asked.column, x.seed)
    made = [
        check("stage 2: log-likelihoods of candidates", "score", scores["ours"], scores["theirs"]),
        check_order("stage 2: ranking", scores["ours"], scores["theirs"]),
        *check_runs("stage 2", *runs, steps),
        of_metrics,
    ]
    [prompt] = builder.prompts(asked.asked.histories[:1], asked.candidates[:1])
    one = test_x_u[0][0], test_x_u[1][0]
    found.checks += _explain(made, lambda: stage_llm.trace(llm, model, prompt, (shown, shown), inputs, one))
