"""Ranking without a language model, by stage 1's joint embeddings alone: what the paper prints as a check of stage 1.

The score of item i is x_u . (W2 v_i + b2): f_I's decoder takes v_i = e_i, or q_i, back to where the items of the CF
model stand, and s is L_rec's dot product. With q no item needs to have been seen in training.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from allmrec_jax.data.candidates import draw_for_test
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.data.scenarios import FEW
from allmrec_jax.evaluation import metrics
from allmrec_jax.models import alignment
from allmrec_jax.models.cf_model import CFModel
from allmrec_jax.training.align import Aligned


def score(
    aligned: Aligned,
    cf: CFModel,
    x_u: Float[np.ndarray, "users d"],
    candidates: Int[np.ndarray, "users candidates"],
) -> dict[str, Float[np.ndarray, "users candidates"]]:
    """Scores of the CF model, and by each of the three tables."""
    decode, scores = jax.jit(alignment.decode), {"cf": cf.scores(x_u, candidates)}
    for name in ("e", "q", "mixed"):
        decoded = np.asarray(decode(aligned.parameters["f_I"], getattr(aligned, name)))
        scores[name] = np.einsum("ud,ucd->uc", x_u, decoded[candidates])
    return scores


def figures(
    aligned: Aligned, cf: CFModel, dataset: Dataset, *, seed: int, candidates: int = 20
) -> dict[str, dict[str, Any]]:
    """{scenario: {"cf", "e", "q", "mixed": {metric: {"value", "low", "high", "n"}}}} of all test users.

    Every scenario has its users' lists from `overall`; those that the data set cannot support are left out.
    """
    users = np.flatnonzero(dataset.has_target("test"))
    if not len(users):
        return {}
    lists, column = draw_for_test(dataset, users, seed=seed, count=candidates)
    windows = dataset.windows(dataset.history_end("test")[users], cf.config.maxlen, users)
    scores = score(aligned, cf, cf.x_u(windows, users), lists)
    seen = dataset.train_counts()[dataset.targets("test")[users]]
    groups = {"overall": np.ones(len(users), bool)}
    for name in ("cold-items", "warm-items"):
        if dataset.manifest["scenarios"][name]["reason"] is None:
            groups[name] = np.isin(users, dataset.scenario(name).users)
    groups |= {f"seen {FEW} times at most": seen <= FEW, "seen more often": seen > FEW}
    return {
        name: metrics.summarise({model: of[rows] for model, of in scores.items()}, column[rows], seed=seed)
        for name, rows in groups.items()
        if rows.any()
    }
