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
from allmrec_jax.models import pickled


def sequence_text(dataset: Dataset) -> str:
    """The content of `NAME.txt`."""
    import polars as pl

    pairs = pl.DataFrame({"user": dataset.users_of_items(), "item": np.asarray(dataset.items)})
    return pairs.write_csv(include_header=False, separator=" ")


def text_dict(dataset: Dataset) -> dict[str, dict[int, str]]:
    """The content of `NAME_text_name_dict.json.gz`."""
    texts = {"title": dataset.titles(), "description": dataset.descriptions()}
    return {kind: {item: text for item, text in enumerate(found) if text is not None} for kind, found in texts.items()}


SEQUENCES, TEXTS = "{}.txt", "{}_text_name_dict.json.gz"
SOURCE = "files of the public code"  # in the manifest of what was read from them


def write_public(dataset: Dataset, folder: Path, name: str | None = None) -> tuple[Path, Path]:
    """Writes both files into `folder`. Raises `UserError` if one is there already.

    Args:
      name: of the data set in the files' names, which decides on the public code's wording; its own by default.
    """
    name = name or dataset.name
    contents = {
        folder / SEQUENCES.format(name): sequence_text(dataset).encode(),
        folder / TEXTS.format(name): pickle.dumps(text_dict(dataset), protocol=4),
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


def read_public(folder: Path, name: str, out: Path, *, items: int = 0) -> Dataset:
    """The data set of both files, prepared into `out`: ids, order and texts as they stand there.

    Args:
      items: how many there are at least, where a model knows more of them than the files name.

    Raises:
      UserError: if a file is missing or damaged, or the second asks for more than a table of texts needs.
    """
    from allmrec_jax.data.writer import write_dataset

    pairs = _pairs(folder / SEQUENCES.format(name))
    titles, descriptions = (_texts(folder / TEXTS.format(name), kind) for kind in ("title", "description"))
    n_users, n_items = int(pairs[:, 0].max()), max(items, int(pairs[:, 1].max()))
    return write_dataset(
        out,
        name=name,
        items=pairs[np.argsort(pairs[:, 0], kind="stable"), 1],
        offsets=np.concatenate([[0], np.cumsum(np.bincount(pairs[:, 0], minlength=n_users + 1))]),
        times=None,
        ratings=None,
        user_keys=[str(user) for user in range(1, n_users + 1)],
        item_keys=[str(item) for item in range(1, n_items + 1)],
        titles=[titles.get(item) for item in range(1, n_items + 1)],
        descriptions=[descriptions.get(item) for item in range(1, n_items + 1)],
        categories=[[]] * n_items,
        manifest={"settings": {"source": SOURCE, "name": name, "recipe": "as-is", "strip_years": False}},
    )


def _pairs(path: Path) -> np.ndarray:
    """(n, 2): user and item of each line."""
    import polars as pl

    if not path.is_file():
        raise UserError(f"{path} is missing; it holds the users' items, one `user item` a line")
    schema = {"user": pl.Int64, "item": pl.Int64}
    try:
        pairs = pl.read_csv(path, separator=" ", has_header=False, schema=schema).to_numpy()
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{path} is not one `user item` a line ({str(error).splitlines()[0]})") from error
    # There are no more users or items than lines; a hundred times as many are a mistake, and would take memory.
    if not len(pairs) or np.isnan(pairs.astype(float)).any() or pairs.min() < 1 or pairs.max() > 100 * (len(pairs) + 9):
        raise UserError(f"{path} is not one `user item` a line; ids are whole numbers 1, 2, ...")
    return pairs


def _texts(path: Path, kind: str) -> dict[int, str]:
    """Item -> its title or description."""
    if not path.is_file():
        raise UserError(f"{path} is missing; it holds the items' titles and descriptions")
    table = pickled.load(path, allowed={})
    found = table.get(kind) if isinstance(table, dict) else None
    if not isinstance(found, dict) or not all(type(i) is int and type(text) is str for i, text in found.items()):
        raise UserError(f"{path} holds no {kind}s by item id; is it the public code's table of texts?")
    return found
