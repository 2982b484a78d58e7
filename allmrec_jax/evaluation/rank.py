"""`rank`: the log-likelihood of every candidate's title, all candidates of a user in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from rich.console import Console

from allmrec_jax.data import packing
from allmrec_jax.data.prompts import Items, Prompt, PromptBuilder
from allmrec_jax.errors import UserError
from allmrec_jax.files import write_atomically
from allmrec_jax.models import projection
from allmrec_jax.models.llm.load import FrozenLLM
from allmrec_jax.progress import progress, say
from allmrec_jax.training.inject import freeze
from allmrec_jax.training.inject_step import make_scorer
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


class Ranker:
    """Scores of users' candidates: `(histories, candidates (users, c), x_u (users, d)) -> (users, c)`.

    `heads=None` ranks by the LLM alone (then `builder` must not inject). Users go through the LLM in parts of like
    lengths; `arrange` says in which order they are best asked for, and chooses the lengths that are compiled.

    Args:
      candidates: of each user.
      normalise: divide by the number of the title's tokens (`score="mean"`).
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
        candidates: int,
        normalise: bool = True,
        batch: int = 4,
        logit_rows: int | None = None,
        how: Mapping = "shard_map",
    ):
        self.builder, self.heads = builder, heads
        self.frozen, shardings = freeze(llm, mesh)
        options = {"answers": candidates, "normalise": normalise, "logit_rows": logit_rows}
        self.scorer = make_scorer(llm.graph, shardings, mesh, **options)
        self.O_i = None if heads is None else jnp.asarray(item_vectors(heads["F_I"], e, list(mesh.devices.flat), how))
        self.F_U = jax.jit(projection.F_U)
        self.rows = mesh.shape["data"] if jax.default_backend() == "cpu" else batch
        self.tiers: packing.Tiers | None = None

    def arrange(self, histories: Sequence[Items], candidates: Int[np.ndarray, "users c"]) -> Int[np.ndarray, " users"]:
        """The users, the longest prompts first; from some of them the lengths that are compiled."""
        items = np.unique(np.concatenate([candidates.ravel(), *map(np.asarray, histories)]).astype(np.int64))
        tokens = np.zeros(items.max(initial=0) + 1, np.int64)
        tokens[items] = [len(answer) for answer in self.builder.answers(items.tolist())]
        length = 2 * tokens[candidates].sum(1) + [tokens[np.asarray(h, np.int64)].sum() for h in histories]
        order = np.argsort(-length, kind="stable")
        some = order[np.unique(np.linspace(0, len(order) - 1, SAMPLES).astype(int))] if len(order) else order
        self._choose_tiers(*self.texts([histories[u] for u in some], candidates[some]), users=len(order))
        return order

    def texts(self, histories: Sequence[Items], candidates: np.ndarray) -> tuple[list[Prompt], packing.Answers]:
        """The prompt of each user, and the tokens of each candidate's answer."""
        prompts = self.builder.prompts(histories, candidates)
        return prompts, [self.builder.answers(row.tolist()) for row in candidates]

    def _choose_tiers(self, prompts: Sequence[Prompt], answers: packing.Answers, users: int) -> None:
        if prompts:
            most = max(1, min(MOST_TIERS, users // USERS_OF_A_TIER))
            lengths = np.array(list(map(packing.row_length, prompts, answers)))
            tokens = np.array([sum(map(len, many)) for many in answers])
            self.tiers = packing.Tiers(
                self.rows, lengths, packing.room_for(prompts, answers), most=most, answers=tokens
            )

    def __call__(self, histories: Sequence[Items], candidates: np.ndarray, x_u: np.ndarray) -> np.ndarray:
        prompts, answers = self.texts(histories, candidates)
        if self.tiers is None:
            self._choose_tiers(prompts, answers, len(prompts))
        scores, pending = np.empty(candidates.shape, np.float32), []
        for part in self.tiers.parts(prompts, answers, rows=range(len(prompts))) if len(prompts) else ():
            who, real = part["rows"], part["row_share"] > 0
            tables = None
            if self.heads is not None:
                part |= {"rows": np.arange(len(who), dtype=np.int32)}
                tables = {"O_u": self.F_U(self.heads["F_U"], x_u[who]), "O_i": self.O_i}
            pending.append((who[real], real, self.scorer(tables, self.frozen, part)))
        for who, real, found in pending:
            scores[who] = np.asarray(found)[real]
        return scores

    @property
    def padding(self) -> float:
        """The share of the LLM's tokens so far that were padding."""
        return 0.0 if self.tiers is None or not self.tiers.computed else 1 - self.tiers.real / self.tiers.computed


def score_users(
    ranker: Ranker,
    histories: Sequence[Items],
    candidates: Int[np.ndarray, "users candidates"],
    x_u: Float[np.ndarray, "users d"],
    *,
    saved: Path,
    label: str,
    batch: int,
    save_every: int = 8,
    console: Console | None = None,
) -> Float[np.ndarray, "users candidates"]:
    """Scores of all users, kept in `saved` every few batches so that an interrupted evaluation goes on.

    The users with the longest prompts come first: what does not fit fails at once.

    Raises:
      UserError: if a score is not finite.
    """
    scores = np.full(candidates.shape, np.nan, np.float32)
    if saved.is_file():
        try:
            with open(saved, "rb") as file:
                found = np.load(file)
            if found.shape == scores.shape:
                scores = found
        except Exception:  # whatever a damaged header makes NumPy raise
            say(console or Console(), f"{saved} is damaged; scoring again")
    todo = np.flatnonzero(np.isnan(scores).any(1))
    todo = todo[ranker.arrange([histories[u] for u in todo], candidates[todo])]
    before = len(scores) - len(todo)
    with progress(label, len(scores), done=before, unit="users", console=console) as bar:
        for k, start in enumerate(range(0, len(todo), batch)):
            chosen = todo[start : start + batch]
            scores[chosen] = ranker([histories[u] for u in chosen], candidates[chosen], x_u[chosen])
            if not np.isfinite(scores[chosen]).all():
                raise UserError(f"{label}: a likelihood is not finite; the heads or the LLM's weights are damaged")
            bar.update(before + start + len(chosen))
            if k % save_every == save_every - 1 or start + batch >= len(todo):
                _save(saved, scores)
    if len(todo):
        say(console or Console(), f"{label}: {ranker.padding:.1%} of the LLM's tokens were padding")
    return scores


def _save(path: Path, array: np.ndarray) -> None:
    with write_atomically(path) as file:
        np.save(file, array)
