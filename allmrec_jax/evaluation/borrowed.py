"""A pipeline that trains nothing: it evaluates the models of another one, on something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from allmrec_jax.config import Experiment
from allmrec_jax.models.llm.load import FrozenLLM
from allmrec_jax.pipeline import Pipeline
from allmrec_jax.training.align import Aligned
from allmrec_jax.training.cf import CFModel
from allmrec_jax.training.checkpoint import claim_folder


class Borrowed(Pipeline):
    """The models of `source`; scores are kept in the folder `name` of its work directory."""

    def __init__(self, source: Pipeline, name: str, experiment: Experiment | None = None):
        super().__init__(experiment or source.experiment, source.workdir / name, console=source.console)
        self.source = source

    @property
    def cf(self) -> CFModel:
        return self.source.cf

    @property
    def aligned(self) -> Aligned:
        return self.source.aligned

    @property
    def heads(self) -> dict[str, Any]:
        return self.source.heads

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.source.mesh

    @property
    def llm(self) -> FrozenLLM:
        return self.source.llm

    @property
    def _whole(self) -> Any:
        return self.source.dataset

    def identity(self, stage: str) -> dict[str, Any]:
        """What the source's evaluation depends on, and what this one is about."""
        return self.source.identity("evaluation") | self.about

    @property
    def about(self) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def scores_folder(self) -> Path:
        # The stages come first: if they are of another config, nothing is left here.
        self.source.scores_folder  # noqa: B018
        claim_folder(self.workdir, self.identity("evaluation"))
        return self.workdir
