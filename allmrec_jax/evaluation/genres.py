"""`genres`: which categories would this user enjoy, asked of the LLM in the prompt's own format.

    ... This user has watched "T1" O_1,"T2" O_2 in the previous. Recommend one category of movies for this user
    to watch next from the following category set, "Drama" O_d,"War" O_w. The recommendation is

The candidates are the same for all users, in an order of each one's own: the `evaluation.candidates` categories with
the most items, leaving out those that nearly all items have. O of a category is F_I of the mean of what F_I reads of
its items. A category's score is the likelihood of its name; right are those of the user's test item, and a metric is of
the first right one. `popularity` orders by training interactions with a category's items, `repeat` by how many items
of the history have it, `cf` by the mean score of its items.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from allmrec_jax.data.prompts import PromptBuilder, template_of
from allmrec_jax.evaluation import metrics, scores
from allmrec_jax.evaluation.borrowed import Borrowed
from allmrec_jax.evaluation.lists import ROWS, Lists
from allmrec_jax.models import collaborative
from allmrec_jax.pipeline import Pipeline

NEARLY_ALL = 0.9  # of the items: a category that tells nothing
SEED_STREAM = 13
SENTENCE = (
    "This user has {done} {history} in the previous. Recommend one category of {noun}s for this user to {do} next from "
    "the following category set, {candidates}. The recommendation is "
)
MODELS = ("popularity", "repeat", "cf", "llm-only", "mlp-llm", "a-llmrec")


def choose(categories: Sequence[Sequence[str]], most: int) -> list[str]:
    """The `most` commonest categories of items, without those that nearly all items have."""
    counts = collections.Counter(name for names in categories for name in dict.fromkeys(names))
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    return [name for name in ranked if counts[name] < NEARLY_ALL * len(categories)][:most]


def membership(categories: Sequence[Sequence[str]], names: Sequence[str]) -> Bool[np.ndarray, "items names"]:
    """Whether each item has each category."""
    return np.array([[name in set(own) for name in names] for own in categories], bool).reshape(-1, len(names))


class Categories(Borrowed):
    """The models of `source`, with categories as items behind its own: n_items + 1, n_items + 2, ..."""

    def __init__(self, source: Pipeline):
        super().__init__(source, "genres")
        categories = source.dataset.categories()
        self.names = choose(categories[1:], source.experiment.evaluation.candidates)
        self.has = membership(categories, self.names)

    @property
    def about(self) -> dict[str, Any]:
        return {"categories": self.names, "sentence": SENTENCE}

    @functools.cached_property
    def item_table(self) -> np.ndarray:
        """What F_I reads of each item, then the mean over each category's items."""
        table = self.source.item_table
        return np.concatenate([table, self.means(table)]).astype(np.float32)

    def means(self, table: Float[np.ndarray, "items width"]) -> Float[np.ndarray, "names width"]:
        return (self.has.T.astype(np.float64) @ table) / np.maximum(self.has.sum(0), 1)[:, None]

    def builder(self, *, inject: bool) -> PromptBuilder:
        titles = [*self.source.dataset.titles(), *self.names]
        template = dataclasses.replace(template_of(self.experiment.llm), text=SENTENCE)
        return PromptBuilder(
            self.llm.tokenizer, titles, template, context=self.llm.config.max_position_embeddings, inject=inject
        )


def draw(pipeline: Categories, users: Int[np.ndarray, " rows"]) -> tuple[Lists, Bool[np.ndarray, "rows names"]]:
    """(lists of all categories in each user's own order, which are right); users whose test item has none are left out,
    as are those of whose item all are."""
    dataset, n = pipeline.dataset, len(pipeline.names)
    right = pipeline.has[dataset.targets_of(users)]
    some = right.any(1) & ~right.all(1)
    users, right = users[some], right[some]
    seed = pipeline.experiment.seed
    orders = [np.random.default_rng([seed, SEED_STREAM, user]).permutation(n) for user in users.tolist()]
    order = np.array(orders, np.int64).reshape(-1, n)
    right = np.take_along_axis(right, order, axis=1)
    candidates = (dataset.n_items + 1 + order).astype(np.int32)
    return Lists("genres", users, candidates, right.argmax(1), np.zeros_like(candidates)), right


def first_right(
    scores: Float[np.ndarray, "rows names"], right: Bool[np.ndarray, "rows names"]
) -> Int[np.ndarray, " rows"]:
    """The place (0 = first) of the first right one; equal scores in the candidates' order.

    >>> first_right(np.array([[0.1, 0.9, 0.5]]), np.array([[True, False, True]])).tolist()
    [1]
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(right, order, axis=1).argmax(axis=1)


def score(pipeline: Categories, of: Lists, models: Iterable[str]) -> dict[str, Float[np.ndarray, "rows names"]]:
    """The scores of those of `MODELS` that are asked for."""
    dataset, source, models = pipeline.dataset, pipeline.source, set(models)
    at = of.candidates - dataset.n_items - 1
    found: dict[str, Any] = {}
    by_category = dataset.train_counts() @ pipeline.has
    found["popularity"] = by_category[at].astype(float)
    held = np.zeros((len(of.users), len(pipeline.names)))
    longest = int(dataset.lengths.max())
    for start in range(0, len(of.users), ROWS):
        part = slice(start, start + ROWS)
        histories = dataset.histories(of.users[part], longest)
        for column in range(longest):
            held[part] += pipeline.has[histories[:, column]]
    found["repeat"] = np.take_along_axis(held, at, axis=1)
    x_u = scores.representations(source, of)
    if not hasattr(collaborative.module_of(source.cf.config), "score"):
        found["cf"] = np.take_along_axis(x_u @ pipeline.means(np.asarray(source.cf.E)).T, at, axis=1)
    for name in (name for name in scores.THROUGH_LLM if name in models and name in MODELS):
        found[name] = scores.through_llm(pipeline, of, name, x_u)
    return {name: found[name] for name in MODELS if name in found and name in {*models, "popularity", "repeat"}}


def evaluate(
    pipeline: Pipeline,
    users: Int[np.ndarray, " rows"],
    models: Iterable[str],
    pairs: Iterable[tuple[str, str]],
    *,
    resamples: int,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]] | str:
    """(figures, paired differences, facts) over those of the users whose test item has a category; or why not."""
    categories, seed = Categories(pipeline), pipeline.experiment.seed
    if len(categories.names) < 2:
        return "fewer than two categories tell items apart"
    of, right = draw(categories, users)
    if not len(of.users):
        return "none of the tested users' items has a category that tells items apart"
    values = {
        name: metrics.metrics_of(first_right(scores, right)) for name, scores in score(categories, of, models).items()
    }
    figures = {
        name: {
            metric: dataclasses.asdict(metrics.bootstrap(v, seed=seed, resamples=resamples))
            for metric, v in own.items()
        }
        for name, own in values.items()
    }
    differences: dict[str, Any] = {}
    for a, b in pairs:
        if a in values and b in values:
            differences.setdefault(a, {})[b] = {
                metric: dataclasses.asdict(
                    metrics.paired_difference(values[a][metric], values[b][metric], seed=seed, resamples=resamples)
                )
                for metric in metrics.METRICS
            }
    told = f"{len(categories.names)} categories, of which {right.sum(1).mean():.1f} are right on average"
    facts = {"users": len(of.users), "of": len(users), "candidates": None, "told": told}
    return figures, differences, facts
