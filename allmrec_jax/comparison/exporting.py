"""`allmrec export`: the trained parts of a work directory as the public code's files, or as safetensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from allmrec_jax.comparison import public_checkpoints as public
from allmrec_jax.comparison.public_checkpoints import OURS, STAGE_2, PublicFiles
from allmrec_jax.data.public_files import write_public
from allmrec_jax.errors import UserError
from allmrec_jax.files import write_atomically
from allmrec_jax.models import collaborative, given, params, text_encoder
from allmrec_jax.models.sasrec import SASRecConfig
from allmrec_jax.pipeline import Pipeline

JOINT = 128  # d' in the public code


def trained_stages(workdir: Path) -> list[str]:
    """The stages that have a checkpoint (or, of a given CF model, its file), in order."""
    found = [stage for stage in ("cf", "align", "llm") if any((workdir / stage / "checkpoints").glob("[0-9]*"))]
    given_cf = (workdir / "cf" / "given.npz").is_file() and "cf" not in found
    return ["cf", *found] if given_cf else found


def _stages(pipeline: Pipeline) -> list[str]:
    stages = trained_stages(pipeline.workdir)
    if not stages:
        raise UserError(f"{pipeline.workdir} holds no trained stage; train one with `allmrec train` or `allmrec run`")
    return stages


def _encoder(pipeline: Pipeline) -> Any:
    """The sentence encoder's weights as stage 1 left them."""
    trained = pipeline.aligned.parameters.get("encoder", pipeline.encoder.weights)
    return jax.device_get(trained)["weights"]


def export_public(pipeline: Pipeline, out: Path, *, name: str | None = None) -> tuple[list[Path], list[str]]:
    """Writes the data and every trained stage as the public code's files. Returns them, and what to know about them.

    A stage that was interrupted is trained to its end first, as by `allmrec run`.

    Args:
      name: of the data set in the files' names, by default its own.

    Raises:
      UserError: if nothing is trained, the CF model is none that the public code knows, or a file is there already.
    """
    stages, dataset = _stages(pipeline), pipeline.dataset
    cf = pipeline.cf
    if not isinstance(cf.config, SASRecConfig):
        raise UserError("the public code knows SASRec only; choose --to safetensors for another CF model")
    files, settings = PublicFiles(Path(out), name or dataset.name), pipeline.experiment.cf
    parts: dict[str, Mapping[str, np.ndarray]] = {}
    if "align" in stages:
        found = jax.device_get(pipeline.aligned.parameters)
        parts |= {part: public.part_state(part, found[OURS[part]]) for part in ("mlp", "mlp2")}
        parts["sbert"] = public.encoder_state(text_encoder.describe(pipeline.encoder.config), _encoder(pipeline))
    if "llm" in stages:
        heads = jax.device_get(pipeline.heads)
        parts |= {part: public.part_state(part, heads[OURS[part]]) for part in STAGE_2}
    if there := next((files.part(part) for part in parts if files.part(part).exists()), None):
        raise UserError(f"{there} exists already: choose another --out or delete it")
    users, rate = dataset.n_users, settings.learning_rate
    written = [
        public.write_sasrec(
            files, cf.config, jax.device_get(cf.params), users=users, epochs=settings.epochs, learning_rate=rate
        )
    ]
    written += write_public(dataset, files.data, files.name)
    written += [public.write_part(files, part, tensors) for part, tensors in parts.items()]
    return written, _notes(pipeline, stages)


def _notes(pipeline: Pipeline, stages: list[str]) -> list[str]:
    """Where the public code, which has no settings for it, does otherwise than this experiment."""
    x, notes = pipeline.experiment, []
    if "align" in stages and x.align.joint != JOINT:
        notes.append(f"d' is {x.align.joint}, but the public code's is {JOINT}: change it there to load mlp and mlp2")
    if "align" in stages and pipeline.encoder.config.architecture != "distilbert":
        notes.append(f"the sentence encoder is {x.align.encoder}: name it in the public code in place of its own")
    if "llm" in stages:
        theirs = x.llm.as_public_code()
        for field in ("user_sentence", "strip_around_special"):
            if (ours := getattr(x.llm, field)) != (value := getattr(theirs, field)):
                notes.append(f"F_U and F_I were trained with llm.{field} {ours!r}; the public code has {value!r}")
        places = [getattr(x.llm, name) for name in ("user_vector", "user_place", "item_place")]
        if places != [True, "first", "after"]:
            notes.append("O_u or O_i stand elsewhere in this experiment's prompts than in the public code's")
        if x.llm.item_vectors != "e":
            notes.append(f"F_I reads {x.llm.item_vectors} of the items; the public code gives it e")
        if "opt" not in x.llm.llm.lower():
            notes.append(f"F_U and F_I were trained through {x.llm.llm}; the public code loads an OPT")
    return notes


def export_safetensors(pipeline: Pipeline, out: Path) -> list[Path]:
    """Writes each trained part as one `.safetensors` file, its tensors by their PyTorch names, its config as metadata.

    cf.safetensors, f_I, f_T, sentence_encoder, F_U, F_I.

    Raises:
      UserError: if nothing is trained, a parameter has no PyTorch name, or a file is there already.
    """
    stages, out = _stages(pipeline), Path(out)
    contents: dict[str, tuple[Mapping[str, np.ndarray], Any]] = {}
    c = pipeline.cf.config
    if isinstance(c, given.GivenConfig):
        arrays = {name: np.asarray(array, np.float32) for name, array in pipeline.cf.params.items()}
    else:
        arrays = params.to_torch(collaborative.module_of(c).describe(c), jax.device_get(pipeline.cf.params))
    contents["cf"] = arrays, {"model": pipeline.experiment.cf.model, **dataclasses.asdict(c)}
    if "align" in stages:
        found, config = jax.device_get(pipeline.aligned.parameters), pipeline.encoder.config
        for part in ("mlp", "mlp2"):
            width, joint = found[OURS[part]]["encode"]["kernel"].shape
            contents[OURS[part]] = public.part_state(part, found[OURS[part]]), {"width": width, "joint": joint}
        tensors = public.encoder_state(text_encoder.describe(config), _encoder(pipeline), prefix="")
        contents["sentence_encoder"] = tensors, dataclasses.asdict(config)
    if "llm" in stages:
        heads = jax.device_get(pipeline.heads)
        for part in STAGE_2:
            width, h = heads[OURS[part]]["dense1"]["kernel"].shape
            about = {"width": width, "h": h, "llm": pipeline.experiment.llm.llm}
            contents[OURS[part]] = public.part_state(part, heads[OURS[part]]), about
    for stem in contents:
        if (path := out / f"{stem}.safetensors").exists():
            raise UserError(f"{path} exists already: choose another --out or delete it")
    return [write_safetensors(out / f"{stem}.safetensors", *content) for stem, content in contents.items()]


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], about: Any) -> Path:
    """Writes one file, with `about` as JSON under `config` in its metadata."""
    from safetensors.numpy import save

    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with write_atomically(path) as file:
        file.write(save(whole, metadata={"config": json.dumps(about)}))
    return path
