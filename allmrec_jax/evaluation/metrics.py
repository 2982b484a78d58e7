"""Ranks, the metrics made of them, and how sure one may be of their means.

One test user = one row. Each model gives a score to every candidate of the row, the same candidates in the same order
for every model, and exactly one candidate is the item that the user really took next, the target:

    scores (users, candidates)  --target_ranks-->  ranks (users,)  --metrics_of-->  {"hit@1": (users,), ...}

A figure without its uncertainty says little at 100 users, so every mean comes as an `Interval` and every comparison of
two models is *paired*: the difference is taken user by user before anything is averaged.

Everything random takes a seed; the same seed and values give the same bits (for one version of numpy). Both resampling
schemes here draw *how often each distinct value occurs* instead of drawing users one by one. The distribution is
exactly the same and the order of the users cannot matter, but the cost is resamples x distinct values (at most 20 for
20 candidates), whether there are a hundred users or a million.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float, Int

METRICS = ("hit@1", "hit@5", "hit@10", "ndcg@5", "ndcg@10", "mrr")
CELLS = 1 << 21  # resamples x distinct values held at once: 16 MiB of float64


@dataclass(frozen=True)
class Interval:
    """A mean over users and its percentile-bootstrap interval.

    Attributes:
        value: the mean over the users seen.
        low, high: the ends of the interval for the mean over users like these.
        n: how many users.
    """

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference(Interval):
    """The mean of a - b over users, its interval, and how easily chance alone gives a difference as large.

    Attributes:
        p_value: two-sided, from the paired sign-flip permutation test of `paired_difference`.
    """

    p_value: float


def target_ranks(
    scores: Float[np.ndarray, "users candidates"], target: Int[np.ndarray, " users"]
) -> Int[np.ndarray, " users"]:
    """The rank that each user's target takes among the candidates, 0 = first.

        rank_u = #{c : s_uc > s_u,target} + #{c < target_u : s_uc = s_u,target}

    Equal scores are broken by the candidates' order, earlier column first. That is fair only if the columns stand in an
    order that knows nothing of the target (the seeded shuffle of the candidates): with the target always in column 0 a
    model that scores everything alike would look perfect.

    Args:
        scores: higher is better. -inf is allowed and means "last".
        target: the target's column.

    Raises:
        ValueError: a score that is NaN or +inf (the first such user and column are named), shapes that do not fit, or a
            target that is not a column.
    """
    scores = _checked_scores(scores)
    target = np.asarray(target)
    users, candidates = scores.shape
    if target.shape != (users,):
        raise ValueError(f"target has shape {target.shape}; scores of shape {scores.shape} need {(users,)}")
    outside = np.flatnonzero((target < 0) | (target >= candidates))
    if outside.size:
        raise ValueError(
            f"user {outside[0]}: target column {target[outside[0]]} is not one of the {candidates} candidates"
        )
    own = np.take_along_axis(scores, target[:, None].astype(np.int64), axis=1)
    earlier = np.arange(candidates) < target[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(axis=1)


def metrics_of(ranks: Int[np.ndarray, " users"]) -> dict[str, Float[np.ndarray, " users"]]:
    """Per-user values of every metric in `METRICS`; their means are the figures that papers print.

        hit@k = [rank < k]      ndcg@k = [rank < k] / log2(rank + 2)      mrr = 1 / (rank + 1)

    (rank counts from 0; with a single relevant item the ideal DCG is 1.)

    Raises:
        ValueError: a negative rank.
    """
    ranks = np.asarray(ranks)
    if ranks.size and ranks.min() < 0:
        raise ValueError("ranks count from 0; found a negative one")
    gain = 1 / np.log2(ranks + 2.0)
    values = {}
    for k in (1, 5, 10):
        values[f"hit@{k}"] = (ranks < k).astype(float)
        values[f"ndcg@{k}"] = np.where(ranks < k, gain, 0.0)
    values["mrr"] = 1 / (ranks + 1.0)
    return {name: values[name] for name in METRICS}


def chance(candidates: int) -> dict[str, float]:
    """What a random order of the candidates gives on average: the mean of `metrics_of` over all ranks.

    >>> chance(20)["hit@1"], chance(20)["hit@5"]
    (0.05, 0.25)
    """
    return {name: float(values.mean()) for name, values in metrics_of(np.arange(candidates)).items()}


def bootstrap(
    values: Float[np.ndarray, " users"], *, seed: int, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """The mean over users with its percentile-bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    Draw as many users as there are, with replacement, `resamples` times; the interval runs from the (1 - level)/2 to
    the (1 + level)/2 quantile of the means. If all users have the same value the interval has no width: that is the
    method's limit, not certainty.

    Raises:
        ValueError: no user, a value that is not finite, or a level outside (0, 1).
    """
    values = _checked_values(values)
    low, high = _bootstrap_ends(values, seed, resamples, level)
    return Interval(value=_mean(values), low=low, high=high, n=values.size)


def paired_difference(
    a: Float[np.ndarray, " users"],
    b: Float[np.ndarray, " users"],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    permutations: int = 10_000,
) -> Difference:
    """Mean of a - b over the same users, its percentile-bootstrap interval, and a two-sided p-value.

    The p-value is that of the paired sign-flip permutation test: if the two models were exchangeable, each user's
    difference d_u could as well have had the other sign; p is how often random signs give a |sum| at least as large,

        p = (1 + #{|sum_u +-d_u| >= |sum_u d_u|}) / (1 + permutations),

    never 0 (the observed signs are one of the permutations). For 0/1 metrics it is a sampled McNemar test.
    Swapping a and b negates value and interval and leaves p as it is, to the last bit.

    Raises:
        ValueError: as `bootstrap`; or a and b are not of the same users.
    """
    a, b = _checked_values(a), _checked_values(b)
    if a.shape != b.shape:
        raise ValueError(f"a paired difference needs the same users on both sides, got {a.size} and {b.size}")
    difference = a - b
    # Work on whichever of d and -d comes first in a fixed order, so that the swap is exact.
    order = np.sort(difference)
    lopsided = order + order[::-1]
    sign = next(iter(np.sign(lopsided[lopsided != 0])), 0)
    oriented = -difference if sign < 0 else difference
    value, (low, high) = _mean(oriented), _bootstrap_ends(oriented, seed, resamples, level)
    if sign < 0:
        value, low, high = -value, -high, -low
    elif sign == 0:  # d and -d are the same values: so is the interval, but for the luck of the draw
        value, low, high = 0.0, (low - high) / 2, (high - low) / 2
    return Difference(value, low, high, difference.size, _sign_flip_p(difference, seed, permutations))


def mean_rank(*scores: Float[np.ndarray, "users candidates"]) -> Float[np.ndarray, "users candidates"]:
    """Scores of the models' combination: minus the mean, over models, of each candidate's rank for the user.

    Ranks (best = 0) need no common scale, so a dot product and a log-likelihood combine without fitting anything.
    Candidates with equal scores share the average of the ranks they take up together.

    Raises:
        ValueError: no model, differing shapes, or a score that is NaN or +inf.
    """
    if not scores:
        raise ValueError("mean_rank needs the scores of at least one model")
    shapes = {np.shape(s) for s in scores}
    if len(shapes) > 1:
        raise ValueError(f"the models scored different candidates: shapes {sorted(shapes)}")
    return -sum(_average_ranks(_checked_scores(s)) for s in scores) / len(scores)


def summarise(
    scores: Mapping[str, Float[np.ndarray, "users candidates"]],
    target: Int[np.ndarray, " users"],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> dict[str, dict[str, dict[str, float | int]]]:
    """One scenario as `metrics.json` has it: model -> metric -> {"value", "low", "high", "n"}.

    Raises:
        ValueError: as `target_ranks`, with the model's name in front.
    """
    return {
        model: {name: asdict(bootstrap(v, seed=seed, resamples=resamples, level=level)) for name, v in per_user.items()}
        for model, per_user in _per_user(scores, target).items()
    }


def differences(
    scores: Mapping[str, Float[np.ndarray, "users candidates"]],
    target: Int[np.ndarray, " users"],
    pairs: Iterable[tuple[str, str]],
    *,
    seed: int,
    metrics: Sequence[str] = METRICS,
    resamples: int = 2000,
    level: float = 0.95,
) -> dict[str, dict[str, dict[str, dict[str, float | int]]]]:
    """Paired differences of named models: a -> b -> metric -> {"value" (a minus b), "low", "high", "n", "p_value"}.

    Raises:
        ValueError: as `target_ranks`, with the model's name in front; or a pair names a model that has no scores.
    """
    pairs = list(pairs)
    unknown = sorted({model for pair in pairs for model in pair} - set(scores))
    if unknown:
        raise ValueError(f"no scores of {', '.join(unknown)}; there are {', '.join(scores)}")
    per_user = _per_user({model: scores[model] for model in dict.fromkeys(m for pair in pairs for m in pair)}, target)
    result: dict = {}
    for a, b in pairs:
        result.setdefault(a, {})[b] = {
            name: asdict(
                paired_difference(per_user[a][name], per_user[b][name], seed=seed, resamples=resamples, level=level)
            )
            for name in metrics
        }
    return result


def _per_user(scores: Mapping[str, np.ndarray], target: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Each model's `metrics_of`; errors carry the model's name."""
    values = {}
    for model, of_model in scores.items():
        try:
            values[model] = metrics_of(target_ranks(of_model, target))
        except ValueError as error:
            raise ValueError(f"{model}: {error}") from error
    return values


def _checked_scores(scores: np.ndarray) -> np.ndarray:
    """Scores as a finite-or-minus-infinity float64 matrix."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2:
        raise ValueError(f"scores must be (users, candidates), got shape {scores.shape}")
    bad = np.isnan(scores) | (scores == np.inf)
    if bad.any():
        user, column = np.argwhere(bad)[0]
        raise ValueError(f"user {user}, candidate column {column}: the score is {scores[user, column]}")
    return scores


def _checked_values(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"need the values of at least one user, as one axis; got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"user {np.flatnonzero(~np.isfinite(values))[0]}: the value is not finite")
    return values


def _mean(values: np.ndarray) -> float:
    """The mean, summed in the same way as the bootstrap's, so that equal values give an interval without width."""
    distinct, counts = np.unique(values, return_counts=True)
    return float(counts @ distinct / values.size)


def _bootstrap_ends(values: np.ndarray, seed: int, resamples: int, level: float) -> tuple[float, float]:
    """Quantiles of `resamples` bootstrap means: each resample is one multinomial draw over the distinct values."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    means = np.empty(resamples)
    for start, stop in _chunks(resamples, distinct.size):
        drawn = rng.multinomial(values.size, counts / values.size, size=stop - start)
        means[start:stop] = drawn @ distinct / values.size
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _sign_flip_p(difference: np.ndarray, seed: int, permutations: int) -> float:
    """Of m users with the same |d|, Binomial(m, 1/2) keep a plus: their sum is |d| (2 B - m)."""
    rng = np.random.default_rng(seed)
    size, counts = np.unique(np.abs(difference[difference != 0]), return_counts=True)
    # Sums of the same terms in another order differ in the last bits: such a tie counts as "at least as large".
    observed = abs(difference.sum()) - 1e-9 * np.abs(difference).sum()
    as_large = 0
    for start, stop in _chunks(permutations, max(size.size, 1)):
        plus = rng.binomial(counts, 0.5, size=(stop - start, size.size))
        as_large += int((np.abs((2 * plus - counts) @ size) >= observed).sum())
    return (1 + as_large) / (1 + permutations)


def _chunks(rows: int, width: int) -> Iterable[tuple[int, int]]:
    """Row ranges of at most `CELLS` cells each."""
    step = max(1, CELLS // width)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _average_ranks(scores: np.ndarray) -> np.ndarray:
    """Rank of every candidate in its row, best = 0; equal scores share the mean of their first and last place."""
    users, candidates = scores.shape
    order = np.argsort(-scores, axis=1, kind="stable")
    ordered = np.take_along_axis(scores, order, axis=1)
    place = np.broadcast_to(np.arange(candidates), (users, candidates))
    differs = ordered[:, 1:] != ordered[:, :-1]
    edge = np.ones((users, 1), dtype=bool)
    first = np.maximum.accumulate(np.where(np.hstack([edge, differs]), place, 0), axis=1)
    ends = np.where(np.hstack([differs, edge]), place, candidates)
    last = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty(scores.shape)
    np.put_along_axis(ranks, order, (first + last) / 2, axis=1)
    return ranks
