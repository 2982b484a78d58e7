"""Models of other work directories in the same tables: an ablation, MLP-LLM, another CF model, on the same users.

What is read are the scores that their own evaluation has kept; nothing is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from allmrec_jax.config import Injection, opened
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation.lists import Lists
from allmrec_jax.evaluation.scores import read_lists, read_scores


def names(folders: Sequence[str], own: Injection) -> dict[str, str]:
    """What each work directory's model is called in tables -> its folder: `mlp-llm`, where ours is not, else
    `a-llmrec@NAME` by the name of the folder.

    Raises:
      UserError: if one is no work directory, or two have the same name.
    """
    found: dict[str, str] = {}
    for folder in folders:
        model = opened(Path(folder)).llm.model
        name = model if model != own.model and model not in found else f"{model}@{Path(folder).resolve().name}"
        if name in found:
            raise UserError(f"{found[name]} and {folder} would both be called {name}; rename one of the folders")
        found[name] = folder
    return found


def scores(folders: dict[str, str], of: Lists) -> dict[str, np.ndarray]:
    """The scores of each on the same candidates.

    Raises:
      UserError: if one was not evaluated on all of these lists.
    """
    found = {}
    for name, folder in folders.items():
        model, kept = name.partition("@")[0], Path(folder) / "evaluation"
        lists = read_lists(kept / f"{of.group}.lists.npz")
        if lists is None or len(lists["users"]) < len(of.users):
            have = 0 if lists is None else len(lists["users"])
            raise UserError(
                f"{folder} was evaluated on {have:,} of the {len(of.users):,} users ({of.group}); run `allmrec "
                f"evaluate --workdir {folder}` on as many"
            )
        n = len(of.users)
        if not all(np.array_equal(lists[part][:n], getattr(of, part)) for part in ("users", "candidates", "column")):
            raise UserError(f"{folder} was evaluated on other users or candidates: another data set, seed or number")
        saved = read_scores(kept / f"{of.group}.{model}.npy", of.candidates.shape)
        if saved is None:
            raise UserError(f"{folder} holds no scores of {model} ({of.group}); evaluate it first")
        found[name] = saved
    return found
