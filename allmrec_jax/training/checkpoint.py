"""One folder of Orbax checkpoints a stage, with what is needed to know whether they fit.

<workdir>/<stage>/config.json      the part of the experiment that this stage depends on
<workdir>/<stage>/checkpoints/N/   `state` (arrays) and `meta` (curves, metrics) after N steps
"""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from allmrec_jax.config import Experiment, as_dict
from allmrec_jax.errors import UserError
from allmrec_jax.files import write_atomically

logging.getLogger("absl").setLevel(logging.CRITICAL)  # damage is reported in our own words

Curves = dict[str, list[list[float]]]  # name -> [[step, value], ...]
RECORD = "files.json"


def write_json(path: Path, value: Any) -> None:
    """Writes atomically."""
    with write_atomically(path) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True).encode())


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as `{"a.b": value}`."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in flatten(value, f"{prefix}.{key}".strip(".")).items()}


def claim_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Makes `folder` belong to `identity`, or checks that it already does.

    A field of the config that is younger than the folder counts as its default there.

    Raises:
      UserError: naming the first differing field, if the folder was made by another config or from other data.
    """
    path = folder / "config.json"
    identity = json.loads(json.dumps(identity))
    if not path.exists():
        write_json(path, identity)
        return
    try:
        found = flatten(dict(json.loads(path.read_text())))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged; delete {folder} to train this stage again") from error
    wanted, defaults = flatten(identity), flatten(as_dict(Experiment()))
    for field in sorted(found.keys() | wanted.keys()):
        old, new = found.get(field, defaults.get(field, "(absent)")), wanted.get(field, "(absent)")
        if old != new:
            raise UserError(
                f"{folder} was made with {field}={old!r}, but now it is {new!r}; "
                f"choose another --workdir, or delete {folder} to train this stage again"
            )


def checksums(folder: Path) -> dict[str, list[int]]:
    """`{relative path: [bytes, crc32]}` of every file in the folder but the record itself."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != RECORD:
            size, checksum = 0, 0
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
            found[path.relative_to(folder).as_posix()] = [size, checksum]
    return found


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint according to its record; None if nothing is, or if there is no record.

    Orbax itself takes flipped bits for weights, and reports a cut file with pages of internals.
    """
    try:
        recorded = dict(json.loads((folder / RECORD).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        return f"{RECORD} is damaged"
    found = checksums(folder)
    for name, entry in recorded.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != entry:
            return f"{name} was cut short or altered"
    return None


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """`a/b/c` -> shape, for the arrays of a tree, in its order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(np.shape(leaf)) for path, leaf in leaves}


def check_fits(folder: Path, like: Any) -> None:
    """That the arrays of one checkpoint have the names and the shapes of those of `like`; only its metadata are read.

    Orbax itself reports a difference with pages of internals, as if it were damage.

    Raises:
      UserError: naming the first array that differs.
      Exception: any, of Orbax's, if the metadata are damaged.
    """
    saved = _shapes(ocp.StandardCheckpointHandler().metadata(folder / "state").tree)
    wanted = _shapes(like)
    for name in [*wanted, *sorted(saved.keys() - wanted.keys())]:
        if saved.get(name) != wanted.get(name):
            raise UserError(
                f"{folder} holds another model: {name} is {saved.get(name, 'missing')} there and "
                f"{wanted.get(name, 'missing')} in this run; choose another --workdir, or the same model"
            )


class Checkpoints:
    """Saves and restores the state of one stage. The newest are kept, and the best by `best_metric` if one is named."""

    def __init__(self, folder: Path, *, best_metric: str | None = None, keep: int = 2):
        self.folder = (Path(folder) / "checkpoints").absolute()
        policies = [ocp.checkpoint_managers.LatestN(keep)]
        if best_metric is not None:
            policies.append(ocp.checkpoint_managers.BestN(get_metric_fn=lambda m: m[best_metric], n=1))
        self._best_metric = best_metric
        self._unrecorded: list[int] = []
        self._damaged: dict[int, str] = {}  # step -> what is wrong with it
        self._reported: set[int] = set()
        for path in self.folder.glob("[0-9]*/metrics/metrics"):
            try:
                json.loads(path.read_text())
            except (OSError, ValueError):  # it would stop Orbax from opening any of them
                self._damaged[int(path.parts[-3])] = "its metrics are damaged"
                shutil.rmtree(path.parent, ignore_errors=True)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=None if best_metric is None else (lambda m: m[best_metric]),
                enable_async_checkpointing=True,
            ),
            item_names=("state", "meta"),
        )

    def _finish(self) -> None:
        """Waits for the save under way and records what was written."""
        try:
            self._manager.wait_until_finished()
        except OSError as error:
            raise self._cannot_save(error) from error
        for step in self._unrecorded:
            folder = self.folder / str(step)
            if folder.is_dir() and jax.process_index() == 0:
                write_json(folder / RECORD, checksums(folder))
        self._unrecorded.clear()

    def _cannot_save(self, error: OSError) -> UserError:
        return UserError(f"cannot save to {self.folder}: {error.strerror or error}; earlier checkpoints are kept")

    def save(self, step: int, state: Any, meta: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Saves after `step` steps, in the background. A sound checkpoint of that step is left as it is.

        Raises:
          UserError: if it cannot be written (a full disk may show only when the next one is saved).
        """
        self._finish()
        meta = copy.deepcopy(meta)  # it is written in the background, while the loop goes on appending to its curves
        try:
            if step in self._manager.all_steps():
                if step not in self._damaged:
                    return
                self._manager.delete(step)
                del self._damaged[step]
                self._reported.discard(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
                metrics=metrics,
            )
        except OSError as error:
            raise self._cannot_save(error) from error
        self._unrecorded.append(step)

    def _steps(self, best: bool) -> list[int]:
        """All steps, the newest (or the best) first."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        if best and self._best_metric is not None:

            def value(step: int) -> float:
                try:
                    return float((self._manager.metrics(step) or {}).get(self._best_metric, -math.inf))
                except Exception:  # whatever damage makes Orbax raise
                    return -math.inf

            steps.sort(key=value, reverse=True)
        return steps

    def restore(self, like: Any, *, best: bool = False, warn: Any = print) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, meta) of the newest (or best) checkpoint that can be read; None if there is none.

        `like` gives structure, shapes, dtypes and shardings. A damaged checkpoint is reported and an earlier one used.

        Raises:
          UserError: if checkpoints are there but none can be read, or if they are of another model.
        """
        self._finish()
        steps = self._steps(best)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        found = None
        for step in steps:
            reason = self._damaged.get(step) or damage(self.folder / str(step))
            if reason is None:
                try:
                    check_fits(self.folder / str(step), like)
                    restored = self._manager.restore(
                        step,
                        args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()),
                    )
                    found = step, restored["state"], restored["meta"]
                    break
                except UserError:
                    raise
                except Exception as error:
                    reason = str(error).strip().partition("\n")[0][:160] or type(error).__name__
            self._damaged[step] = reason
        for step in sorted(self._damaged.keys() - self._reported, reverse=True):
            warn(f"checkpoint {self.folder / str(step)} cannot be read ({self._damaged[step]}); using another one")
            self._reported.add(step)
        if steps and found is None:
            raise UserError(f"no checkpoint in {self.folder} can be read; delete {self.folder.parent} to train again")
        return found

    def close(self) -> None:
        """Waits for the save under way."""
        try:
            self._finish()
        finally:
            self._manager.close()
