"""A stage 0 model that the user brings, a Python file or arrays: the work directory keeps a copy and its hash.

cf/model.py     `--cf.model mine.py`
cf/given.npz    `--cf.model given --cf.file mine.npz`
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from allmrec_jax.config import CF
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.models import collaborative, given


def find(config: CF, folder: Path) -> tuple[Path, Path] | None:
    """Where the model is read from, and where its copy in `folder` is; None for a model of ours.

    The copy is read where there is no file of the name: it is gone, or the name is of another directory.
    """
    if config.model == "given":
        named, copy = Path(config.file or ""), folder / "given.npz"
    elif Path(config.model).suffix == ".py":
        named, copy = Path(config.model), folder / "model.py"
    else:
        return None
    return (copy if copy.is_file() and not named.is_file() else named), copy


def configure(config: CF, dataset: Dataset, folder: Path) -> Any:
    """The model's own config. Raises `UserError` if there is no such model, or the user's own cannot be used."""
    values = dataclasses.asdict(config) | {"n_items": dataset.n_items, "n_users": dataset.n_users}
    found = find(config, folder)
    return collaborative.configure(config.model if found is None else str(found[0]), values)


def content(config: CF, dataset: Dataset, folder: Path) -> dict[str, Any]:
    """What stands in the identity of stage 0 for the path of the user's file: its name and the SHA-256 of its content.
    Nothing for a model of ours.

    Raises:
      UserError: if there is no such file, or it cannot be used.
    """
    found = find(config, folder)
    if found is None:
        return {}
    if config.model == "given":
        field, digest = "file", given.digest(given.read(found[0], dataset.n_items, dataset.n_users))
    else:
        configure(config, dataset, folder)
        field, digest = "model", hashlib.sha256(found[0].read_bytes()).hexdigest()
    name = Path(getattr(config, field)).name
    return {field: name, "sha256": {name: digest[:16]}}
