"""A model that somebody else has trained: its item table, and what it knows of users, from a file.

    E   (n_items + 1, d) or (n_items, d)   item rows in the order of the data set's ids
    P   (n_users + 1, d) or (n_users, d)   user representations; may be missing
    A   (d + 1, d) or (d, d)               x_u of any history = [mean of its E_i ; 1] A; may be missing

Without A it is fitted to P (`models.ncf.fold_in`), and without either x_u is the mean of the history's E_i. The score
is x_u . E_i.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from allmrec_jax.errors import UserError


@dataclass(frozen=True)
class GivenConfig:
    """Sizes of the file's arrays."""

    n_items: int
    n_users: int
    width: int
    maxlen: int = 50


def read(path: Path, n_items: int, n_users: int) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` or `.safetensors` file, float32: E and P with a row 0, A (d + 1, d).

    Raises:
      UserError: if the file cannot be read, or an array is not what it should be.
    """
    found = _arrays(path)
    if "E" not in found:
        raise UserError(f"{path} holds {', '.join(sorted(found)) or 'nothing'}, but no array E (items, width)")
    if found["E"].ndim != 2 or not found["E"].size:
        raise UserError(f"{path}: E has the shape {found['E'].shape}, but must be (items, width)")
    d = found["E"].shape[1]
    read = {}
    for name, count, because in (
        ("E", n_items, f"the data set has {n_items:,} items"),
        ("P", n_users, f"the data set has {n_users:,} users and E is {d:,} wide"),
        ("A", d, f"E is {d:,} wide"),
    ):
        if name not in found:
            continue
        array = found[name]
        if array.shape not in (fine := ((count, d), (count + 1, d))):
            raise UserError(f"{path}: {name} has the shape {array.shape}, but {because}: {fine[0]} or {fine[1]}")
        if not np.issubdtype(array.dtype, np.floating):
            raise UserError(f"{path}: {name} holds {array.dtype}, but must hold float32 (or float16, float64)")
        with np.errstate(over="ignore"):
            array = np.asarray(array, np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds values that are not finite")
        if len(array) == count:
            zero = np.zeros_like(array[:1])
            array = np.concatenate([array, zero] if name == "A" else [zero, array])
        read[name] = array
    return read


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """What tells one content of a file from another: SHA-256 of the arrays that `read` gives."""
    content = hashlib.sha256()
    for name in sorted(arrays):
        content.update(f"{name} {arrays[name].shape} ".encode())
        content.update(arrays[name].ravel().view(np.uint8))
    return content.hexdigest()


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"there is no file {path}; cf.file names the .npz or .safetensors with E")
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:
        raise UserError(f"{path} cannot be read: it is no .npz or .safetensors of plain numbers") from error
