"""The data files of the public A-LLMRec code: `NAME.txt` and `NAME_text_name_dict.json.gz`.

The first has one `user item` pair a line, users by id, each user's items in time order. The second is, in spite of its
name, a pickle without compression: `{"title": {id: text}, "description": {id: text}}`, items without a text left out.
"""

import pickle
from pathlib import Path

import numpy as np

from allmrec_jax.data.dataset import Dataset
from allmrec_jax.errors import UserError
from allmrec_jax.files import write_atomically


def sequence_text(dataset: Dataset) -> str:
    """The content of `NAME.txt`."""
    import polars as pl

    pairs = pl.DataFrame({"user": dataset.users_of_items(), "item": np.asarray(dataset.items)})
    return pairs.write_csv(include_header=False, separator=" ")


def text_dict(dataset: Dataset) -> dict[str, dict[int, str]]:
    """The content of `NAME_text_name_dict.json.gz`."""
    texts = {"title": dataset.titles(), "description": dataset.descriptions()}
    return {kind: {item: text for item, text in enumerate(found) if text is not None} for kind, found in texts.items()}


def write_public(dataset: Dataset, folder: Path) -> tuple[Path, Path]:
    """Writes both files into `folder`. Raises `UserError` if one is there already."""
    contents = {
        folder / f"{dataset.name}.txt": sequence_text(dataset).encode(),
        folder / f"{dataset.name}_text_name_dict.json.gz": pickle.dumps(text_dict(dataset), protocol=4),
    }
    for path in contents:
        if path.exists():
            raise UserError(f"{path} exists already: choose another --out or delete it")
    for path, content in contents.items():
        try:
            with write_atomically(path) as file:
                file.write(content)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return tuple(contents)
