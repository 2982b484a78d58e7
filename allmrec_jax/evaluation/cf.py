"""A collaborative filtering model by itself: among candidates as the public code draws them, and among all items."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from rich.console import Console

from allmrec_jax.config import CF
from allmrec_jax.data import batches
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.evaluation import catalogue, metrics
from allmrec_jax.evaluation.labels import METRIC_LABELS
from allmrec_jax.models import collaborative
from allmrec_jax.models.cf_model import CFModel
from allmrec_jax.progress import say
from allmrec_jax.training.cf import name_of
from allmrec_jax.training.checkpoint import Curves, write_json

SEED_STREAM = 5  # folded into the experiment's seed, so that no two stages share random bits
CANDIDATES = 20
SHOWN = {
    "reference": ("hit@1", "hit@5", "ndcg@5", "mrr"),
    "full": ("hit@10", "ndcg@10", "mrr"),
    "new": ("hit@10", "ndcg@10", "mrr"),
}


def _held_out(dataset: Dataset, seed: int, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users with a target, their targets, and the 19 items that each target stands among (0 where there is none)."""
    users = np.flatnonzero(dataset.has_target(split))
    key = jax.random.fold_in(jax.random.key(seed), SEED_STREAM)
    seen = batches.seen_items(*dataset.distinct("train"), dataset.n_items)
    drawn = batches.draw_negatives(key, 0, users, users, seen, CANDIDATES - 1)
    return users, dataset.targets(split)[users], np.asarray(drawn)


def ranks_of_held_out_items(
    model: CFModel, dataset: Dataset, *, seed: int, split: str = "test", batch: int = 256
) -> dict[str, np.ndarray]:
    """The rank (0 = first) of each user's test (or validation) item:

    reference   among 19 items drawn with replacement from those that are not the user's training items, so that the
                validation item, or the target itself, may be among them (the public code's protocol; it counts a
                tie in favour of the target)
    full        among all items; the history is not masked, since people do come back to items
    new         among all items that are not in the history, for targets that are not, either; -1 elsewhere
    """
    users, targets, drawn = _held_out(dataset, seed, split)
    windows = dataset.windows(dataset.history_end(split)[users], model.config.maxlen, users)
    x_u = model.x_u(windows, users)
    scores = model.scores(x_u, np.concatenate([targets[:, None], drawn], axis=1))
    # Nothing (0) was drawn for somebody who has every item.
    found = {"reference": ((scores[:, 1:] > scores[:, :1]) & (drawn > 0)).sum(1)}
    if hasattr(collaborative.module_of(model.config), "score"):  # not a product: not streamed
        return found
    longest = int(dataset.lengths.max())
    full, new, E = [], [], jnp.asarray(model.E)
    for start in range(0, len(users), batch):
        # The last batch is filled up with its first user, so that all have one shape.
        rows = np.arange(start, start + batch)
        rows = np.where(rows < len(users), rows, start)
        history = dataset.windows(dataset.history_end(split)[users[rows]], longest, users[rows])
        of_all, of_new = catalogue.ranks(x_u[rows], E, targets[rows], history)
        full.append(np.asarray(of_all))
        new.append(np.where((history == targets[rows, None]).any(1), -1, np.asarray(of_new)))
    full, new = (np.concatenate(part)[: len(users)] for part in (full, new))
    return found | {"full": full, "new": new}


def figures(model: CFModel, dataset: Dataset, *, seed: int, split: str = "test") -> dict[str, dict[str, Any]]:
    """`{protocol: {metric: {"value", "low", "high", "n"}}}` of `ranks_of_held_out_items`, with bootstrap intervals."""
    return _intervals(ranks_of_held_out_items(model, dataset, seed=seed, split=split), seed)


def _intervals(found: Mapping[str, np.ndarray], seed: int) -> dict[str, dict[str, Any]]:
    report: dict[str, dict[str, Any]] = {}
    for protocol, ranks in found.items():
        ranks = ranks[ranks >= 0]
        if len(ranks):
            values = metrics.metrics_of(ranks)
            intervals = {name: metrics.bootstrap(values[name], seed=seed) for name in SHOWN[protocol]}
            report[protocol] = {name: dataclasses.asdict(interval) for name, interval in intervals.items()}
    return report


def trivial_ranks(
    dataset: Dataset, *, seed: int, split: str = "test"
) -> tuple[dict[str, Int[np.ndarray, " users"]], dict[str, Int[np.ndarray, " users"]]]:
    """What `ranks_of_held_out_items` is for popularity, on the same candidates, and how many items each target could
    come behind (-1 where the rank is).

    Popularity is the number of training interactions; equal ones stand in a seeded random order.
    """
    users, targets, drawn = _held_out(dataset, seed, split)
    order = np.lexsort((np.random.default_rng(seed).random(dataset.n_items), -dataset.train_counts()[1:]))
    place = np.concatenate([[dataset.n_items], np.argsort(order)])  # of each item, 0 = the most popular
    items, offsets = dataset.distinct({"test": "validation", "validation": "train"}[split])  # the histories
    owner = np.repeat(np.arange(dataset.n_users + 1), np.diff(offsets))
    target = dataset.targets(split)[owner]

    def count(what: np.ndarray) -> np.ndarray:
        return np.bincount(owner[what], minlength=dataset.n_users + 1)[users]

    is_new, own = count(items == target) == 0, place[targets]
    above = (place[drawn] < own[:, None]) & (drawn > 0)
    ranks = {"reference": above.sum(1), "full": own}
    ranks["new"] = np.where(is_new, own - count(place[items] < place[target]), -1)
    others = (drawn != targets[:, None]) & (drawn > 0)
    rivals = {"reference": others.sum(1), "full": np.full_like(own, dataset.n_items - 1)}
    rivals["new"] = np.where(is_new, rivals["full"] - np.diff(offsets)[users], -1)
    return ranks, rivals


def baselines(dataset: Dataset, *, seed: int, split: str = "test") -> dict[str, dict[str, dict[str, Any]]]:
    """`figures` of popularity, and of a random order, which are exact expectations and have no interval."""
    ranks, rivals = trivial_ranks(dataset, seed=seed, split=split)
    of_rank, by_chance = metrics.metrics_of(np.arange(dataset.n_items + CANDIDATES)), {}
    for protocol, behind in rivals.items():
        behind = behind[behind >= 0]
        if len(behind):  # every rank from 0 to `behind` is as likely
            means = {name: np.cumsum(of_rank[name])[behind] / (behind + 1) for name in SHOWN[protocol]}
            by_chance[protocol] = {name: {"value": float(mean.mean())} for name, mean in means.items()}
    return {"popularity": _intervals(ranks, seed), "random": by_chance}


def table(found: Mapping[str, Any], others: Mapping[str, Any] | None = None, *, name: str = "CF model") -> Any:
    """The figures for the terminal, a section for each protocol, beside those of `baselines`."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    name = escape(name)
    what = {"reference": f"{CANDIDATES} candidates", "full": "all items", "new": "new items"}
    shown = Table("test item among", "metric", name, "95 % interval", *(others or {}))
    for protocol, entries in found.items():
        users = f"{next(iter(entries.values()))['n']:,} users"
        labels = [what[protocol], users, *[""] * len(entries)]
        for label, (metric, of) in zip(labels, entries.items(), strict=False):
            beside = [f"{other[protocol][metric]['value']:.4f}" for other in (others or {}).values()]
            interval = f"{of['low']:.4f} to {of['high']:.4f}"
            shown.add_row(label, METRIC_LABELS[metric], f"{of['value']:.4f}", interval, *beside)
        shown.add_section()
    notes = [
        f"{what['reference']}: the test item and {CANDIDATES - 1} drawn as the public code draws them, with "
        "replacement from what is not among the user's training items."
    ]
    if "full" in found:
        notes.append(
            "All items: those of the history, too. New items: all others, for test items that are not in the history."
        )
    else:
        notes.append(f"Not among all items: that needs a score of the form x_u . E_i, which {name}'s is not.")
    return Group(shown, *notes)


def heading(config: CF, curves: Curves, folder: Path) -> str:
    """Which model this is, and where it lies: the epoch that training chose."""
    if config.model == "given":
        return f"stage 0: {name_of(config)}, {folder / 'given.npz'} (a copy of {config.file})"
    epoch, which = config.epochs, "the last"
    if config.select == "best" and "ndcg@10" in curves:
        epoch, _ = max(curves["ndcg@10"], key=lambda point: (point[1], point[0]))
        which = "the best on validation NDCG@10"
    where = folder / "checkpoints" / str(epoch)
    return f"stage 0: {name_of(config)}, epoch {epoch} of {config.epochs} ({which}), {where}"


def report(
    model: CFModel, curves: Curves, dataset: Dataset, folder: Path, config: CF, *, seed: int, console: Console
) -> dict[str, Any]:
    """Writes metrics.json (the model's figures, and those of `baselines`) into `folder` and prints it."""
    found, others = figures(model, dataset, seed=seed), baselines(dataset, seed=seed)
    write_json(folder / "metrics.json", found | {"baselines": others})
    say(console, heading(config, curves, folder))
    console.print(table(found, others, name=name_of(config)))
    return found
