"""Where a model is good, and whether its scores mean what they say: Hit@1 by popularity of the target, calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from allmrec_jax.evaluation.metrics import bootstrap, target_ranks

EDGES = (0, 1, 3, 6, 11, 21, 51, 101, 201, 501, 1001, 2001, 5001, 10001)  # first training count of each bin
FEWEST = 10  # users in a bin; a smaller one is joined with the next
BINS = 10  # of predicted probabilities

Scores = Mapping[str, Float[np.ndarray, "rows candidates"]]


def popularity_bins(seen: Int[np.ndarray, " rows"]) -> list[tuple[int, int]]:
    """(least, most) training interactions of each bin, so that each holds `FEWEST` targets, if there are as many.

    >>> popularity_bins(np.array([0] * 12 + [1] * 4 + [4] * 9 + [700] * 20))
    [(0, 0), (1, 5), (501, 700)]
    """
    bins: list[tuple[int, int]] = []
    least, held = None, 0
    highest = int(seen.max(initial=0))
    for first, after in zip(EDGES, (*EDGES[1:], highest + EDGES[-1] + 1), strict=True):
        n = int(((seen >= first) & (seen < after)).sum())
        if n and least is None:
            least = first
        held += n
        if held >= FEWEST:
            bins.append((least, min(after - 1, highest)))
            least, held = None, 0
    if held:  # what is left over goes to the last bin
        bins = [*bins[:-1], (bins[-1][0], highest)] if bins else [(int(seen.min()), highest)]
    return bins


def by_popularity(
    scores: Scores, column: Int[np.ndarray, " rows"], seen: Int[np.ndarray, " rows"], *, seed: int, resamples: int
) -> dict[str, Any]:
    """Hit@1 of each model in bins of the target's training interactions.

    Returns `{"bins": [{"least", "most", "users"}], "models": {MODEL: [{"value", "low", "high", "n"}]}}`.
    """
    bins = popularity_bins(seen)
    rows = [(seen >= least) & (seen <= most) for least, most in bins]
    models = {}
    for name, of in scores.items():
        hits = (target_ranks(of, column) == 0).astype(float)
        models[name] = [asdict(bootstrap(hits[some], seed=seed, resamples=resamples)) for some in rows]
    return {
        "bins": [
            {"least": least, "most": most, "users": int(some.sum())}
            for (least, most), some in zip(bins, rows, strict=True)
        ],
        "models": models,
    }


def calibration(scores: Scores, column: Int[np.ndarray, " rows"]) -> dict[str, Any]:
    """How often candidates that get a probability are the target, the probability being the softmax of a user's scores.

    Every candidate of every user is a case, in `BINS` bins of the probability. Returns `{MODEL: {"bins": [{"p": the
    mean probability, "hit": how often, "n"}], "error": the mean of |hit - p|, over the cases}}`.
    """
    found = {}
    for name, of in scores.items():
        logits = of - of.max(axis=1, keepdims=True)
        p = np.exp(logits)
        p = (p / p.sum(axis=1, keepdims=True)).ravel()
        hit = (np.arange(of.shape[1]) == column[:, None]).ravel()
        at = np.minimum((p * BINS).astype(int), BINS - 1)
        n = np.bincount(at, minlength=BINS)
        mean = [np.bincount(at, weights=x, minlength=BINS) / np.maximum(n, 1) for x in (p, hit)]
        bins = [{"p": float(a), "hit": float(b), "n": int(k)} for a, b, k in zip(*mean, n, strict=True) if k]
        error = float(sum(b["n"] * abs(b["hit"] - b["p"]) for b in bins) / len(p))
        found[name] = {"bins": bins, "error": error}
    return found
