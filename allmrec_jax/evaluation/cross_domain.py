"""`cross-domain`: models of one data set on another, on which nothing is trained.

The other data set (the target) has no table E of its own. What is known of its items are their texts:

    q_i   = f_T(SBERT(text_i))           by the stage-1 models as they are
    E_i   = W2 q_i + b2                  f_I's decoder carries q_i back to where the CF model's items stand
    x_u   = the CF model's representation of the history of those E_i (position embeddings and all; E_0 as trained)
    O_u   = F_U(x_u)
    cf          scores x_u . E_i, or the CF model's own score
    a-llmrec-q  O_i = F_I(q_i)
    a-llmrec    O_i = F_I(f_I(E_i)): coming back into the joint space through the encoder that F_I was trained on

The prompt is that of the trained domain unless another wording is asked for. The trivial models count the target's own
training interactions, so they know more of it than any model here; `fused`, which would have to learn there, is not
in the table.
"""

from __future__ import annotations

import dataclasses
import functools
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from allmrec_jax.data.dataset import MANIFEST, Dataset, open_dataset
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import lists, scenarios, scores
from allmrec_jax.evaluation.borrowed import Borrowed
from allmrec_jax.evaluation.labels import ORDER, TRIVIAL
from allmrec_jax.files import write_atomically
from allmrec_jax.models import alignment
from allmrec_jax.models.cf_model import CFModel
from allmrec_jax.models.text_encoder import tokenize
from allmrec_jax.pipeline import Pipeline
from allmrec_jax.progress import say
from allmrec_jax.training import mesh
from allmrec_jax.training.align import Aligned, encode_items, item_texts

WORDINGS = ("movies", "games", "shopping", "none")
TABLE = "q.npz"


class Transferred(Borrowed):
    """The models of `source` on the data set `on`: a prepared folder, or the name of one to prepare.

    Args:
      wording: of the prompt, a domain of `llm.domain`; None is that of the training.
    """

    def __init__(self, source: Pipeline, on: str, wording: str | None = None):
        if wording not in (None, *WORDINGS):
            raise UserError(f"there is no wording {wording!r}; choose {', '.join(WORDINGS)}")
        x = source.experiment
        folder = Path("cross-domain") / (Path(on).name + (f"-{wording}" if wording else ""))
        llm = x.llm if wording is None else dataclasses.replace(x.llm, domain=wording)
        super().__init__(source, str(folder), dataclasses.replace(x, llm=llm))
        self.on = on

    @functools.cached_property
    def _whole(self) -> Dataset:
        if (Path(self.on) / MANIFEST).is_file():
            return open_dataset(self.on)
        from allmrec_jax.data.prepare import prepare

        x = self.experiment.data
        options = {"recipe": x.recipe, "strip_years": x.strip_years, "console": self.console}
        return prepare(self.on, self.source.workdir / "cross-domain" / "data" / Path(self.on).name, **options)

    @functools.cached_property
    def dataset(self) -> Dataset:
        return self._whole

    @property
    def about(self) -> dict[str, Any]:
        return {"target": self.dataset.fingerprint, "domain": self.experiment.llm.domain}

    @functools.cached_property
    def q(self) -> np.ndarray:
        """q of the target's items, kept in the folder."""
        path = self.scores_folder / TABLE
        rows = self.dataset.n_items + 1
        try:
            with np.load(path, allow_pickle=False) as archive:
                if len(archive["q"]) == rows:
                    return archive["q"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass
        config, encoder, trained = self.experiment.align, self.source.encoder, self.source.aligned.parameters
        say(self.console, f"cross-domain: the texts of {self.dataset.n_items:,} items of {self.dataset.name}")
        texts = item_texts(self.dataset, config.text)
        tokens, lengths = tokenize(encoder.backend, texts, encoder.config.max_seq_length)
        weights = jax.device_get(trained.get("encoder", encoder.weights))
        dtype = jnp.dtype(mesh.precision(config.dtype))
        Q = encode_items(encoder, weights, tokens, lengths, dtype=dtype, console=self.console)
        q = np.asarray(alignment.encode(jax.device_get(trained["f_T"]), jnp.asarray(Q)))
        with write_atomically(path) as file:
            np.savez(file, q=q)
        return q

    @functools.cached_property
    def cf(self) -> CFModel:
        """The CF model, its table made from texts."""
        model, f_I = self.source.cf, jax.device_get(self.source.aligned.parameters["f_I"])
        E = np.array(alignment.decode(f_I, jnp.asarray(self.q)))
        E[0] = np.asarray(model.E)[0]
        parameters = {name: leaf for name, leaf in model.params.items() if name != "P"} | {"E": jnp.asarray(E)}
        if "P" in model.params and model.fold_in is None:
            raise UserError("cross-domain: the CF model knows users, not histories, and has no fold-in for others")
        config = dataclasses.replace(model.config, n_items=self.dataset.n_items)
        return CFModel(config, parameters, model.fold_in)

    @functools.cached_property
    def aligned(self) -> Aligned:
        f_I = jax.device_get(self.source.aligned.parameters["f_I"])
        e = np.asarray(alignment.encode(f_I, jnp.asarray(self.cf.E)))
        return Aligned(e=e, q=self.q, mixed=self.q, parameters=self.source.aligned.parameters)


def why_not(on: str | None) -> str | None:
    """Why there is nothing to evaluate; None if there is."""
    return "it needs another data set; name it with --on" if on is None else None


def evaluate(
    pipeline: Pipeline, on: str, wording: str | None, models: Iterable[str], pairs: Iterable[tuple[str, str]]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]] | str:
    """(figures, paired differences, facts) of the models of `pipeline` on the data set `on`; or why not."""
    x, other = pipeline.experiment, Transferred(pipeline, on, wording)
    target = other.dataset
    if target.fingerprint == pipeline.dataset.fingerprint:
        return f"{on} is the data set that the models were trained on"
    for name in ("overall", "cross-domain"):
        if (reason := scenarios.why_not(target, name)) is not None:
            return reason
    most, candidates = x.evaluation.users, x.evaluation.candidates
    of = lists.draw(target, "test", seed=x.seed, most=most, candidates=candidates)
    asked = [name for name in ORDER if name in {*TRIVIAL, *models} - {"fused", "a-llmrec-mixed"}]
    found = scores.score(other, of, asked)
    found = {name: found[name] for name in asked}
    options = {"seed": x.seed, "resamples": x.evaluation.resamples}
    figures, differences = scenarios.figures(found, of, np.ones(len(of.users), bool), pairs, **options)
    told = f"trained on {pipeline.dataset.name}, tested on {target.name}"
    facts = {"users": len(of.users), "of": len(of.users), "repeats": int(of.repeats.sum()), "told": told}
    return figures, differences, facts | {"candidates": candidates}
