"""`fused`: the CF model's score and the LLM's likelihood of each candidate, weighed by how well the item is known.

    score = a w_1(t) + b w_2(t) + a^2 w_3(t) + b^2 w_4(t) + a b w_5(t) + (t, t^2, t^3) . c

with a and b the scores of the CF model and of the LLM as differences to the mean of the user's list, t the logarithm of
the item's training interactions, both standardised, and every w linear in t: thirteen numbers. They make the target
likely among the candidates, by a softmax over them, for users' VALIDATION items: a concave problem, solved by Newton's
method. A CF model knows popular items and is blind to new ones, an LLM the other way round; one sum for all items would
be the worse of the two somewhere.

How much a user with a cold target counts is the one setting, for what helps cold targets costs warm ones. Taken is the
weight whose advantage over the better of both models, in units of its standard error, is the greatest where it is the
least: among all users, cold and warm targets, by Hit@1 and by MRR. Advantages are measured on validation users that
were not fitted to (five folds).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from allmrec_jax.evaluation.metrics import metrics_of, target_ranks

Scores = Float[np.ndarray, "rows candidates"]
Features = Float[np.ndarray, "rows candidates features"]

NAMES = ("a", "a t", "b", "b t", "a^2", "a^2 t", "b^2", "b^2 t", "a b", "a b t", "t", "t^2", "t^3")
WEIGHTS = tuple(2 ** (k / 3) for k in range(-3, 13))  # of a user whose target is cold
RIDGE = 8.0  # as if so many more users spoke for 0
FOLDS = 5
BY = ("hit@1", "mrr")
FURTHEST = 2.0  # standard deviations of t beyond which weights no longer change


@dataclass(frozen=True, eq=False)
class Fusion:
    """What was learned: the numbers, the scales they belong to, and how it was chosen.

    Attributes:
      scales: of both models' scores, their standard deviation within a user's list.
      popularity: mean and standard deviation of log(1 + training interactions) over the catalogue.
    """

    theta: Float[np.ndarray, " features"]
    scales: tuple[float, float]
    popularity: tuple[float, float]
    cold_weight: float
    users: int

    def __call__(self, cf: Scores, llm: Scores, counts: Int[np.ndarray, "rows candidates"]) -> Scores:
        """The fused scores; `counts` are the candidates' training interactions."""
        return features(cf, llm, counts, self.scales, self.popularity) @ self.theta

    def facts(self) -> dict[str, Any]:
        """For people and for metrics.json."""
        return {
            "validation users": self.users,
            "weight of cold targets": self.cold_weight,
            **{name: float(value) for name, value in zip(NAMES, self.theta, strict=True)},
        }


def standardised(counts: np.ndarray, popularity: tuple[float, float]) -> np.ndarray:
    mean, deviation = popularity
    return ((np.log1p(counts) - mean) / deviation).clip(-FURTHEST, FURTHEST)


def features(
    cf: Scores,
    llm: Scores,
    counts: Int[np.ndarray, "rows candidates"],
    scales: tuple[float, float],
    popularity: tuple[float, float],
) -> Features:
    """What `NAMES` says, of each candidate."""
    t = standardised(counts, popularity)
    a, b = ((s - s.mean(1, keepdims=True)) / scale for s, scale in zip((cf, llm), scales, strict=True))
    pairs = [part for f in (a, b, a * a, b * b, a * b) for part in (f, f * t)]
    return np.stack([*pairs, t, t**2, t**3], axis=-1)


def fit(
    x: Features,
    column: Int[np.ndarray, " rows"],
    weight: Float[np.ndarray, " rows"],
    start: Float[np.ndarray, " features"] | None = None,
    steps: int = 50,
) -> Float[np.ndarray, " features"]:
    """theta that maximises sum_u weight_u log softmax(x_u theta)[column_u] - RIDGE/2 |theta|^2, by Newton's method.

    A step that does not rise is halved until it does, so that separable data (everybody right) end, too.
    """
    chosen = np.take_along_axis(x, column[:, None, None], axis=1)[:, 0]
    theta = np.zeros(x.shape[-1]) if start is None else start

    def value(theta: np.ndarray) -> tuple[float, np.ndarray]:
        logits = x @ theta
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits)
        p /= p.sum(1, keepdims=True)
        own = np.take_along_axis(p, column[:, None], axis=1)[:, 0]
        return float(weight @ np.log(own.clip(1e-300)) - RIDGE / 2 * theta @ theta), p

    now, p = value(theta)
    for _ in range(steps):
        mean = np.einsum("uc,ucf->uf", p, x)
        gradient = weight @ (chosen - mean) - RIDGE * theta
        centred = x - mean[:, None]
        curvature = np.einsum("u,uc,ucf,ucg->fg", weight, p, centred, centred, optimize=True)
        step = np.linalg.solve(curvature + RIDGE * np.eye(len(theta)), gradient)
        if gradient @ step < 1e-10 * max(1.0, weight.sum()):
            break
        for _ in range(30):
            then, p = value(theta + step)
            if then > now:
                break
            step = step / 2
        theta, now = theta + step, then
    return theta


def least_advantage(
    fused: Scores, cf: Scores, llm: Scores, column: Int[np.ndarray, " rows"], groups: Mapping[str, Bool[np.ndarray, _]]
) -> float:
    """Over the metrics `BY` and the groups that have rows, the least of: mean of fused - the better of cf and llm, in
    standard errors."""
    of = [metrics_of(target_ranks(scores, column)) for scores in (fused, cf, llm)]
    found = []
    for metric, rows in itertools.product(BY, groups.values()):
        ours, *theirs = (values[metric][rows] for values in of)
        if len(ours) > 1:
            d = ours - max(theirs, key=np.mean)
            found.append(d.mean() / max(d.std(ddof=1) / np.sqrt(len(d)), 1e-9))
    return float(min(found, default=0.0))


def learn(
    cf: Scores,
    llm: Scores,
    counts: Int[np.ndarray, "rows candidates"],
    column: Int[np.ndarray, " rows"],
    *,
    cold: Bool[np.ndarray, " rows"],
    warm: Bool[np.ndarray, " rows"],
    all_counts: Int[np.ndarray, " items"],
) -> Fusion:
    """Learns from validation users.

    Args:
      column: where each one's validation item stands among the candidates.
      cold, warm: whether it is one of the data set's cold (warm) items.
      all_counts: training interactions of all items of the catalogue.
    """
    logs = np.log1p(all_counts)
    popularity = float(logs.mean()), float(logs.std() or 1.0)
    scales = tuple(float((s - s.mean(1, keepdims=True)).std() or 1.0) for s in (cf, llm))
    x, fold = features(cf, llm, counts, scales, popularity), np.arange(len(column)) % FOLDS
    groups = {"overall": np.ones(len(column), bool), "cold": cold, "warm": warm}

    found: list[tuple[float, float, np.ndarray]] = []
    for factor in WEIGHTS if cold.any() else (1.0,):
        weight = np.where(cold, factor, 1.0)
        theta, out = fit(x, column, weight, found[-1][2] if found else None), np.empty(cf.shape)
        for k in range(FOLDS):
            rest = fold != k
            out[~rest] = x[~rest] @ fit(x[rest], column[rest], weight[rest], theta)
        found.append((least_advantage(out, cf, llm, column, groups), factor, theta))
    advantages = np.pad([entry[0] for entry in found], 1, mode="edge")
    best = int(np.argmax(np.convolve(advantages, (0.25, 0.5, 0.25), mode="valid")))  # they are noisy
    _, factor, theta = found[best]
    return Fusion(theta, scales, popularity, factor, len(column))
