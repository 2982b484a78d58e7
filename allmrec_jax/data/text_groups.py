"""The texts of a batch, sorted by length and cut into groups of a few static shapes, so that little is padding.

    lengths 90 40 38 12 11 9 8      shapes (rows x width) 1 x 96, 2 x 40, 4 x 16      groups (90) (40 38) (12 11 9 8)

A compiled program has one branch for each shape and runs any number of groups, so that a batch of whatever lengths
compiles nothing new. The shapes are chosen from the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int, Int32, Integer

Shape = tuple[int, int]  # rows, width in tokens

OVERHEAD = 20  # what one more group costs beside its tokens, in tokens: a pass over the layers' gradients
COMPILING = 8000  # what one more shape costs, once, in tokens: seconds of compilation
MOST_SHAPES, MOST_WIDTHS = 16, 24
MULTIPLE = 4  # widths are multiples of it


def text_widths(lengths: Integer[np.ndarray, " texts"], most: int = MOST_WIDTHS) -> list[int]:
    """At most `most` widths, ascending, with the fewest tokens if each text is padded to the next one.

    >>> text_widths(np.array([3, 5, 30, 31, 32]), most=2)
    [8, 32]
    """
    widths, counts = np.unique(-(-np.asarray(lengths) // MULTIPLE) * MULTIPLE, return_counts=True)
    texts = np.concatenate([[0], np.cumsum(counts)])
    best = [(np.append(0, np.full(len(widths), np.inf)), None)]  # tokens of the first n widths' texts, and where cut
    for _ in range(min(most, len(widths))):
        # ways[m, n]: the texts of widths m to n - 1 are all padded to the last of these.
        ways = best[-1][0][:, None] + (texts[None, 1:] - texts[:, None]) * widths[None]
        ways = np.where(np.arange(len(texts))[:, None] <= np.arange(len(widths))[None], ways, np.inf)
        best.append((np.append(0, ways.min(axis=0)), ways.argmin(axis=0)))
    chosen, n = [], len(widths)
    for _, cuts in reversed(best[1:]):
        if n == 0:
            break
        chosen.append(int(widths[n - 1]))
        n = int(cuts[n - 1])
    return chosen[::-1]


def choose_shapes(
    batches: list[Integer[np.ndarray, " _"]],
    lengths: Integer[np.ndarray, " all"],
    most_tokens: int,
    limit: int,
    steps: int,
) -> tuple[Shape, ...]:
    """At most `MOST_SHAPES` shapes, by which the groups of `batches` cost least; chosen one after the other, as long as
    one saves more than its compilation costs.

    Args:
      batches: the lengths of some batches' texts.
      lengths: of all texts, the longest of which fits too.
      most_tokens: of a group of several texts.
      limit: of a text, in tokens: the encoder's positions.
      steps: batches there will be.
    """
    samples = np.zeros((len(batches), max(map(len, batches))), np.int64)
    for sample, of_batch in zip(samples, batches, strict=True):
        sample[: len(of_batch)] = -np.sort(-of_batch)
    counts = [len(of_batch) for of_batch in batches]
    widths = sorted({min(width, limit) for width in text_widths(lengths)})
    rows = sorted({r for base in (1, 3) for k in range(12) if (r := base << k) <= samples.shape[1]})
    left = [(r, width) for width in widths for r in rows if r == 1 or r * width <= most_tokens]
    chosen, cost = [(1, widths[-1])], np.inf

    def best_with(others: list[Shape]) -> tuple[float, Shape]:
        ways = np.array([[*others, shape] for shape in left])
        costs, _ = _cover(samples, ways[..., 0], ways[..., 1])
        totals = costs[np.arange(len(counts)), :, counts].sum(axis=0)
        return float(totals.min()), left[int(totals.argmin())]

    while len(chosen) < MOST_SHAPES:
        total, shape = best_with(chosen)
        if (cost - total) / len(batches) * steps < COMPILING:
            break
        cost = total
        chosen.append(shape)
    for place in range(1, len(chosen)):  # the first ones were chosen without the later ones
        chosen[place] = best_with(chosen[:place] + chosen[place + 1 :])[1]
    return tuple(sorted(set(chosen), key=lambda shape: shape[::-1]))


def _cover(
    lengths: Integer[np.ndarray, "batches texts"],
    rows: Integer[np.ndarray, "ways shapes"],
    widths: Integer[np.ndarray, "ways shapes"],
) -> tuple[np.ndarray, np.ndarray]:
    """The least cost of the first n texts of each batch (longest first) by each way, and the last group's shape.

    A group takes as many texts as it can: what covers more texts covers fewer as well.
    """
    count = lengths.shape[1]
    too_long = np.sum(lengths[:, None, None] > widths[None, :, :, None], axis=-1)
    price = (rows * widths + OVERHEAD)[None]
    best = np.zeros((len(lengths), len(rows), count + 1))
    last = np.zeros(best.shape, np.int64)
    for n in range(1, count + 1):
        start = np.maximum(n - rows[None], too_long)
        before = np.take_along_axis(best, np.minimum(start, n - 1), axis=-1)
        ways = np.where(start < n, before + price, np.inf)
        last[..., n] = ways.argmin(axis=-1)
        best[..., n] = np.take_along_axis(ways, last[..., n, None], axis=-1)[..., 0]
    return best, last


@dataclass(frozen=True)
class Groups:
    """The texts of a step, one device's groups after the other's.

    shape: which one each group has, or -1 where there is no group.
    texts, shares: what stands in its rows, and what weight it has in the loss; 0 in rows that are empty.
    tokens: (real, computed) of the whole step.
    """

    shape: Int32[np.ndarray, " groups"]
    texts: Int32[np.ndarray, "groups rows"]
    shares: Float32[np.ndarray, "groups rows"]
    tokens: tuple[int, int]


def group(
    texts: Int[np.ndarray, " distinct"],
    shares: Float32[np.ndarray, " distinct"],
    lengths: Integer[np.ndarray, " all"],
    shapes: tuple[Shape, ...],
    *,
    most: int,
    devices: int = 1,
) -> Groups:
    """Distinct texts in groups of the least cost; sorted by length they are dealt to devices in turn.

    Args:
      lengths: in tokens, of all texts there are.
      most: texts that a device may get; there are as many groups, most of them not used.
    """
    rows, widths = np.array(shapes).T[:, None]
    longest_first = np.argsort(-lengths[texts], kind="stable")
    shape = np.full((devices, most), -1, np.int32)
    of_groups = np.zeros((devices, most, int(rows.max())), np.int32)
    share_of = np.zeros(of_groups.shape, np.float32)
    for device in range(devices):
        mine = longest_first[device::devices]
        _, last = _cover(lengths[texts[mine]][None], rows, widths)
        n, number = len(mine), 0
        while n:
            kind = last[0, 0, n]
            too_long = np.sum(lengths[texts[mine]] > widths[0, kind])
            part = mine[max(n - rows[0, kind], too_long) : n]
            shape[device, number] = kind
            of_groups[device, number, : len(part)] = texts[part]
            share_of[device, number, : len(part)] = shares[part]
            n, number = n - len(part), number + 1
    used = shape[shape >= 0]
    tokens = int(lengths[texts].sum()), int((rows * widths)[0, used].sum())
    flat = devices * most
    return Groups(shape.reshape(flat), of_groups.reshape(flat, -1), share_of.reshape(flat, -1), tokens)
