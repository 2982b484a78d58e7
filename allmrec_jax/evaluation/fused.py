"""`fused`: the CF model's score and the LLM's likelihood of each candidate, weighed by how well the item is known.

    score(i) = w_cf(t_i) s_cf(i) + w_llm(t_i) s_llm(i) + b(t_i),  t_i = log(1 + training interactions), standardised,

with w_cf and w_llm linear in t and b quadratic: six numbers. They make the target likely among the candidates, by a
softmax over them, for users' VALIDATION items: a concave problem, solved by Newton's method. A CF model knows popular
items and is blind to new ones, an LLM the other way round; so one sum for all would be the worse of two somewhere.

How much a user with a cold target counts is the one setting: of a few weights that one is taken whose advantage over
the better of both models, in units of its standard error, is the greatest where it is the least: on all users, on cold
and on warm targets. Advantages are measured on validation users that were not fitted to (five folds).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from allmrec_jax.evaluation.metrics import metrics_of, target_ranks

Scores = Float[np.ndarray, "rows candidates"]
Features = Float[np.ndarray, "rows candidates features"]

NAMES = ("cf", "cf x t", "llm", "llm x t", "t", "t^2")
WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # of a user whose target is cold
RIDGE = 1.0  # as if one more user spoke for 0
FOLDS = 5
METRIC = "mrr"
FURTHEST = 2.0  # standard deviations of t beyond which weights no longer change


@dataclass(frozen=True, eq=False)
class Fusion:
    """What was learned: the six numbers, the scales they belong to, and how it was chosen."""

    theta: Float[np.ndarray, " features"]
    scales: tuple[float, float]  # of both models' scores: their standard deviation within a user's list
    popularity: tuple[float, float]  # mean and standard deviation of log(1 + training interactions)
    cold_weight: float
    users: int

    def __call__(self, cf: Scores, llm: Scores, counts: Int[np.ndarray, "rows candidates"]) -> Scores:
        """The fused scores; `counts` are the candidates' training interactions."""
        return features(cf, llm, counts, self.scales, self.popularity) @ self.theta

    def weights(self, counts: Int[np.ndarray, " n"]) -> dict[str, Float[np.ndarray, " n"]]:
        """w_cf and w_llm at these training interactions, in units of a standard deviation of each score."""
        t = standardised(counts, self.popularity)
        return {"cf": self.theta[0] + self.theta[1] * t, "llm": self.theta[2] + self.theta[3] * t}

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
    """What `NAMES` says, of each candidate, as differences to the mean of the user's list."""
    t = standardised(counts, popularity)
    s_cf, s_llm = ((s - s.mean(1, keepdims=True)) / scale for s, scale in zip((cf, llm), scales, strict=True))
    return np.stack([s_cf, s_cf * t, s_llm, s_llm * t, t, t * t], axis=-1)


def fit(
    x: Features, column: Int[np.ndarray, " rows"], weight: Float[np.ndarray, " rows"], steps: int = 50
) -> Float[np.ndarray, " features"]:
    """theta that maximises sum_u weight_u log softmax(x_u theta)[column_u] - RIDGE/2 |theta|^2, by Newton's method.

    A step that does not rise is halved until it does, so that separable data (everybody right) end, too.
    """
    chosen = np.take_along_axis(x, column[:, None, None], axis=1)[:, 0]
    theta = np.zeros(x.shape[-1])

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
    """Over the groups that have rows, the least of: mean of fused - the better of cf and llm, in standard errors."""
    of = {
        name: metrics_of(target_ranks(scores, column))[METRIC]
        for name, scores in (("fused", fused), ("cf", cf), ("llm", llm))
    }
    found = []
    for rows in groups.values():
        if rows.sum() > 1:
            better = max(("cf", "llm"), key=lambda name: of[name][rows].mean())
            d = of["fused"][rows] - of[better][rows]
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

    def advantage(weight: np.ndarray) -> float:
        out = np.empty(cf.shape)
        for k in range(FOLDS):
            rest = fold != k
            out[~rest] = x[~rest] @ fit(x[rest], column[rest], weight[rest])
        return least_advantage(out, cf, llm, column, groups)

    weights = {factor: np.where(cold, factor, 1.0) for factor in (WEIGHTS if cold.any() else (1.0,))}
    best = max(weights, key=lambda factor: (advantage(weights[factor]), -abs(np.log(factor))))
    return Fusion(fit(x, column, weights[best]), scales, popularity, best, len(column))
