"""Writes what `torch.load` reads, without PyTorch: the reverse of `pickled`.

A file of `torch.save` is a zip archive, nothing in it compressed:

    NAME/data.pkl    a pickle of the object, in which each tensor names its storage
    NAME/byteorder   little
    NAME/data/0, 1   the numbers of each storage
    NAME/version     3
"""

from __future__ import annotations

import argparse
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from allmrec_jax.files import write_atomically
from allmrec_jax.models.pickled import DTYPES

_STORAGES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
ALIGNMENT = 64  # of the numbers in the file, as PyTorch maps them into memory


def save(value: Any, path: Path) -> None:
    """Writes `value`: numbers, texts, lists, tuples, dicts, `argparse.Namespace`, and NumPy arrays as tensors on `cpu`.

    Raises:
      TypeError: for anything else.
    """
    arrays: list[np.ndarray] = []
    pickle = b"\x80\x02" + _written(value, arrays) + b"."
    with write_atomically(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, content: Any) -> None:
            entry = zipfile.ZipInfo(f"{Path(path).stem}/{name}")
            at = file.tell() + 30 + len(entry.filename.encode()) + 4
            entry.extra = struct.pack("<2sH", b"FB", pad := -at % ALIGNMENT) + b"Z" * pad
            archive.writestr(entry, content)

        add("data.pkl", pickle)
        add("byteorder", sys.byteorder)
        for key, array in enumerate(arrays):
            add(f"data/{key}", memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
        add("version", "3\n")


def _written(value: Any, arrays: list[np.ndarray]) -> bytes:
    """The instructions of a pickle that make `value`; its arrays are added to `arrays`."""

    def all_of(values: Any) -> bytes:
        return b"".join(_written(one, arrays) for one in values)

    def pairs(table: Any) -> bytes:
        return b"(" + all_of(part for pair in table.items() for part in pair) + b"u" if table else b""

    if (writer := _SCALARS.get(type(value))) is not None:
        return writer(value)
    if isinstance(value, np.ndarray):
        return _tensor(value, arrays)
    if type(value) is list:
        return b"](" + all_of(value) + b"e"
    if type(value) is tuple:
        return b"(" + all_of(value) + b"t"
    if type(value) is OrderedDict:
        return b"ccollections\nOrderedDict\n)R" + pairs(value)
    if type(value) is dict:
        return b"}" + pairs(value)
    if type(value) is argparse.Namespace:
        return b"cargparse\nNamespace\n)\x81}" + pairs(vars(value)) + b"b"
    raise TypeError(f"a {type(value).__name__} cannot be written for PyTorch")


def _tensor(array: np.ndarray, arrays: list[np.ndarray]) -> bytes:
    kind = _STORAGES.get(array.dtype)
    if kind is None:
        raise TypeError(f"PyTorch has no tensor of {array.dtype}")
    arrays.append(array)
    strides = tuple(int(np.prod(array.shape[axis + 1 :], dtype=np.int64)) for axis in range(array.ndim))
    module, _, name = kind.rpartition(".")
    storage = b"".join(
        [
            b"(" + _text("storage") + f"c{module}\n{name}\n".encode(),
            _text(str(len(arrays) - 1)) + _text("cpu") + _integer(array.size) + b"tQ",
        ]
    )
    shape = b"".join(_written(tuple(map(int, part)), arrays) for part in (array.shape, strides))
    rebuild, hooks = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n)R"
    return rebuild + b"(" + storage + _integer(0) + shape + b"\x89" + hooks + b"tR"


def _integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    return b"\x8a" + struct.pack("<B", size) + value.to_bytes(size, "little", signed=True)


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(content := value.encode())) + content


_SCALARS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"N",
    bool: lambda value: b"\x88" if value else b"\x89",
    int: _integer,
    float: lambda value: b"G" + struct.pack(">d", value),
    str: _text,
}
