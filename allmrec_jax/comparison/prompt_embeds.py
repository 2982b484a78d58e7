"""Prompts as embeddings, O_u and O_i in their places, for serving by another program: transformers, vLLM.

What the frozen LLM reads of a user is a matrix (length, h): the token embeddings of the prompt, with O_u in front and
an O_i behind each title. A batch is padded on the LEFT, so that every row ends where generation begins:

    inputs_embeds    0   0   O_u is  a  ... set, "C1" O_1 ,"C2" O_2 . The recommendation is _
    attention_mask   0   0   1   1   1      1    1    1   1     1   1 1   1              1  1
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from allmrec_jax.comparison.exporting import trained_stages, write_safetensors
from allmrec_jax.data.candidates import draw_for_test
from allmrec_jax.data.packing import pack
from allmrec_jax.data.prompts import Prompt
from allmrec_jax.errors import UserError
from allmrec_jax.files import write_atomically
from allmrec_jax.models import projection
from allmrec_jax.models.llm.load import FrozenLLM
from allmrec_jax.pipeline import Pipeline
from allmrec_jax.training.inject_step import inject

ROWS = 8  # prompts that are embedded at once


def prompt_embeds(
    llm: FrozenLLM,
    heads: Any,
    prompts: Sequence[Prompt],
    x_u: Float[np.ndarray, "users d"],
    e: Float[np.ndarray, "items joint"],
) -> list[Float[np.ndarray, "_ h"]]:
    """The matrix (length, h) of each prompt, float32."""

    @jax.jit
    def embed(weights: Any, heads: Any, batch: Any, x_u: jax.Array, e: jax.Array) -> jax.Array:
        O_u, O_i = projection.F_U(heads["F_U"], x_u), projection.F_I(heads["F_I"], e)
        return inject(nnx.merge(llm.graph, weights).embed(batch["tokens"]).astype(jnp.float32), O_u, O_i, batch)

    matrices = []
    for start in range(0, len(prompts), ROWS):
        some = list(prompts[start : start + ROWS])
        # An answer of one token, which nothing is fed of: only the prompts are packed.
        batch = pack(some, [[[0]]] * len(some), rows=np.arange(len(some)), batch=ROWS, tier=128)
        own = np.zeros((ROWS, x_u.shape[1]), np.float32)
        own[: len(some)] = x_u[start : start + ROWS]
        filled = np.asarray(embed(llm.weights, heads, batch, own, e[batch["slot_items"]]))
        matrices += [row[: len(prompt.tokens)] for row, prompt in zip(filled, some, strict=False)]
    return matrices


def left_padded(
    matrices: Sequence[Float[np.ndarray, "_ h"]],
) -> tuple[Float[np.ndarray, "users longest h"], Int[np.ndarray, "users longest"]]:
    """(inputs_embeds, attention_mask) of a batch, as transformers' `generate` takes them."""
    longest = max(len(matrix) for matrix in matrices)
    embeds = np.zeros((len(matrices), longest, matrices[0].shape[1]), np.float32)
    mask = np.zeros((len(matrices), longest), np.int64)
    for row, matrix in enumerate(matrices):
        embeds[row, longest - len(matrix) :], mask[row, longest - len(matrix) :] = matrix, 1
    return embeds, mask


def export_prompts(pipeline: Pipeline, out: Path, keys: Sequence[str]) -> list[Path]:
    """Writes `prompts.safetensors` (inputs_embeds, attention_mask, lengths) and `prompts.json`, who each row is about.

    The candidates are those of the evaluation; the histories those at test time.

    Args:
      keys: the users' ids in the raw data.

    Raises:
      UserError: if stage 2 is not trained, for a user that is unknown or has no test item, or if a file is there.
    """
    if "llm" not in trained_stages(pipeline.workdir):
        raise UserError(f"{pipeline.workdir} holds no F_U and F_I; train them with `allmrec train llm`")
    x, dataset = pipeline.experiment, pipeline.dataset
    paths = [Path(out) / "prompts.safetensors", Path(out) / "prompts.json"]
    if there := next((path for path in paths if path.exists()), None):
        raise UserError(f"{there} exists already: choose another --out or delete it")
    number = {key: user for user, key in enumerate(dataset.user_keys[: dataset.n_users + 1])}
    if unknown := [key for key in keys if not key or key not in number]:
        raise UserError(f"there is no user {unknown[0]!r} in {dataset.name}")
    users = np.array([number[key] for key in keys])
    if not (fine := dataset.has_target("test")[users]).all():
        raise UserError(f"user {keys[int(np.argmin(fine))]} has fewer than three items, so no test item")
    candidates, column = draw_for_test(dataset, users, seed=x.seed, count=x.evaluation.candidates)
    ends = dataset.history_end("test")[users]
    histories = [row[row != 0] for row in dataset.windows(ends, x.llm.history, users)]
    prompts = pipeline.builder(inject=True).prompts(histories, candidates)
    x_u = pipeline.cf.x_u(dataset.windows(ends, x.cf.maxlen, users), users)
    embeds, mask = left_padded(prompt_embeds(pipeline.llm, pipeline.heads, prompts, x_u, pipeline.item_table))
    arrays = {"inputs_embeds": embeds, "attention_mask": mask, "lengths": mask.sum(1)}
    write_safetensors(paths[0], arrays, {"llm": x.llm.llm, "data": dataset.name})
    titles = [title or "No Title" for title in dataset.titles()]
    rows = [
        {
            "user": key,
            "history": [titles[item] for item in histories[row]],
            "candidates": [titles[item] for item in candidates[row]],
            "target": titles[candidates[row, column[row]]],
        }
        for row, key in enumerate(keys)
    ]
    with write_atomically(paths[1]) as file:
        file.write(json.dumps(rows, indent=1, ensure_ascii=False).encode())
    return paths
