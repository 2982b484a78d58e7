"""A prepared data set as TensorFlow Datasets (array_record files, no TensorFlow), and back.

    FOLDER/allmrec_users/NAME/1.0.0   splits `users` and `cold_users`: id, key, items in time order, times, ratings
    FOLDER/allmrec_items/NAME/1.0.0   split `items`: id, key, title, description, categories, brand, missing

Whoever has TFDS and not this package reads them:

    builder = tfds.builder_from_directory("FOLDER/allmrec_users/NAME/1.0.0")
    builder.as_data_source("users")[0]     # {"id": 1, "items": array([...]), ...}

Text comes back as bytes. TFDS knows no missing value: `missing` names the fields that have none, which stand as "".
"""

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from allmrec_jax.data.dataset import Dataset
from allmrec_jax.data.writer import write_dataset
from allmrec_jax.errors import UserError
from allmrec_jax.progress import progress

with warnings.catch_warnings():  # its dependencies' deprecations are not ours to mend
    warnings.simplefilter("ignore")
    import tensorflow_datasets as tfds

VERSION = "1.0.0"
USERS, ITEMS = "allmrec_users", "allmrec_items"
_TEXTS = ("title", "description", "brand")


class _Builder(tfds.core.GeneratorBasedBuilder):
    """Made for one prepared data set; records stay in the order of their ids."""

    VERSION = tfds.core.Version(VERSION)
    RELEASE_NOTES = {str(VERSION): "The first."}  # noqa: RUF012, as TFDS declares it

    def __init__(self, *, dataset: Dataset, done: Callable[[int], None], **options):
        self.dataset, self.done = dataset, done  # `done` is told how many records are written
        config = tfds.core.BuilderConfig(name=dataset.name, version=VERSION, description=f"{dataset.name}, prepared")
        super().__init__(config=config, file_format="array_record", **options)

    def _log_download_bytes(self) -> None:
        """Nothing is downloaded: nothing is said of it."""

    def _log_download_done(self) -> None:
        """Said by whoever called us."""

    def _features(self) -> dict:
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        metadata = {key: value for key, value in self.dataset.manifest.items() if key not in ("format", "scenarios")}
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.dataset.name}: interaction sequences and item texts, prepared by allmrec",
            features=tfds.features.FeaturesDict(self._features()),
            metadata=tfds.core.MetadataDict(metadata),
            disable_shuffling=True,
        )


class AllmrecUsers(_Builder):
    """Each user's sequence."""

    name = USERS

    def _features(self) -> dict:
        features = {"id": np.int64, "key": tfds.features.Text(), "items": tfds.features.Sequence(np.int32)}
        for name, kind in (("times", np.int64), ("ratings", np.float32)):
            if getattr(self.dataset, name) is not None:
                features[name] = tfds.features.Sequence(kind)
        return features

    def _split_generators(self, _) -> dict[str, Iterator]:
        splits = {"users": self._generate_examples()}
        if len(self.dataset.cold_items):
            splits["cold_users"] = self._cold_users()
        return splits

    def _generate_examples(self):
        d = self.dataset
        columns = {name: getattr(d, name) for name in ("items", "times", "ratings") if getattr(d, name) is not None}
        offsets, keys = d.offsets.tolist(), d.user_keys
        for user in range(1, d.n_users + 1):
            part = slice(offsets[user], offsets[user + 1])
            self.done(user)
            yield user, {"id": user, "key": keys[user], **{name: column[part] for name, column in columns.items()}}

    def _cold_users(self):
        d = self.dataset
        none = {name: np.zeros(0, kind) for name, kind in (("times", np.int64), ("ratings", np.float32))}
        none = {name: empty for name, empty in none.items() if getattr(d, name) is not None}
        for row, items in enumerate(d.cold_items):
            user = d.n_users + 1 + row
            yield user, {"id": user, "key": d.user_keys[user], "items": items, **none}


class AllmrecItems(_Builder):
    """Each item's texts."""

    name = ITEMS

    def _features(self) -> dict:
        words = tfds.features.Sequence(tfds.features.Text())
        texts = {name: tfds.features.Text() for name in ("key", *_TEXTS)}
        return {"id": np.int64, **texts, "categories": words, "missing": words}

    def _split_generators(self, _) -> dict[str, Iterator]:
        return {"items": self._generate_examples()}

    def _generate_examples(self):
        d = self.dataset
        columns = zip(d.item_keys, d.categories(), d.titles(), d.descriptions(), d.brands(), strict=True)
        for item, (key, categories, *texts) in enumerate(columns):
            if item:
                found = dict(zip(_TEXTS, texts, strict=True))
                self.done(item)
                yield (
                    item,
                    {
                        "id": item,
                        "key": key,
                        **{name: text or "" for name, text in found.items()},
                        "categories": categories,
                        "missing": [name for name, text in found.items() if text is None],
                    },
                )


def write_tfds(dataset: Dataset, folder: Path, console=None) -> Path:
    """Writes both parts into `folder`; all or nothing.

    Raises:
      UserError: it is there already, or cannot be written.
    """
    folder = Path(folder)
    targets = [folder / name / dataset.name for name in (USERS, ITEMS)]
    for target in targets:
        if target.exists():
            raise UserError(f"{target} exists already: choose another --out or delete it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as scratch:
            for kind, total, unit in (
                (AllmrecUsers, dataset.n_users, "users"),
                (AllmrecItems, dataset.n_items, "items"),
            ):
                with progress(f"writing {unit}", total, unit=unit, console=console) as bar:
                    done = _every(max(1, total // 200), bar.update)
                    builder = _quietly(lambda kind=kind, done=done: kind(dataset=dataset, done=done, data_dir=scratch))
                    _quietly(builder.download_and_prepare)
                    bar.update(total)
            for target in targets:
                target.parent.mkdir(exist_ok=True)
                os.replace(Path(scratch) / target.relative_to(folder), target)
    except (OSError, RuntimeError) as error:  # array_record says of a full disk that it is a RuntimeError
        for target in targets:
            shutil.rmtree(target, ignore_errors=True)
        raise UserError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from error
    return folder


def read_tfds(folder: Path, out: Path, *, name: str | None = None) -> Dataset:
    """The prepared data set that `write_tfds` wrote into `folder`, written into `out`.

    Args:
      name: of the data set, where the folder holds several.
    Raises:
      UserError: `folder` holds no such data set, or is damaged; `out` is taken.
    """
    folder = Path(folder)
    names = sorted(path.name for path in (folder / USERS).glob("*") if (folder / ITEMS / path.name).is_dir())
    if name is None and len(names) != 1:
        found = f"several data sets ({', '.join(names)}): say --as NAME" if names else "no data set of allmrec"
        raise UserError(f"{folder} holds {found}")
    name = name or names[0]
    try:
        users = _quietly(lambda: tfds.builder_from_directory(str(folder / USERS / name / VERSION)))
        items = _quietly(lambda: tfds.builder_from_directory(str(folder / ITEMS / name / VERSION)))
        metadata = dict(users.info.metadata)
        source = _quietly(users.as_data_source)
        arrays, keys = _sequences(source["users"], metadata)
        cold = list(source["cold_users"]) if "cold_users" in source else []
        table = list(_quietly(items.as_data_source)["items"])
    except Exception as error:  # TFDS raises whatever its parts raise: AssertionError, ValueError, RuntimeError
        raise UserError(f"{folder} holds no sound data set {name!r} of allmrec ({_short(error)})") from error
    dataset = write_dataset(
        out,
        name=metadata["name"],
        **arrays,
        user_keys=keys,
        item_keys=[row["key"].decode() for row in table],
        titles=_texts(table, "title"),
        descriptions=_texts(table, "description"),
        categories=[[entry.decode() for entry in row["categories"]] for row in table],
        brands=_texts(table, "brand"),
        cold_items=np.stack([row["items"] for row in cold]) if cold else None,
        cold_keys=[row["key"].decode() for row in cold],
        seed=metadata["seed"],
        no_cold_users=metadata["no_cold_users"],
        manifest={key: value for key, value in metadata.items() if key not in _OURS},
    )
    if dataset.fingerprint != metadata["fingerprint"]:
        shutil.rmtree(out)
        raise UserError(f"{folder} was altered since it was written: its fingerprint is another one")
    return dataset


_OURS = ("name", "seed", "no_cold_users", "counts", "has", "fingerprint")  # `write_dataset` says these itself


def _sequences(source, metadata: dict) -> tuple[dict[str, np.ndarray | None], list[str]]:
    """The flat arrays and the users' keys, filled in record by record."""
    total, kinds = metadata["counts"]["interactions"], {"items": np.int32, "times": np.int64, "ratings": np.float32}
    arrays = {name: np.empty(total, kind) if metadata["has"].get(name, True) else None for name, kind in kinds.items()}
    offsets, keys = np.zeros(len(source) + 2, np.int64), []
    for user, row in enumerate(source, 1):
        start = offsets[user]
        offsets[user + 1] = stop = start + len(row["items"])
        for name, array in arrays.items():
            if array is not None:
                array[start:stop] = row[name]
        keys.append(row["key"].decode())
    if offsets[-1] != total:
        raise ValueError(f"{offsets[-1]:,} interactions instead of {total:,}")
    return {**arrays, "offsets": offsets}, keys


def _texts(table: list[dict], name: str) -> list[str | None]:
    return [None if name.encode() in row["missing"] else row[name].decode() for row in table]


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _every(count: int, call: Callable[[int], None]) -> Callable[[int], None]:
    return lambda done: call(done) if done % count == 0 else None


def _quietly(call: Callable):
    """TFDS warns of every builder that is made by hand, and draws bars of its own."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    finally:
        tfds.enable_progress_bar()
        logger.setLevel(level)
