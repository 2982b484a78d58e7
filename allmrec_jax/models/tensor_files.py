"""The tensors of a folder of `.safetensors` files, each read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from allmrec_jax.errors import UserError


class SafeTensors(Mapping):
    """Name -> tensor, over all `.safetensors` files of `folder`.

    Raises:
      UserError: if there is no such file, one is damaged, or two hold a tensor of the same name.
    """

    def __init__(self, folder: Path):
        from safetensors import safe_open

        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder} has a config.json but no .safetensors file")
        self._where: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="flax")  # numpy has no bfloat16
            except Exception as error:
                raise UserError(f"{file} is damaged ({error}); delete it and fetch it again") from error
            for name in handle.keys():  # noqa: SIM118
                if name in self._where:
                    raise UserError(f"{folder}: the tensor {name!r} is in two files; keep the files of one model only")
                self._where[name] = handle

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self._where[name].get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
