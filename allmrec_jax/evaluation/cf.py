"""A collaborative filtering model by itself: among candidates as the public code draws them, and among all items."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from allmrec_jax.data import batches
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.evaluation import catalogue, metrics
from allmrec_jax.models import collaborative
from allmrec_jax.training.cf import CFModel

SEED_STREAM = 5  # folded into the experiment's seed, so that no two stages share random bits
CANDIDATES = 20


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
    users = np.flatnonzero(dataset.has_target(split))
    key = jax.random.fold_in(jax.random.key(seed), SEED_STREAM)
    seen = batches.seen_items(*dataset.distinct("train"), dataset.n_items)
    drawn = batches.draw_negatives(key, 0, users, users, seen, CANDIDATES - 1)
    targets = dataset.targets(split)[users]
    windows = dataset.windows(dataset.history_end(split)[users], model.config.maxlen, users)
    x_u = model.x_u(windows, users)
    scores = model.scores(x_u, np.concatenate([targets[:, None], np.asarray(drawn)], axis=1))
    # Nothing (0) was drawn for somebody who has every item.
    found = {"reference": ((scores[:, 1:] > scores[:, :1]) & (np.asarray(drawn) > 0)).sum(1)}
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
    report: dict[str, dict[str, Any]] = {}
    for protocol, ranks in ranks_of_held_out_items(model, dataset, seed=seed, split=split).items():
        ranks = ranks[ranks >= 0]
        wanted = ("hit@1", "hit@5", "ndcg@5", "mrr") if protocol == "reference" else ("hit@10", "ndcg@10", "mrr")
        if len(ranks):
            values = metrics.metrics_of(ranks)
            intervals = {name: metrics.bootstrap(values[name], seed=seed) for name in wanted}
            report[protocol] = {name: dataclasses.asdict(interval) for name, interval in intervals.items()}
    return report


def table(found: dict[str, dict[str, Any]]) -> Any:
    """The figures for the terminal."""
    from rich.table import Table

    what = {
        "reference": "20 candidates, as the public code draws them",
        "full": "all items",
        "new": "all items that are new to the user",
    }
    shown = Table("test items", "metric", "value", "95 % interval", "users", title="stage 0", title_justify="left")
    for protocol, entries in found.items():
        for name, of in entries.items():
            interval = f"{of['low']:.4f} to {of['high']:.4f}"
            shown.add_row(what[protocol], name, f"{of['value']:.4f}", interval, f"{of['n']:,}")
    return shown
