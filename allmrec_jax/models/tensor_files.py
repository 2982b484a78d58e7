"""The tensors of a folder of weights, `.safetensors` or PyTorch's `.bin`, each read when asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from allmrec_jax.errors import UserError
from allmrec_jax.models import pickled

BIN = "pytorch_model.bin"


class _Files(Mapping):
    """Name -> tensor, over several files; `_where` says what holds each name."""

    _where: dict[str, Any]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


SAFE_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class SafeTensors(_Files):
    """Name -> tensor, over all `.safetensors` files of `folder`: views of the memory-mapped files, so that a slice of
    a tensor reads that slice alone.

    Raises:
      UserError: if there is no such file, one is damaged, or two hold a tensor of the same name.
    """

    def __init__(self, folder: Path):
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder} has a config.json but no .safetensors file")
        self._where = {}
        for file in files:
            for name, tensor in _safe_views(file).items():
                if name in self._where:
                    raise UserError(f"{folder}: the tensor {name!r} is in two files; keep the files of one model only")
                self._where[name] = tensor

    def __getitem__(self, name: str) -> np.ndarray:
        return self._where[name]


def _safe_views(file: Path) -> dict[str, np.ndarray]:
    """The tensors of one file: 8 bytes, the length of the header; the header, JSON; the numbers, as it says."""
    try:
        data = np.memmap(file, np.uint8, mode="r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        if start > len(data):
            raise ValueError("its header is cut")
        header = json.loads(data[8:start].tobytes())
        views = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in SAFE_DTYPES:
                known = ", ".join(SAFE_DTYPES)
                raise UserError(f"{file}: {name!r} is stored as {entry['dtype']}, which is not supported ({known} are)")
            dtype, (begin, end) = np.dtype(SAFE_DTYPES[entry["dtype"]]), entry["data_offsets"]
            if not pickled.sizes(entry["shape"]):
                raise ValueError(f"{name!r} has an impossible shape")
            if end - begin != math.prod(entry["shape"]) * dtype.itemsize or begin < 0:
                raise ValueError(f"{name!r} has another size than its shape")
            if start + end > len(data):
                raise ValueError(f"{name!r} is cut: the file ends at {len(data)} of at least {start + end} bytes")
            views[name] = np.ndarray(tuple(entry["shape"]), dtype, data, start + begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); delete it and fetch it again") from error
    return views


class PickledTensors(_Files):
    """Name -> tensor, over files that `torch.save` wrote, each holding one table of tensors.

    Raises:
      UserError: if a file is damaged, asks for more than weights need (`pickled.load`), holds something else than a
        table of tensors, or two hold a tensor of the same name.
    """

    def __init__(self, files: Sequence[Path]):
        self._where = {}
        for file in files:
            table = pickled.load(file)
            if not isinstance(table, dict):
                raise UserError(f"{file} holds a {type(table).__name__} in place of a table of tensors")
            for name, tensor in table.items():
                if not isinstance(name, str):
                    raise UserError(f"{file}: the name of a tensor is no text, but of type {type(name).__name__}")
                if not isinstance(tensor, pickled.Tensor):
                    raise UserError(f"{file}: {name!r} is a {type(tensor).__name__}, not a tensor; is it a checkpoint?")
                if name in self._where:
                    raise UserError(f"{file}: the tensor {name!r} is in another file too; keep those of one model only")
                self._where[name] = tensor

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self._where[name])


class Renamed(Mapping):
    """The same tensors under other names.

    Raises:
      UserError: if two get the same name.
    """

    def __init__(self, tensors: Mapping[str, Any], rename: Callable[[str], str], source: str):
        self._tensors, self._names = tensors, {}
        for name in tensors:
            if (new := rename(name)) in self._names:
                raise UserError(
                    f"{source}: {name!r} and {self._names[new]!r} are the same parameter; keep one model only"
                )
            self._names[new] = name

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def weight_files(folder: Path) -> list[Path]:
    """The files that `tensors(folder)` reads: all `.safetensors`; without any, PyTorch's `.bin`, whole or in parts.

    Raises:
      UserError: for a damaged index, or a part that is missing.
    """
    if files := sorted(folder.glob("*.safetensors")):
        _named(folder / "model.safetensors.index.json")
        return files
    if (folder / BIN).is_file():
        return [folder / BIN]
    return _named(folder / f"{BIN}.index.json")


def _named(index: Path) -> list[Path]:
    """The parts that an index names, all of them there; none if there is no index."""
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [index.parent / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({error}); fetch it again") from error
    for file in files:
        if not file.is_file():
            raise UserError(f"{index} names {file.name}, which is missing; fetch it too")
    return files


def tensors(folder: Path) -> Mapping[str, np.ndarray]:
    """The tensors of a Hugging Face folder, by name; see `weight_files` for where they are looked for.

    Raises:
      UserError: if there are no weights, or they are damaged.
    """
    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder} holds no weights: put model.safetensors or {BIN} there")
    return SafeTensors(folder) if files[0].suffix == ".safetensors" else PickledTensors(files)
