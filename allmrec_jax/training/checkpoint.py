"""One folder of Orbax checkpoints a stage, with what is needed to know whether they fit.

<workdir>/<stage>/config.json      the part of the experiment that this stage depends on
<workdir>/<stage>/checkpoints/N/   `state` (arrays) and `meta` (curves, metrics) after N steps
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from allmrec_jax.errors import UserError

logging.getLogger("absl").setLevel(logging.ERROR)

Curves = dict[str, list[list[float]]]  # name -> [[step, value], ...]


def write_json(path: Path, value: Any) -> None:
    """Writes atomically: a reader finds the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(value, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as `{"a.b": value}`."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in flatten(value, f"{prefix}.{key}".strip(".")).items()}


def claim_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Makes `folder` belong to `identity`, or checks that it already does.

    Raises:
      UserError: naming the first differing field, if the folder was made by another config or from other data.
    """
    path = folder / "config.json"
    identity = json.loads(json.dumps(identity))
    if not path.exists():
        write_json(path, identity)
        return
    try:
        found = flatten(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged; delete {folder} to train this stage again") from error
    wanted = flatten(identity)
    for field in sorted(found.keys() | wanted.keys()):
        old, new = found.get(field, "(absent)"), wanted.get(field, "(absent)")
        if old != new:
            raise UserError(
                f"{folder} was made with {field}={old!r}, but now it is {new!r}; "
                f"choose another --workdir, or delete {folder} to train this stage again"
            )


class Checkpoints:
    """Saves and restores the state of one stage. The newest are kept, and the best by `best_metric` if one is named."""

    def __init__(self, folder: Path, *, best_metric: str | None = None, keep: int = 2):
        self.folder = (Path(folder) / "checkpoints").absolute()
        policies = [ocp.checkpoint_managers.LatestN(keep)]
        if best_metric is not None:
            policies.append(ocp.checkpoint_managers.BestN(get_metric_fn=lambda m: m[best_metric], n=1))
        self._best_metric = best_metric
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=None if best_metric is None else (lambda m: m[best_metric]),
                enable_async_checkpointing=True,
            ),
            item_names=("state", "meta"),
        )

    def save(self, step: int, state: Any, meta: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Saves after `step` steps, in the background. A step that is there already is left as it is."""
        if step in self._manager.all_steps():
            return
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
                metrics=metrics,
            )
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"cannot save to {self.folder}: {why}; earlier checkpoints are kept") from error

    def restore(self, like: Any, *, best: bool = False, warn: Any = print) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, meta) of the newest (or best) checkpoint that can be read; None if there is none.

        `like` gives structure, shapes, dtypes and shardings. A damaged checkpoint is reported and an earlier one used.

        Raises:
          UserError: if checkpoints are there but none can be read.
        """
        self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps(), reverse=True)
        if best and self._manager.best_step() is not None:
            steps.sort(key=lambda step: step != self._manager.best_step())
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        for step in steps:
            try:
                restored = self._manager.restore(
                    step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
                )
                return step, restored["state"], restored["meta"]
            except Exception as error:
                reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
                warn(f"checkpoint {self.folder / str(step)} cannot be read ({reason}); trying an earlier one")
        if steps:
            raise UserError(f"no checkpoint in {self.folder} can be read; delete {self.folder.parent} to train again")
        return None

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
