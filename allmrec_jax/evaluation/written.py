"""`generated`: the LLM writes the title instead of ordering the candidates; the public code's way of evaluating.

    hit@1             the answer is the target's title (`answers.hits`, rule exact)
    substring:hit@1   the target's title is somewhere in the answer (the public code's rule)
    valid             the answer is the title of one of the candidates

Beside them the hit@1 of the models that order candidates, on the same users and candidates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from allmrec_jax.evaluation import metrics, scores
from allmrec_jax.evaluation.decode import Decoding
from allmrec_jax.evaluation.generate import generate_answers
from allmrec_jax.evaluation.labels import NEW, ORDER, TRIVIAL
from allmrec_jax.evaluation.lists import Lists
from allmrec_jax.pipeline import Pipeline

SHOWN = ("hit@1", "substring:hit@1", "valid", f"{NEW}hit@1")


def evaluate(
    pipeline: Pipeline, of: Lists, models: Iterable[str], pairs: Iterable[tuple[str, str]], *, resamples: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(figures, paired differences, facts) of the models that write, those that order beside them."""
    x, models = pipeline.experiment, set(models)
    values: dict[str, dict[str, np.ndarray]] = {}
    for name, found in scores.score(pipeline, of, [*TRIVIAL, "cf"]).items():
        values[name] = {"hit@1": (metrics.target_ranks(found, of.column) == 0).astype(float)}
    folder = scores.open_folder(pipeline, of)
    for name in (name for name in scores.THROUGH_LLM if name in models):
        heads, e = scores.injected(pipeline, name)
        written = generate_answers(
            pipeline,
            of,
            heads=heads,
            e=e,
            decoding=Decoding(new=x.evaluation.new_tokens),
            saved=folder / f"{of.group}.{name}.texts.json",
            label=f"evaluation: {of.group}, {name} writes",
            console=pipeline.console,
        )
        hits = {"hit@1": written.hits["exact"], "substring:hit@1": written.hits["substring"], "valid": written.valid}
        values[name] = {metric: np.asarray(value, float) for metric, value in hits.items()}
    new = ~of.repeats
    for own in values.values():
        own |= {NEW + metric: value[new] for metric, value in own.items() if new.any()}
    options = {"seed": x.seed, "resamples": resamples}
    figures = {
        name: {metric: dataclasses.asdict(metrics.bootstrap(v, **options)) for metric, v in values[name].items()}
        for name in ORDER
        if name in values
    }
    differences: dict[str, Any] = {}
    for a, b in pairs:
        if a in values and b in values:
            both = values[a].keys() & values[b].keys()
            differences.setdefault(a, {})[b] = {
                metric: dataclasses.asdict(metrics.paired_difference(values[a][metric], values[b][metric], **options))
                for metric in values[a]
                if metric in both
            }
    told = (
        f"answers in words, greedy, at most {x.evaluation.new_tokens} tokens, beside the first choices of other models"
    )
    facts = {"users": len(of.users), "of": len(of.users), "repeats": int(of.repeats.sum()), "told": told}
    return figures, differences, facts | {"candidates": of.candidates.shape[1], "metrics": SHOWN}
