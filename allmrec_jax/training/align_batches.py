"""Stage 1's batches, made on the host: which rows a step has, and its distinct texts in groups of static shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, Key

from allmrec_jax.data import batches, text_groups
from allmrec_jax.training.align_step import draw

SAMPLES, SAMPLED_TEXTS = 64, 2000  # steps, and about how many of their texts, that decide which shapes are compiled
PADDING = 0.1  # from here on it is said why


Order = Callable[[int], Int32[np.ndarray, " users"]]  # of an epoch


def in_file_order(n: int) -> Order:
    """As the users stand in the data, in each epoch."""
    return lambda _: np.arange(n, dtype=np.int32)


def shuffled(key: Key[Array, ""], n: int) -> Order:
    """Shuffled anew for each epoch."""
    key = jax.device_put(key, host())
    return lru_cache(1)(lambda epoch: np.asarray(batches.epoch_order(key, epoch, n)))


class Steps:
    """The rows of each optimiser step, as `align_step.draw` gives them, on the host.

    They are drawn on the CPU, also beside an accelerator: there, fetching them would wait for the step in flight.

    Args:
      spans: `align_step.spans` of an epoch; rows: the most users of a step.
      drawing: what `draw` reads, with `key`; order: of the users.
    """

    def __init__(
        self,
        spans: Int32[np.ndarray, "steps 2"],
        rows: int,
        drawing: Mapping[str, Any],
        order: Order,
        key: Key[Array, ""],
    ):
        self.spans, self.rows, self.order = spans, rows, order
        self._given = jax.device_put((dict(drawing), key), host())
        self._draw = jax.jit(lambda given, order, span, i: draw(given[0], order, span, jnp.arange(rows), i, given[1]))

    def __call__(self, i: int) -> dict[str, np.ndarray]:
        epoch, at = divmod(i, len(self.spans))
        return jax.device_get(self._draw(self._given, self.order(epoch), self.spans[at], i))


def host() -> jax.Device:
    """A CPU; or whatever there is, where JAX was told to use nothing but an accelerator."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def texts_of(drawn: Mapping[str, np.ndarray], both: bool) -> tuple[np.ndarray, np.ndarray]:
    """A step's distinct items, and how often each stands in it as a positive or, if `both`, as a negative."""
    items = [drawn[name][drawn["real"]] for name in ("positive", "negative")[: 1 + both]]
    return np.unique(np.concatenate(items), return_counts=True)


def with_texts(
    drawn: Mapping[str, np.ndarray],
    lengths: Int[np.ndarray, " texts"],
    shapes: tuple[text_groups.Shape, ...],
    *,
    both: bool,
    devices: int = 1,
) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
    """What `align_step.make_step` reads: a step's rows, and its texts in groups. And how many tokens these have, real
    and computed."""
    texts, counts = texts_of(drawn, both)
    shares = (counts / drawn["real"].sum()).astype(np.float32)
    most = math.ceil(len(drawn["real"]) * (1 + both) / devices)
    groups = text_groups.group(texts, shares, lengths, shapes, most=most, devices=devices)
    placed = {"shape": groups.shape, "texts": groups.texts, "starts": groups.starts, "shares": groups.shares}
    return {**drawn, **placed}, groups.tokens


class TextBatches:
    """The batches of training that trains the encoder too, the shapes that suit them, and counts of what was made.

    Args:
      lengths: of all texts, in tokens.
      both: whether the negatives' texts are needed, too.
      training: steps of the whole training.
      width: of the encoder's hidden states.
      group_tokens: of a group; None goes by the backend.
    """

    def __init__(
        self,
        steps: Steps,
        lengths: Int[np.ndarray, " texts"],
        *,
        both: bool,
        devices: int,
        training: int,
        width: int,
        group_tokens: int | None = None,
    ):
        self.steps, self.lengths, self.both, self.devices = steps, lengths, both, devices
        self._options = {"most_tokens": group_tokens or most_tokens(), "span": 2 * width}  # measured, see `compiling`
        number = min(SAMPLES, max(4, SAMPLED_TEXTS // (steps.rows * (1 + both))))
        some = np.unique(np.linspace(0, training - 1, number).astype(int))
        texts = [texts_of(steps(int(i)), both)[0] for i in some]
        self._samples = [lengths[of_step[text_groups.deal(lengths[of_step], devices)[0]]] for of_step in texts]
        self.shapes = self._choose(compiling() / training)
        self.made = self.real = self.computed = self.distinct = self.entries = 0

    def _choose(self, compiling: float) -> tuple[text_groups.Shape, ...]:
        longest = int(self.lengths.max())
        return text_groups.choose_shapes(self._samples, longest, compiling=compiling, **self._options)

    def __call__(self, i: int) -> dict[str, np.ndarray]:
        """What `align_step.make_step` reads in step i."""
        drawn = self.steps(i)
        batch, (real, computed) = with_texts(drawn, self.lengths, self.shapes, both=self.both, devices=self.devices)
        self.made, self.real, self.computed = self.made + 1, self.real + real, self.computed + computed
        self.distinct += int((batch["starts"] < text_groups.ABSENT).sum())
        self.entries += int(drawn["real"].sum()) * (1 + self.both)
        return batch

    def said(self) -> str:
        """What was made of the batches so far, in words."""
        padding, why = 1 - self.real / self.computed, ""
        if padding >= PADDING:
            few = self._choose(0) != self.shapes
            why = " (few steps: fewer shapes compile faster)" if few else " (few texts a step to fill rows with)"
        return (
            f"{padding:.1%} of the encoder's tokens were padding{why}; {len(self.shapes)} text shapes in one compiled "
            f"program; {self.distinct / self.entries:.0%} of the texts of a batch were distinct and were encoded"
        )


def most_tokens() -> int:
    """Of a group of texts: what a CPU's caches hold, or what keeps an accelerator busy."""
    return 1024 if jax.default_backend() == "cpu" else 16384


def compiling() -> int:
    """What one more shape costs, in tokens.

    Measured on 2 CPU cores with all-MiniLM-L6-v2: 4 to 5 seconds, and .6 to .7 ms a token; attention costs there as
    much as all the rest at a width of twice the hidden states'. Not measured on accelerators, where as many seconds
    would be millions of tokens, but the shapes are few in any case.
    """
    return 6000 if jax.default_backend() == "cpu" else 1000
