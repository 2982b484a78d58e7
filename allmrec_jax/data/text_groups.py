"""The texts of a batch, packed into rows of one width or two, and the rows into groups of a few static shapes.

    lengths 90 40 38 12 11 9 8     rows of width 96     (90) (40 38 12) (11 9 8)
                                   groups               2 x 96  (90) (40 38 12)     1 x 96  (11 9 8)

A compiled program has one branch for each shape and runs any number of groups, so that a batch of whatever lengths
compiles nothing new. The shapes are chosen from the data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float32, Int, Int32, Integer

Shape = tuple[int, int]  # rows, width in tokens

OVERHEAD = 30  # what one more group costs beside its tokens, in tokens: a pass over the layers' gradients
SIZES = (*range(1, 13), *(base << k for k in range(3, 9) for base in (2, 3)))  # rows that a group may have
MOST_SIZES = 3  # of the groups of one width
MOST_TEXTS = 16  # of a row
PADDING, DEARER = 0.09, 0.05  # from which share of padding on less of it may cost more, and how much
SHORT_ROWS = 128  # up to this width rows may be wider than the longest text
MULTIPLE, MOST_WIDTHS = 4, 24
ABSENT = np.iinfo(np.int32).max  # where a text starts that is not there


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


def pack(lengths: Integer[np.ndarray, " texts"], widths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Rows, each with its width and its texts: each text, longest first, stands in the first row that has room for it,
    or opens one of the least width that holds it.

    >>> pack(np.array([9, 90, 12, 40, 38, 8]), [96])
    [(96, [1]), (96, [3, 4, 2]), (96, [0, 5])]
    """
    room, rows = np.zeros(len(lengths), np.int64), []
    for text in np.argsort(-lengths, kind="stable").tolist():
        fits = room[: len(rows)] >= lengths[text]
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            room[row] = min(width for width in widths if width >= lengths[text])
            rows.append((int(room[row]), []))
        rows[row][1].append(text)
        room[row] = room[row] - lengths[text] if len(rows[row][1]) < MOST_TEXTS else -1
    return rows


def choose_shapes(
    batches: list[Integer[np.ndarray, " _"]], longest: int, *, most_tokens: int, span: float, compiling: float
) -> tuple[Shape, ...]:
    """The shapes with which the groups of `batches`, and compiling them, cost least; where much of that is padding,
    those with the least padding of all that cost little more.

    Args:
      batches: the lengths of some batches' texts.
      longest: of all texts, in tokens.
      most_tokens: of a group of several rows.
      span: the width at which attention costs as much as all the rest of the encoder.
      compiling: what one more shape costs a batch, in tokens.
    """
    wide = -(-longest // MULTIPLE) * MULTIPLE
    ways = [(wide,), *((width,) for width in range(wide + MULTIPLE, SHORT_ROWS + 1, MULTIPLE))]
    ways += [(narrow, wide) for part in (2, 3, 4, 6) if (narrow := wide * part // 64 * 8) > 0]
    found = []
    for widths in ways:
        rows = [[width for width, _ in pack(lengths, widths)] for lengths in batches]
        of_widths = []
        for width in widths:
            counts = np.array([of_batch.count(width) for of_batch in rows])
            of_widths.append(list(_choose_sizes(counts, width, most_tokens, 1 + width / span, compiling)))
        for choice in itertools.product(*of_widths):
            costs, tokens, shapes = zip(*choice, strict=True)
            found.append((sum(costs), sum(tokens), tuple(itertools.chain(*shapes))))
    real = float(np.mean([lengths.sum() for lengths in batches]))
    cheapest, tokens, shapes = min(found)
    if real > (1 - PADDING) * tokens:
        return shapes
    return min((tokens, cost, shapes) for cost, tokens, shapes in found if cost <= (1 + DEARER) * cheapest)[2]


def _choose_sizes(
    counts: Int[np.ndarray, " batches"], width: int, most_tokens: int, a_token: float, compiling: float
) -> Iterator[tuple[float, float, list[Shape]]]:
    """For one size of group, two and more: a batch's cost, the tokens computed for it, and the cheapest shapes."""
    more = np.append(counts, counts.max() + 1)  # some batch will have more rows than any of these
    sizes = [r for r in SIZES if r == 1 or (r <= more.max() and r * width <= most_tokens)]
    for k in range(1, min(MOST_SIZES, len(sizes)) + 1):
        chosen = np.array(list(itertools.combinations(sizes, k)))
        cost, tokens, _ = _cover(chosen, width, int(more.max()))
        costs = cost[:, more].mean(axis=1) * a_token + compiling * k
        i = int(costs.argmin())
        yield float(costs[i]), float(tokens[i, counts].mean()), [(int(r), width) for r in chosen[i]]


def _cover(
    sizes: Integer[np.ndarray, "ways sizes"], width: int, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of 0, 1, ... `most` rows in groups of these sizes, each (ways, most + 1): the least cost, the tokens computed,
    and the size of one of the groups."""
    every = np.arange(len(sizes))
    cost, tokens, one = (np.zeros((len(sizes), most + 1), kind) for kind in (float, np.int64, np.int64))
    for n in range(1, most + 1):
        costs = cost[every[:, None], np.maximum(n - sizes, 0)] + sizes * width + OVERHEAD
        best = costs.argmin(axis=1)
        cost[:, n], one[:, n] = costs[every, best], sizes[every, best]
        tokens[:, n] = tokens[every, np.maximum(n - one[:, n], 0)] + one[:, n] * width
    return cost, tokens, one


@lru_cache
def _plans(shapes: tuple[Shape, ...], most: int) -> tuple[dict[int, list[list[int]]], int]:
    """For each width the sizes of the groups of 0, 1, ... `most` rows; and how many groups there are at most."""
    plans = {}
    for width in {width for _, width in shapes}:
        _, _, one = _cover(np.array([[r for r, w in shapes if w == width]]), width, most)
        plans[width] = [[]]
        for n in range(1, most + 1):
            size = int(one[0, n])
            plans[width].append([size, *plans[width][max(0, n - size)]])
    return plans, sum(max(map(len, of_width)) for of_width in plans.values())


@dataclass(frozen=True)
class Groups:
    """The texts of a step, one device's groups after the other's.

    shape: which one each group has, or -1 where there is no group.
    texts, starts, shares: what stands in its rows, from which place on (`ABSENT` where there is no text), and what
      weight it has in the loss.
    tokens: (real, computed) of the whole step.
    """

    shape: Int32[np.ndarray, " groups"]
    texts: Int32[np.ndarray, "groups rows texts"]
    starts: Int32[np.ndarray, "groups rows texts"]
    shares: Float32[np.ndarray, "groups rows texts"]
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
    """Distinct texts in rows, and these in groups, on each device; sorted by length they are dealt to devices in turn.

    Args:
      lengths: in tokens, of all texts there are.
      most: texts that a device may get.
    """
    plans, groups = _plans(shapes, most)
    room = (devices, groups, max(rows for rows, _ in shapes), min(most, MOST_TEXTS))
    shape = np.full(room[:2], -1, np.int32)
    placed, starts, share_of = np.zeros(room, np.int32), np.full(room, ABSENT, np.int32), np.zeros(room, np.float32)
    computed = 0
    for device, mine in enumerate(deal(lengths[texts], devices)):
        rows, number = pack(lengths[texts[mine]], sorted(plans)), 0
        for width, plan in plans.items():
            of_width = [row for row_width, row in rows if row_width == width]
            for size in plan[len(of_width)]:
                shape[device, number] = shapes.index((size, width))
                computed += size * width
                for r, row in enumerate(of_width[:size]):
                    at, chosen = (device, number, r, slice(len(row))), mine[row]
                    ends = np.cumsum(lengths[texts[chosen]])
                    placed[at], share_of[at], starts[at] = texts[chosen], shares[chosen], np.append(0, ends[:-1])
                of_width, number = of_width[size:], number + 1
    flat = [part.reshape(-1, *part.shape[2:]) for part in (shape, placed, starts, share_of)]
    return Groups(*flat, (int(lengths[texts].sum()), computed))


def deal(lengths: Integer[np.ndarray, " texts"], devices: int) -> list[Int[np.ndarray, " _"]]:
    """Which texts each device gets: one after the other in turn, the longest first."""
    longest_first = np.argsort(-lengths, kind="stable")
    return [longest_first[device::devices] for device in range(devices)]
