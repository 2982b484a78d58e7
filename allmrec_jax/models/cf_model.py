"""A trained collaborative filtering model: what everything after stage 0 reads of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from allmrec_jax.errors import UserError
from allmrec_jax.models import collaborative, ncf

Anywhere = Array | np.ndarray  # functions that take host and device arrays alike


@dataclass(frozen=True)
class CFModel:
    """A trained model: the item table E and the user representation x_u of any history.

    fold_in: what makes x_u of a history where the model itself knows users only (`models.ncf.fold_in`).
    """

    config: Any  # `models.collaborative.configure`
    params: Any
    fold_in: np.ndarray | None = None

    @property
    def E(self) -> Float[Anywhere, "items d"]:
        return self.params["E"]

    def x_u(
        self,
        windows: Int[np.ndarray, "users maxlen"],
        users: Int[np.ndarray, " users"] | None = None,
        batch: int = 128,
    ) -> Float[np.ndarray, "users d"]:
        """User representations of left-padded windows.

        In batches of one shape, short histories apart from long ones, so that little is computed on padding, and small
        enough for a CPU's caches.

        Args:
          users: their ids, where they are known: a model of users (NCF) then gives their rows.

        Raises:
          UserError: for an item id beyond the table.
        """
        self._check(windows)
        if "P" in self.params or self.fold_in is not None:  # a model of users
            return self._of_rows(windows, users)
        maxlen = self.config.maxlen
        windows = windows[:, -maxlen:]
        lengths, longest = (windows != 0).sum(1), windows.shape[1]
        out, done = np.zeros((len(windows), self.config.width), np.float32), np.zeros(len(windows), bool)
        for width in sorted({min(width, longest) for width in (4, 8, 16, longest)}):
            rows = np.flatnonzero((lengths <= width) & ~done)
            if width < longest and len(rows) < batch:
                continue  # too few for a program of their own
            done[rows] = True
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                padded, pads = np.zeros((batch, width), np.int32), np.zeros(batch, np.int32)
                padded[: len(part)] = windows[part, longest - width :]
                pads[: len(part)] = maxlen - lengths[part]
                out[part] = np.asarray(_represent(self.params, self.config, padded, pads))[: len(part)]
        return out

    def _check(self, items: Anywhere) -> None:
        least, most = (int(items.min()), int(items.max())) if items.size else (0, 0)
        if least < 0 or most > self.config.n_items:
            raise UserError(
                f"item {most if least >= 0 else least} is not among the model's 1 to {self.config.n_items:,}"
            )

    def _of_rows(self, windows: np.ndarray, users: np.ndarray | None) -> np.ndarray:
        """Users' own rows P_u where there are any; else a linear map of the mean of their items' E_i."""
        out, known = np.zeros((len(windows), self.config.width), np.float32), np.zeros(len(windows), bool)
        if users is not None and "P" in self.params:
            known = users < len(self.params["P"])
            out[known] = np.asarray(self.params["P"])[users[known]]
        if not known.all():
            out[~known] = ncf.mean_rows(np.asarray(self.E), windows[~known]) @ self.fold_in
        return out

    def scores(
        self, x_u: np.ndarray, candidates: Int[Anywhere, "users candidates"], cells: int = 1 << 15
    ) -> Float[np.ndarray, "users candidates"]:
        """The score of each candidate: x_u . E_i, or the model's own. Raises `UserError` for an id beyond the table.

        Args:
          cells: about how many candidates are scored at once; memory is theirs times the width.
        """
        self._check(candidates)
        candidates = np.asarray(candidates)
        users, each = candidates.shape
        batch = min(users, max(1, cells // max(1, each)))
        out = np.empty((users, each), np.float32)
        for start in range(0, users, batch):
            rows = np.arange(start, start + batch).clip(max=users - 1)  # the last batch is filled up
            part = _score(self.params, self.config, x_u[rows], candidates[rows])
            out[start : start + batch] = np.asarray(part)[: users - start]
        return out


@functools.partial(jax.jit, static_argnums=1)
def _represent(parameters: Any, config: Any, windows: jax.Array, pads: jax.Array) -> jax.Array:
    return collaborative.user_representation(parameters, config, windows, pads)


@functools.partial(jax.jit, static_argnums=1)
def _score(parameters: Any, config: Any, x_u: jax.Array, candidates: jax.Array) -> jax.Array:
    return collaborative.scores(parameters, config, x_u, jnp.take(parameters["E"], candidates, axis=0))
