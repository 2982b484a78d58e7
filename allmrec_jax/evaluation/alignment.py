"""What stage 1 is for, in figures: whether e and q tell items apart, how close an item's own two are, how each ranks.

And a picture: both in the plane of their two main directions, coloured by category.
"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from allmrec_jax.data.dataset import Dataset
from allmrec_jax.evaluation import embedding_only
from allmrec_jax.files import write_atomically
from allmrec_jax.models.cf_model import CFModel
from allmrec_jax.progress import say
from allmrec_jax.training.align import Aligned
from allmrec_jax.training.checkpoint import write_json

SAMPLE = 1000  # items whose pairs are measured, and items drawn in the picture
NEAREST = (1, 10)
COLLAPSED = 1e-3  # of the greatest distance there is between two points of (0, 1)^d', sqrt(d')
COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")  # all but the grey one
CATEGORIES = len(COLOURS)
PICTURE = "embeddings.png"
RANKED = {"cf": "CF model", "e": "by e", "q": "by q", "mixed": "by both"}


def spread(table: Float[np.ndarray, "items joint"]) -> float:
    """The mean distance of two different rows: 0 if all have collapsed into one.

    >>> spread(np.array([[0.0, 0.0], [3.0, 4.0]]))
    5.0
    """
    n = len(table)
    return float(_distances(table, table).sum() / max(1, n * (n - 1)))


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
    if a is b or np.array_equal(a, b):
        np.fill_diagonal(squares, 0)
    return np.sqrt(np.maximum(squares, 0))


def nearest_ranks(
    e: Float[np.ndarray, "items joint"], q: Float[np.ndarray, "items joint"], asked: Int[np.ndarray, " asked"]
) -> Int[np.ndarray, " asked"]:
    """How many items' e are nearer to q_i than e_i is, or as near, for each asked i: 0 is a hit."""
    ranks = np.zeros(len(asked), np.int64)
    for start in range(0, len(asked), 512):
        rows = asked[start : start + 512]
        far = _distances(q[rows], e)
        own = far[np.arange(len(rows)), rows][:, None]
        ranks[start : start + 512] = (far <= own).sum(1) - 1
    return ranks


def figures(
    aligned: Aligned, dataset: Dataset, *, seed: int, targets: Literal["last", "all"] = "last"
) -> dict[str, Any]:
    """Spreads of e and q on a seeded sample, the mean distance of an item's own e and q, and the retrieval of an item's
    e from its q among all items: on items that no user's training had as the next item, where there are any.

    Args:
      targets: which items of a user training had as the next one, as `Dataset.examples` reads it.
    """
    e, q = aligned.e[1:], aligned.q[1:]
    some = np.random.default_rng(seed).permutation(len(e))[:SAMPLE]
    own = np.linalg.norm(e - q, axis=1).mean()
    positive = np.zeros(len(aligned.e), bool)
    positive[dataset.examples(targets)[2]] = True
    asked = np.flatnonzero(~positive[1:])
    which = "items that were never the next item in training" if len(asked) else "all items"
    asked = asked if len(asked) else np.arange(len(e))
    ranks = nearest_ranks(e, q, asked)
    return {
        "spread of e": spread(e[some]),
        "spread of q": spread(q[some]),
        "own distance": float(own),
        "collapsed": bool(min(spread(e[some]), spread(q[some])) < COLLAPSED * np.sqrt(e.shape[1])),
        "retrieval": {
            "of": which,
            "n": len(asked),
            "among": len(e),
            **{f"R@{k}": float((ranks < k).mean()) for k in NEAREST},
            **{f"R@{k} by chance": min(1.0, k / len(e)) for k in NEAREST},
        },
    }


def sentences(found: dict[str, Any]) -> list[str]:
    """The figures in words, with a warning where an embedding has collapsed."""
    retrieval = found["retrieval"]
    hits = ", ".join(
        f"R@{k} {retrieval[f'R@{k}']:.3f} (by chance {retrieval[f'R@{k} by chance']:.3g})" for k in NEAREST
    )
    told = [
        f"two items' e are {found['spread of e']:.3g} apart on average, two items' q {found['spread of q']:.3g}, an "
        f"item's own e and q {found['own distance']:.3g}",
        f"the nearest e to an item's q, among {retrieval['among']:,}, is its own: {hits}; asked of "
        f"{retrieval['n']:,} {retrieval['of']}",
    ]
    if found["collapsed"]:
        told.append("warning: e or q of all items are nearly the same; keep L_item and L_text (align.alpha)")
    return told


def table(found: dict[str, Any]) -> Any:
    """How the embeddings rank without a language model, for the terminal."""
    from rich import box
    from rich.table import Table

    shown = Table("test items", "users", *RANKED.values(), box=box.SIMPLE_HEAD, title_justify="left")
    shown.title = "Hit@1 among 20 by stage 1's embeddings, without an LLM"
    for scenario, models in found["ranking"].items():
        cells = [f"{of['value']:.3f}\n{of['low']:.3f}-{of['high']:.3f}" for of in _hits(models)]
        shown.add_row(scenario, f"{models['cf']['hit@1']['n']:,}", *cells)
    return shown


def for_page(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `report.write_report` shows of `report`'s figures and picture."""
    picture = (folder / PICTURE).read_bytes()
    return {"sentences": sentences(found), "columns": RANKED, "ranking": found["ranking"], "picture": picture}


def _hits(models: dict[str, Any]) -> list[dict[str, float]]:
    return [models[name]["hit@1"] for name in RANKED]


def main_categories(categories: list[list[str]], most: int = CATEGORIES) -> list[str]:
    """One name for each item: its rarest category among the `most` commonest that not nearly all items share, or
    `other`."""
    counts = collections.Counter(name for names in categories for name in dict.fromkeys(names))
    telling = [name for name, n in counts.most_common() if n < 0.9 * len(categories)][:most]
    rank = {name: i for i, name in enumerate(telling)}
    return [max((n for n in names if n in rank), key=rank.__getitem__, default="other") for names in categories]


def plane(points: Float[np.ndarray, "points joint"]) -> Float[np.ndarray, "points 2"]:
    """Principal components: each point along the two directions in which the points differ most."""
    centred = points - points.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    return centred @ directions[:2].T


def draw(aligned: Aligned, dataset: Dataset, path: Path, *, seed: int) -> None:
    """A picture of e and of q of a seeded sample of items, in the plane of both, coloured by category."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    some = np.sort(1 + np.random.default_rng(seed).permutation(len(aligned.e) - 1)[:SAMPLE])
    at = plane(np.concatenate([aligned.e[some], aligned.q[some]]))
    names = np.array(main_categories(dataset.categories()[1:]))[some - 1]
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    shown = [name for name, _ in collections.Counter(names.tolist()).most_common() if name != "other"]
    for panel, points, what in zip(panels, np.split(at, 2), ("e (collaborative)", "q (text)"), strict=True):
        for name in [*(["other"] if "other" in names else []), *shown]:
            mine = names == name
            colour = "0.75" if name == "other" else COLOURS[shown.index(name)]
            panel.scatter(*points[mine].T, s=8, c=colour, label=name.replace("$", r"\$"), alpha=0.8, linewidths=0)
        panel.set_title(what)
        panel.set_xlabel("first principal component of e and q")
    panels[0].set_ylabel("second")
    if shown:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", markerscale=2, frameon=False)
    with write_atomically(path) as file:
        figure.savefig(file, format="png", dpi=120)


def report(
    aligned: Aligned,
    cf: CFModel,
    dataset: Dataset,
    folder: Path,
    *,
    seed: int,
    console: Console,
    targets: Literal["last", "all"] = "last",
) -> dict[str, Any]:
    """Writes metrics.json and embeddings.png into `folder`, and prints the figures."""
    found = figures(aligned, dataset, seed=seed, targets=targets)
    found["ranking"] = embedding_only.figures(aligned, cf, dataset, seed=seed)
    write_json(folder / "metrics.json", found)
    for sentence in sentences(found):
        say(console, f"alignment: {sentence}")
    console.print(table(found))
    draw(aligned, dataset, folder / PICTURE, seed=seed)
    say(console, f"alignment: written {folder / 'metrics.json'} and {folder / PICTURE}")
    return found
