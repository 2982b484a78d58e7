"""How long prompts are and how many rows the tables have: from the data where it is prepared, else assumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from allmrec_jax.config import Experiment
from allmrec_jax.data.packing import TIER, Room, room_for
from allmrec_jax.errors import UserError
from allmrec_jax.models.llm import sizes

LENGTH = 1024
AROUND = 64  # tokens of a prompt beside its titles, about
COUNTS = {
    "movies-and-tv": (297_498, 59_944),
    "video-games": (64_073, 33_614),
    "luxury-beauty": (9_930, 6_141),
    "toys-and-games": (30_831, 61_081),
    "ml-100k": (943, 1_682),
}
"""Users and items of the paper's data sets, by how their names end."""
UNKNOWN = (100_000, 100_000)


class Lengths(NamedTuple):
    """Shapes of a row in training and in ranking, rows of x_u and of e, and where all that is from."""

    train: Room
    rank: Room
    users: int
    items: int
    source: str


def lengths_of(experiment: Experiment, llm: Any, length: int | None = None) -> Lengths:
    """Of an experiment with an LLM of this config.

    Args:
      length: tokens of a prompt with its answer; None takes them from the data, or else `LENGTH`.

    Raises:
      UserError: if the length is not one that the LLM reads.
    """
    if length is None and (found := _from_data(experiment, llm)) is not None:
        return found
    source = f"{'--length' if length else 'assumed length'}"
    length = length or min(LENGTH, llm.context)
    if not 2 * AROUND <= length <= llm.context:
        raise UserError(f"--length {length} is not between {2 * AROUND} and the LLM's context of {llm.context} tokens")
    config, tested = experiment.llm, experiment.evaluation.candidates
    title = -(-(length - AROUND) // (config.history + config.candidates + 1))
    answers = config.candidates if config.choice_weight else 1
    slots = _up(config.history + config.candidates, 8)
    train = Room(_up(length + (answers - 1) * title, TIER), _up(answers * (title + 1), 64), slots)
    rank = Room(_up(length + (tested - 1) * title, TIER), _up(tested * (title + 1), 64), slots)
    name = experiment.data.name
    users, items = next((n for end, n in COUNTS.items() if name.endswith(end)), UNKNOWN)
    known = "the paper's" if (users, items) != UNKNOWN else "assumed"
    source = f"{source} of {length} tokens, {known} {users:,} users and {items:,} items"
    return Lengths(train, rank, users, items + 1, source)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _from_data(experiment: Experiment, llm: Any) -> Lengths | None:
    """The longest tier of stage 2's batches, where the data set is prepared and the tokenizer is there."""
    from allmrec_jax.data.dataset import MANIFEST, open_dataset
    from allmrec_jax.data.prompts import PromptBuilder, template_of
    from allmrec_jax.training.inject import Examples

    config, folder = experiment.llm, sizes.place_of(experiment.llm.llm)
    if folder is None or not (Path(experiment.data.name) / MANIFEST).is_file():
        return None
    try:
        tokenizer = sizes.tokenizer_at(folder)
    except (UserError, OSError):
        return None
    dataset = open_dataset(experiment.data.name)
    builder = PromptBuilder(tokenizer, dataset.titles(), template_of(config), context=llm.context)
    keys = jax.random.split(jax.random.key(experiment.seed))
    examples = Examples(config, dataset, builder, *keys)
    tiers = examples.tiers(1, max(1, round(examples.per_epoch * config.epochs)))
    tested = dataclasses.replace(config, choice_weight=1.0, candidates=experiment.evaluation.candidates)
    ranked = Examples(tested, dataset, builder, *keys)
    some = np.linspace(0, ranked.per_epoch - 1, 16).astype(int)
    rank = [room_for(*ranked.prompts(int(i), ranked.rows(int(i)))[:2]) for i in np.unique(some)]
    train = tiers.room._replace(time=int(max(tiers.widths)))
    most = Room(*(max(column) for column in zip(*rank, strict=True)))
    source = f"the longest of {dataset.name}, {train.time} tokens"
    return Lengths(train, most, len(examples.users), dataset.n_items + 1, source)
