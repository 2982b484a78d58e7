"""`allmrec import`: the public code's files become a work directory, as if its stages had been trained here."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from allmrec_jax.comparison.public_checkpoints import (
    EPOCHS,
    OURS,
    STAGE_1,
    STAGE_2,
    PublicFiles,
    read_part,
    read_sasrec,
)
from allmrec_jax.config import CF, Alignment, Data, Experiment, Injection
from allmrec_jax.data import batches
from allmrec_jax.data.public_files import read_public
from allmrec_jax.errors import UserError
from allmrec_jax.models import text_encoder
from allmrec_jax.models.tensor_files import PickledTensors
from allmrec_jax.pipeline import Pipeline
from allmrec_jax.training import align, align_step, cf, inject, table
from allmrec_jax.training.checkpoint import Checkpoints
from allmrec_jax.training.state import State, create

OPT_ROWS, OPT_VOCABULARY = 50269, 50272  # the public code's softmax runs over so many of OPT's tokens


def experiment_of(files: PublicFiles) -> Experiment:
    """The experiment that these files are of: sizes as they tell, and the public code's recipe.

    Raises:
      UserError: if the weights of SASRec are missing or damaged.
    """
    c, _, epochs = read_sasrec(files.checkpoint())
    joint = read_part(files.part("mlp"))["encode"]["kernel"].shape[1] if files.has(STAGE_1) else Alignment().joint
    return Experiment(
        name=files.name,
        data=Data(name=files.name, recipe="as-is"),
        cf=CF(
            width=c.width,
            blocks=c.blocks,
            heads=c.heads,
            maxlen=c.maxlen,
            dropout=c.dropout,
            epochs=epochs,
            select="last",
            evaluate_every=epochs,
        ),
        align=Alignment(
            encoder="nq-distilbert-base-v1", joint=joint, epochs=EPOCHS["align"], dtype="float32"
        ).as_public_code(),
        llm=Injection(
            llm="facebook/opt-6.7b", domain=_domain(files.name), epochs=float(EPOCHS["llm"]), logit_rows=OPT_ROWS
        ).as_public_code(),
    )


def _domain(name: str) -> str:
    """The wording that the public code has for a data set of this name."""
    words = {"Movies": "movies", "Games": "games", "Beauty": "shopping", "Toys": "shopping"}
    return next((domain for word, domain in words.items() if word in name), "none")


def import_public(
    files: PublicFiles, workdir: Path, experiment: Experiment, *, console: Console | None = None
) -> list[str]:
    """Makes the work directory and returns the stages that are in it. All or nothing: it appears when it is whole.

    Stages of which there are no files are trained when they are asked for, as in any work directory. Adam's moments
    are not in the public code's files; a stage that is trained on begins with none.

    Raises:
      UserError: if the folder is in use, a file is missing or damaged, does not fit the others, or asks for more than
        weights need.
    """
    workdir, console = Path(workdir), console or Console()
    if workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"{workdir} is in use; choose another --workdir, which need not exist yet")
    c, sasrec, _ = read_sasrec(files.checkpoint())
    stages = ["cf", *(["align"] if files.has(STAGE_1) else []), *(["llm"] if files.has(STAGE_2) else [])]
    if stages == ["cf", "llm"]:
        raise UserError(f"{files.part('mlp')} is missing: {files.part('log_proj').name} builds on it")
    x = experiment.cf
    if (x.model, x.width, x.blocks, x.heads, x.maxlen) != ("sasrec", c.width, c.blocks, c.heads, c.maxlen):
        raise UserError("cf.model, cf.width, cf.blocks, cf.heads and cf.maxlen are what the file says; leave them out")
    scratch = workdir.parent / f".{workdir.name}.tmp-{uuid.uuid4().hex}"
    try:
        dataset = read_public(files.data, files.name, scratch / "data", items=c.n_items)
        if dataset.n_items != c.n_items:
            raise UserError(
                f"{files.checkpoint()} knows {c.n_items:,} items, but {files.name}.txt names {dataset.n_items:,}; "
                "they are not of one data set"
            )
        pipeline = Pipeline(experiment, scratch, console=console)
        if "llm" in stages:
            pipeline.experiment = _with_llm(pipeline)
        makers: dict[str, Callable[[], tuple[State, int]]] = {
            "cf": lambda: _cf(pipeline, sasrec),
            "align": lambda: _align(pipeline, files, c.width),
            "llm": lambda: _llm(pipeline, files, c.width),
        }
        for stage in stages:
            state, steps = makers[stage]()
            checkpoints = Checkpoints(pipeline._open(stage))
            checkpoints.save(steps, state._replace(step=jnp.int32(steps)), {"curves": {}})
            checkpoints.close()
        if workdir.exists():
            workdir.rmdir()
        os.replace(scratch, workdir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return stages


def _with_llm(pipeline: Pipeline) -> Experiment:
    """The experiment, its logits cut as the public code cuts OPT's if the LLM has as many."""
    x, config = pipeline.experiment, pipeline.llm_folder / "config.json"
    vocabulary = json.loads(config.read_text()).get("vocab_size") if config.is_file() else None
    if vocabulary == OPT_VOCABULARY or x.llm.logit_rows != OPT_ROWS:
        return x
    return dataclasses.replace(x, llm=dataclasses.replace(x.llm, logit_rows=None))


def _cf(pipeline: Pipeline, parameters: Any) -> tuple[State, int]:
    config = pipeline.experiment.cf
    tree = jax.tree.map(jnp.asarray, parameters)
    tree |= {"E": table.padded(tree["E"])}
    return create(tree, cf.make_optimiser(config)), config.epochs


def _align(pipeline: Pipeline, files: PublicFiles, d: int) -> tuple[State, int]:
    config, encoder = pipeline.experiment.align, pipeline.encoder
    found = {OURS[part]: read_part(files.part(part)) for part in ("mlp", "mlp2")}
    for name, width in (("f_I", d), ("f_T", encoder.config.hidden_size)):
        shape = found[name]["encode"]["kernel"].shape if "encode" in found[name] else None
        if shape != (width, config.joint):
            file = files.part(next(part for part, ours in OURS.items() if ours == name))
            raise UserError(f"{file} is {shape}, but must be {(width, config.joint)} to fit the other files")
    sbert = files.part("sbert")
    weights = text_encoder.read_weights(encoder.config, PickledTensors([sbert]), str(sbert))
    trained = {**found, "encoder": {"weights": weights}} if config.train_encoder else found
    users = pipeline.dataset.examples(config.targets, single=config.single_items)[0]
    spans = align_step.spans(len(users), config.batch, config.chunk)
    steps = config.epochs * (len(spans) if config.train_encoder else 1)
    return create(jax.tree.map(np.asarray, trained), align.make_optimiser(config, spans)), steps


def _llm(pipeline: Pipeline, files: PublicFiles, d: int) -> tuple[State, int]:
    config, joint = pipeline.experiment.llm, pipeline.experiment.align.joint
    heads = {OURS[part]: read_part(files.part(part)) for part in STAGE_2}
    for part, width in zip(STAGE_2, (d, joint), strict=True):
        head = heads[OURS[part]]
        if "dense1" not in head or head["dense1"]["kernel"].shape[0] != width:
            raise UserError(f"{files.part(part)} does not take inputs of width {width}, as the other files have it")
    users = pipeline.dataset.examples(config.targets, single=config.single_items)[0]
    steps = max(1, round(batches.steps_per_epoch(len(users), config.batch) * config.epochs))
    return create(heads, inject.make_optimiser(config, steps)), steps
