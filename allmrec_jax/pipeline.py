"""One experiment in one work directory: each stage is trained, or picked up where it stopped, when it is needed.

<workdir>/data/         the prepared data set (unless the config names one)
<workdir>/cf/           stage 0   checkpoints, logs, the config it was made with
<workdir>/align/        stage 1
<workdir>/llm/          stage 2
<workdir>/evaluation/   candidate scores of each model
<workdir>/config.json   the resolved experiment
<workdir>/metrics.json, report.html
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from allmrec_jax import files
from allmrec_jax.config import Experiment, as_dict
from allmrec_jax.data import sources
from allmrec_jax.data.dataset import MANIFEST, Dataset, open_dataset
from allmrec_jax.data.prompts import PromptBuilder, template_of
from allmrec_jax.data.public_files import SOURCE
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation.rank import Ranker
from allmrec_jax.models.llm.load import FrozenLLM, load_llm
from allmrec_jax.models.params import AXIS_RULES, FULLY_SHARDED
from allmrec_jax.models.text_encoder import LoadedEncoder, load_encoder
from allmrec_jax.training import brought, mesh
from allmrec_jax.training.align import Aligned, train_align
from allmrec_jax.training.cf import CFModel, train_cf
from allmrec_jax.training.checkpoint import Curves, claim_folder, write_json
from allmrec_jax.training.inject import item_table, train_llm


def _weights_folder(name: str, console: Console) -> Path:
    """A folder (or .gguf file) that is there, else a named source, else a repository of the hub."""
    return Path(name) if Path(name).exists() else sources.fetch(name, console=console)


# Fields that change how, but not what, a stage computes.
NO_INFLUENCE = {
    "align": ("save_every", "group_tokens", "remat"),
    "llm": ("save_every", "remat", "micro"),
    "evaluation": ("batch", "resamples", "examples", "users", "validation_users", "new_tokens"),
}


class Pipeline:
    """The stages of `experiment` in `workdir`. Attributes are made when first asked for.

    Raises:
      UserError: from whatever stage is asked for, among others if `workdir` was made with another config.
    """

    def __init__(self, experiment: Experiment, workdir: Path, *, console: Console | None = None):
        self.experiment, self.workdir, self.console = experiment, Path(workdir), console or Console()
        self.seconds: dict[str, float] = {}
        self._scorers: dict[int, Any] = {}
        self._lender: Pipeline | None = None

    def within(self, name: str, **changes: Any) -> Pipeline:
        """One in the folder `name` of this work directory, its experiment changed: the same data set, the same LLM in
        memory."""
        other = Pipeline(dataclasses.replace(self.experiment, **changes), self.workdir / name, console=self.console)
        other._lender, other._scorers = self, self._scorers
        return other

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The prepared data set; of `data.few_shot` users to train on, if so many only."""
        k = self.experiment.data.few_shot
        return self._whole if k is None else self._whole.few_shot(k)

    @functools.cached_property
    def _whole(self) -> Dataset:
        if self._lender is not None:
            return self._lender._whole
        config = self.experiment.data
        if (Path(config.name) / MANIFEST).is_file():
            dataset = open_dataset(config.name)
            made = dataset.manifest.get("settings", {})
            for field in ("recipe", "strip_years"):
                if field in made and made[field] != getattr(config, field):
                    raise UserError(
                        f"{config.name} was prepared with {field}={made[field]}, but data.{field} is "
                        f"{getattr(config, field)}; set the field to match, or prepare the data set again"
                    )
            return dataset
        if (self.workdir / "data" / MANIFEST).is_file():
            dataset = open_dataset(self.workdir / "data")
            if dataset.manifest.get("settings", {}).get("source") == SOURCE and dataset.name == config.name:
                return dataset  # `allmrec import` made it: there is nothing to prepare it from
        from allmrec_jax.data.prepare import prepare

        return prepare(
            config.name,
            self.workdir / "data",
            recipe=config.recipe,
            strip_years=config.strip_years,
            console=self.console,
        )

    def identity(self, stage: str) -> dict[str, Any]:
        """Everything that the result of a stage depends on."""
        x = as_dict(self.experiment)
        keep = {"cf": ("cf",), "align": ("cf", "align"), "llm": ("cf", "align", "llm")}
        if stage == "evaluation":
            keep[stage] = (*keep["llm"], "evaluation")
        identity = {"seed": x["seed"], "data": {**x["data"], "fingerprint": self.dataset.fingerprint}}
        for part in keep[stage]:
            identity[part] = {k: v for k, v in x[part].items() if k not in NO_INFLUENCE.get(part, ())}
        identity["cf"] |= self._cf_content
        # A name may stand for other weights elsewhere: the hub's files, or a quantised copy from a package.
        if "align" in keep[stage]:
            identity["align"] |= {"encoder_files": self._encoder_files, "dtype": mesh.precision(x["align"]["dtype"])}
        if "llm" in keep[stage]:
            identity["llm"] |= {"llm_files": self._llm_files, "dtype": self.llm_dtype}
        return identity

    @functools.cached_property
    def _encoder_files(self) -> dict[str, str]:
        return files.model_files(self.encoder_folder)

    @functools.cached_property
    def _llm_files(self) -> dict[str, str]:
        return files.model_files(self.llm_folder)

    @functools.cached_property
    def _cf_content(self) -> dict[str, Any]:
        """As it was when first asked for: who edits the file during a run does not stop that run."""
        return brought.content(self.experiment.cf, self.dataset, self.workdir / "cf")

    def _open(self, stage: str) -> Path:
        folder = self.workdir / stage
        # Whatever is there already must fit too, or this would leave a directory of two experiments.
        for other in ("cf", "align", "llm", "evaluation"):
            if other == stage or (self.workdir / other / "config.json").exists():
                claim_folder(self.workdir / other, self.identity(other))
        write_json(self.workdir / "config.json", as_dict(self.experiment))
        return folder

    @property
    def scores_folder(self) -> Path:
        """Where the evaluation keeps the scores of candidates, claimed for this experiment."""
        return self._open("evaluation")

    def _timed(self, stage: str, function: Any, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **options, seed=self.experiment.seed, console=self.console)
        finally:
            self.seconds[stage] = time.perf_counter() - start

    @functools.cached_property
    def _cf(self) -> tuple[CFModel, Curves]:
        devices = self.experiment.devices
        how = {"how": devices.map, "shards": devices.items, "claim": lambda: self._open("cf")}
        return self._timed("cf", train_cf, self.experiment.cf, self.dataset, self.workdir / "cf", **how)

    @property
    def cf(self) -> CFModel:
        return self._cf[0]

    @functools.cached_property
    def encoder(self) -> LoadedEncoder:
        return load_encoder(self.encoder_folder)

    @functools.cached_property
    def encoder_folder(self) -> Path:
        return _weights_folder(self.experiment.align.encoder, self.console)

    @functools.cached_property
    def llm_folder(self) -> Path:
        return _weights_folder(self.experiment.llm.llm, self.console)

    @property
    def llm_dtype(self) -> str:
        """Of the frozen weights: `auto` is float32 on CPU, else bfloat16."""
        return mesh.precision(self.experiment.llm.dtype)

    @functools.cached_property
    def _align(self) -> tuple[Aligned, Curves]:
        config, how = self.experiment.align, self.experiment.devices.map
        cf, encoder = self.cf, self.encoder
        return self._timed("align", train_align, config, self.dataset, cf, encoder, self._open("align"), how=how)

    @property
    def aligned(self) -> Aligned:
        return self._align[0]

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        x = self.experiment
        data = mesh.data_parallel(len(jax.devices()), x.devices.model, x.llm.batch, x.evaluation.batch)
        return mesh.make_mesh(data, x.devices.model)

    @functools.cached_property
    def llm(self) -> FrozenLLM:
        if self._lender is not None:
            return self._lender.llm
        rules = FULLY_SHARDED if self.experiment.devices.shard_weights else AXIS_RULES
        return load_llm(self.llm_folder, dtype=jnp.dtype(self.llm_dtype), mesh=self.mesh, rules=rules)

    @functools.cached_property
    def item_table(self) -> np.ndarray:
        """What F_I reads of each item: e, or what `llm.item_vectors` puts in its place."""
        x = self.experiment
        return item_table(x.llm, self.cf, lambda: self.aligned.e, width=x.align.joint, seed=x.seed)

    @functools.cached_property
    def _heads(self) -> tuple[dict[str, Any], Curves]:
        cf, e = self.cf, self.item_table
        config, folder = self.experiment.llm, self._open("llm")
        return self._timed("llm", train_llm, config, self.dataset, cf, e, self.llm, folder, mesh=self.mesh)

    @property
    def heads(self) -> dict[str, Any]:
        return self._heads[0]

    def curves(self, stages: Sequence[str] = ("cf", "align", "llm")) -> dict[str, Curves]:
        """Of the stages that are named."""
        known = {
            "cf": ("stage 0: CF", "_cf"),
            "align": ("stage 1: alignment", "_align"),
            "llm": ("stage 2: injection", "_heads"),
        }
        return {known[stage][0]: getattr(self, known[stage][1])[1] for stage in stages}

    def builder(self, *, inject: bool) -> PromptBuilder:
        """Prompts of this experiment's data, LLM and wording."""
        config, context = self.experiment.llm, self.llm.config.max_position_embeddings
        return PromptBuilder(
            self.llm.tokenizer, self.dataset.titles(), template_of(config), context=context, inject=inject
        )

    def through_llm(self, heads: Any, *, e: np.ndarray | None = None, batch: int | None = None) -> dict[str, Any]:
        """What all that puts prompts through the LLM is made of (`evaluation.passes.Passes`)."""
        x = self.experiment
        return {
            "builder": self.builder(inject=heads is not None),
            "e": self.item_table if e is None else e,
            "mesh": self.mesh,
            "batch": batch or x.evaluation.batch,
            "logit_rows": x.llm.logit_rows,
            "how": x.devices.map,
        }

    def ranker(self, heads: Any, *, candidates: int, e: np.ndarray | None = None, batch: int | None = None) -> Ranker:
        """A ranker by likelihood (`evaluation.rank.Ranker`); `heads=None` is the LLM alone."""
        config = self.experiment.evaluation
        options = {"candidates": candidates, "normalise": config.score == "mean"}
        options |= self.through_llm(heads, e=e, batch=batch)
        ranker = Ranker(self.llm, heads, **options, scorer=self._scorers.get(candidates))
        self._scorers[candidates] = ranker.scorer  # compiled once for all models
        return ranker


def train(pipeline: Pipeline, stage: str) -> None:
    """Trains one stage (and what it builds on, where that is missing)."""
    if stage not in ("cf", "align", "llm"):
        raise UserError(f"there is no stage {stage!r}; choose cf, align or llm")
    {"cf": lambda: pipeline.cf, "align": lambda: pipeline.aligned, "llm": lambda: pipeline.heads}[stage]()
    if stage == "cf":
        from allmrec_jax.evaluation.cf import report

        x, (model, curves) = pipeline.experiment, pipeline._cf
        report(model, curves, pipeline.dataset, pipeline.workdir / "cf", x.cf, seed=x.seed, console=pipeline.console)
    elif stage == "align":
        from allmrec_jax.evaluation.alignment import report

        x, folder = pipeline.experiment, pipeline.workdir / "align"
        how = {"seed": x.seed, "targets": x.align.targets, "console": pipeline.console}
        report(pipeline.aligned, pipeline.cf, pipeline.dataset, folder, **how)
