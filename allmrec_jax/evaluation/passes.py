"""Users' prompts on their way through the frozen LLM, for whatever is read off there: in parts of few static shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from allmrec_jax.data import packing
from allmrec_jax.data.prompts import Items, Prompt, PromptBuilder
from allmrec_jax.models import projection
from allmrec_jax.models.llm.load import FrozenLLM
from allmrec_jax.training.inject import freeze
from allmrec_jax.training.mesh import Mapping, map_over_data

SAMPLES = 64  # users whose prompts decide which lengths are compiled
MOST_TIERS, USERS_OF_A_TIER = 8, 64  # lengths of rows that are compiled, and users that make one more worth while


def item_vectors(
    F_I: Any, e: Float[np.ndarray, "items joint"], devices: Sequence[Any], how: Mapping = "shard_map"
) -> Float[np.ndarray, "items h"]:
    """O_i = F_I(e_i) of the whole catalogue, cut over the devices."""
    rows = -(-len(e) // len(devices)) * len(devices)
    mapped = map_over_data(projection.F_I, devices, batched=(False, True), how=how, batched_outputs=True)
    return np.asarray(mapped(F_I, np.pad(e, ((0, rows - len(e)), (0, 0)))))[: len(e)]


class Part(NamedTuple):
    """Some users on their way: those of the first rows; the others only fill up."""

    users: Int[np.ndarray, " users"]
    tables: Any
    batch: dict[str, np.ndarray]


class Passes:
    """An LLM with its heads, and the users of a pass.

    `heads=None` is the LLM alone (then `builder` must not inject). Users go through the LLM in parts of like lengths;
    `arrange` says in which order they are best asked for, and chooses the lengths that are compiled.

    Args:
      e: what F_I reads of each item.
      batch: users of one pass on accelerators; a CPU takes one a device, so that there is next to no padding.
    """

    def __init__(
        self,
        llm: FrozenLLM,
        heads: Any,
        *,
        builder: PromptBuilder,
        e: np.ndarray,
        mesh: Mesh,
        batch: int = 4,
        how: Mapping = "shard_map",
    ):
        self.llm, self.heads, self.builder, self.mesh = llm, heads, builder, mesh
        self.frozen, self.shardings = freeze(llm, mesh)
        self.O_i = None if heads is None else jnp.asarray(item_vectors(heads["F_I"], e, list(mesh.devices.flat), how))
        self.F_U = jax.jit(projection.F_U)
        self.rows = mesh.shape["data"] if jax.default_backend() == "cpu" else batch
        self.tiers: packing.Tiers | None = None

    def answers(self, candidates: Int[np.ndarray, "users c"]) -> packing.Answers:
        """What stands behind each prompt: the tokens of each candidate's answer."""
        return [self.builder.answers(row.tolist()) for row in candidates]

    def arrange(self, histories: Sequence[Items], candidates: Int[np.ndarray, "users c"]) -> Int[np.ndarray, " users"]:
        """The users, the longest prompts first; from some of them the lengths that are compiled."""
        items = np.unique(np.concatenate([candidates.ravel(), *map(np.asarray, histories)]).astype(np.int64))
        tokens = np.zeros(items.max(initial=0) + 1, np.int64)
        tokens[items] = [len(answer) for answer in self.builder.answers(items.tolist())]
        length = 2 * tokens[candidates].sum(1)
        length += np.array([tokens[np.asarray(h, np.int64)].sum() for h in histories], np.int64)
        order = np.argsort(-length, kind="stable")
        if len(order):
            some = order[np.unique(np.linspace(0, len(order) - 1, SAMPLES).astype(int))]
            prompts = self.builder.prompts([histories[u] for u in some], candidates[some])
            self._choose_tiers(prompts, self.answers(candidates[some]), len(order))
        return order

    def _choose_tiers(self, prompts: Sequence[Prompt], answers: packing.Answers, users: int) -> None:
        lengths = np.array(list(map(packing.row_length, prompts, answers)))
        tokens = np.array([sum(map(len, many)) for many in answers])
        most = max(1, min(MOST_TIERS, users // USERS_OF_A_TIER))
        room = packing.room_for(prompts, answers)
        self.tiers = packing.Tiers(self.rows, lengths, room, most=most, answers=tokens)

    def parts(
        self,
        histories: Sequence[Items],
        candidates: Int[np.ndarray, "users c"],
        x_u: Float[np.ndarray, "users d"],
        asked: Int[np.ndarray, "users a"] | None = None,
    ) -> Iterator[Part]:
        """The users in parts, and what the LLM reads in place of tokens: O_u of the part's rows, O_i of all items.

        Args:
          asked: whose answers stand behind the prompt, if not those of the candidates in it.
        """
        prompts = self.builder.prompts(histories, candidates)
        answers = self.answers(candidates if asked is None else asked)
        if not prompts:
            return
        if self.tiers is None:
            self._choose_tiers(prompts, answers, len(prompts))
        for batch in self.tiers.parts(prompts, answers, rows=range(len(prompts))):
            rows, real = batch["rows"], int((batch["row_share"] > 0).sum())
            tables = None
            if self.heads is not None:
                tables = {"O_u": self.F_U(self.heads["F_U"], x_u[rows]), "O_i": self.O_i}
            yield Part(rows[:real], tables, batch | {"rows": np.arange(len(rows), dtype=np.int32)})

    @property
    def padding(self) -> float:
        """The share of the LLM's tokens so far that were padding."""
        return 0.0 if self.tiers is None or not self.tiers.computed else 1 - self.tiers.real / self.tiers.computed
