"""`rank`: the log-likelihood of every candidate's title, all candidates of a user in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from rich.console import Console

from allmrec_jax.data.packing import pack
from allmrec_jax.data.prompts import Items, PromptBuilder
from allmrec_jax.errors import UserError
from allmrec_jax.files import write_atomically
from allmrec_jax.models import projection
from allmrec_jax.models.llm.load import FrozenLLM
from allmrec_jax.progress import progress, say
from allmrec_jax.training.inject import freeze
from allmrec_jax.training.inject_step import make_scorer
from allmrec_jax.training.mesh import Mapping, map_over_data


def item_vectors(
    F_I: Any, e: Float[np.ndarray, "items joint"], devices: Sequence[Any], how: Mapping = "shard_map"
) -> Float[np.ndarray, "items h"]:
    """O_i = F_I(e_i) of the whole catalogue, cut over the devices."""
    rows = -(-len(e) // len(devices)) * len(devices)
    mapped = map_over_data(projection.F_I, devices, batched=(False, True), how=how, batched_outputs=True)
    return np.asarray(mapped(F_I, np.pad(e, ((0, rows - len(e)), (0, 0)))))[: len(e)]


def make_ranker(
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
) -> Callable[[Sequence[Items], np.ndarray, np.ndarray], np.ndarray]:
    """`(histories, candidates (users, c), x_u (users, d)) -> scores (users, c)` for at most `batch` users.

    `heads=None` ranks by the LLM alone (then `builder` must not inject).
    """
    frozen, shardings = freeze(llm, mesh)
    scorer = make_scorer(llm.graph, shardings, mesh, answers=candidates, normalise=normalise, logit_rows=logit_rows)
    O_i = None if heads is None else jnp.asarray(item_vectors(heads["F_I"], e, list(mesh.devices.flat), how))
    F_U = jax.jit(projection.F_U)

    def rank(histories: Sequence[Items], lists: np.ndarray, x_u: np.ndarray) -> np.ndarray:
        n = len(lists)
        prompts = builder.prompts(histories, lists)
        answers = [builder.answers(row.tolist()) for row in lists]
        packed = pack(prompts, answers, rows=range(n), batch=batch)
        if heads is None:
            return np.asarray(scorer(None, frozen, packed))[:n]
        some = np.zeros((batch, x_u.shape[1]), np.float32)
        some[:n] = x_u
        return np.asarray(scorer({"O_u": F_U(heads["F_U"], some), "O_i": O_i}, frozen, packed))[:n]

    return rank


def score_users(
    ranker: Callable[..., np.ndarray],
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
    return scores


def _save(path: Path, array: np.ndarray) -> None:
    with write_atomically(path) as file:
        np.save(file, array)
