"""`rank`: the log-likelihood of every candidate's title, all candidates of a user in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from rich.console import Console

from allmrec_jax.data.prompts import Items, PromptBuilder
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation.passes import Passes
from allmrec_jax.files import write_atomically
from allmrec_jax.models.llm.load import FrozenLLM
from allmrec_jax.progress import progress, say
from allmrec_jax.training.inject_step import make_scorer
from allmrec_jax.training.mesh import Mapping


class Ranker(Passes):
    """Scores of users' candidates: `(histories, candidates (users, c), x_u (users, d)) -> (users, c)`.

    Args (and those of `Passes`):
      candidates: that are scored of each user.
      normalise: divide by the number of the title's tokens (`score="mean"`).
      scorer: that of another ranker of this LLM with the same settings, which has compiled already.
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
        scorer: Callable[..., jax.Array] | None = None,
    ):
        super().__init__(llm, heads, builder=builder, e=e, mesh=mesh, batch=batch, how=how)
        options = {"answers": candidates, "normalise": normalise, "logit_rows": logit_rows}
        self.scorer = scorer or make_scorer(llm.graph, self.shardings, mesh, **options)

    def __call__(
        self,
        histories: Sequence[Items],
        candidates: Int[np.ndarray, "users c"],
        x_u: Float[np.ndarray, "users d"],
        asked: Int[np.ndarray, "users a"] | None = None,
    ) -> Float[np.ndarray, "users _"]:
        """The scores.

        Args:
          asked: the items that are scored, if not the candidates that the prompt names.
        """
        scores = np.empty((candidates if asked is None else asked).shape, np.float32)
        parts = self.parts(histories, candidates, x_u, asked)
        pending = [(part.users, self.scorer(part.tables, self.frozen, part.batch)) for part in parts]
        for users, found in pending:
            scores[users] = np.asarray(found)[: len(users)]
        return scores


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
