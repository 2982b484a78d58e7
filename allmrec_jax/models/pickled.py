"""Reads what `torch.save` wrote, without PyTorch and without running anything that stands in the file.

The pickle in it is run by `pickle_machine`, which makes plain data and looks the few globals that weights need up in an
allow-list. A name that is not on the list, or an instruction that could reach further, is an error that says which.

Both formats of `torch.save` are read, the zip archive of today and the stream of pickles of before PyTorch 1.6, and so
is a plain pickle. Tensors are read from the (memory-mapped) file when they are asked for.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import types
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from allmrec_jax.errors import UserError
from allmrec_jax.models.pickle_machine import Damaged, Global, Maker, Refused, run, table

DTYPES: dict[str, Any] = {
    "torch.FloatStorage": np.float32,
    "torch.DoubleStorage": np.float64,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": jnp.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}


class Storage:
    """A run of numbers in the file: `count` of `dtype` under `key`."""

    def __init__(self, source: Source, key: str, dtype: Any, count: int):
        self.source, self.key, self.dtype, self.count = source, key, np.dtype(dtype), count

    def read(self) -> np.ndarray:
        """Its bytes."""
        return self.source.bytes_of(self.key, self.count * self.dtype.itemsize)


def sizes(shape: Sequence[Any]) -> bool:
    """Whether they can be the sizes of an array's axes, and can be multiplied in no time."""
    if len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**56 for n in shape):
        return False
    return math.prod(n for n in shape if n) < 2**56  # numpy asks the like even of an array without elements


class Tensor:
    """A view of a storage. `numpy.asarray(tensor)` reads it; nothing is copied if the machine's memory order allows."""

    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]):
        if not sizes(shape) or len(shape) != len(strides) or not all(sizes((n,)) for n in (offset, *strides)):
            raise Damaged("a tensor of impossible shape")
        # Nothing steps along an axis of size 1; what PyTorch wrote there is of no meaning.
        strides = tuple(stride if n > 1 else 0 for n, stride in zip(shape, strides, strict=True))
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        # The second: what is expanded (stride 0) beyond its storage could ask for any amount of memory.
        if 0 not in shape and (last >= storage.count or math.prod(shape) > storage.count):
            raise Damaged("a tensor that reaches beyond its storage")
        self._storage, self._offset, self._strides = storage, offset, strides
        self.shape, self.dtype = shape, storage.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if 0 in self.shape:
            return np.zeros(self.shape, dtype or self.dtype)
        size, stored = self.dtype.itemsize, self.dtype
        if self._storage.source.big_endian and size > 1:
            stored = stored.newbyteorder(">")
        strides = [stride * size for stride in self._strides]
        view = np.ndarray(self.shape, stored, self._storage.read(), self._offset * size, strides)
        return np.array(view, dtype or self.dtype) if copy else np.asarray(view, dtype or self.dtype)


class Source:
    """Where the numbers are: key -> (offset, bytes, crc32 or None) in the memory-mapped file."""

    def __init__(self, data: np.ndarray, path: Path):
        self.data, self.path, self.big_endian = data, path, False
        self.places: dict[str, tuple[int, int, int | None]] = {}
        self._checked: set[str] = set()

    def bytes_of(self, key: str, size: int) -> np.ndarray:
        offset, found, crc = self.places.get(key, (0, -1, None))
        if found != size or not 0 <= offset <= len(self.data) - size:
            raise UserError(f"{self.path} is damaged (the storage {key!r} is cut or missing); fetch it again")
        data = self.data[offset : offset + size]
        if crc is not None and key not in self._checked:
            if zlib.crc32(data) != crc:
                raise UserError(f"{self.path} is damaged (the storage {key!r} fails its checksum); fetch it again")
            self._checked.add(key)
        return data


STORAGES: Mapping[str, None] = dict.fromkeys(DTYPES)


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Tensor:
    if not isinstance(storage, Storage) or type(shape) is not tuple or type(strides) is not tuple:
        raise Damaged("a tensor without storage")
    return Tensor(storage, offset, shape, strides)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Damaged("a parameter without tensor")
    return data


TORCH: Mapping[str, Maker] = {
    "collections.OrderedDict": table,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}
"""What a file of weights may call, besides the types of storages: each with what makes it here."""

NAMESPACE: Mapping[str, Maker] = {"argparse.Namespace": lambda: types.SimpleNamespace()}
"""For the public code's checkpoints: `load(path, allowed=TORCH | NAMESPACE)`."""


BROKEN = (
    *(Damaged, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError, RuntimeError),
    *(MemoryError, OSError, struct.error, zipfile.BadZipFile),
)


def load(path: Path, *, allowed: Mapping[str, Maker] = TORCH) -> Any:
    """The object in a file of `torch.save`, or in a plain pickle.

    Tensors come as `Tensor` (`numpy.asarray` reads one), ordered dicts as dicts, `argparse.Namespace` (if allowed) as
    `types.SimpleNamespace`.

    Args:
      path: the file.
      allowed: global names, `module.name`, and the function of ours that is called in place of each.
    Raises:
      UserError: if the file is damaged, or names a global that is not allowed, naming it; nothing has been run then.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    source = Source(np.frombuffer(mapped, np.uint8), path)
    try:
        return (_zipped if mapped[:4] == b"PK\x03\x04" else _stream)(mapped, source, dict(allowed))
    except Refused as error:
        raise UserError(
            f"{path} asks for {error}, which files of weights have no need of; it was not loaded, and nothing in it "
            "was run. If you trust its origin, save it again as .safetensors"
        ) from error
    except BROKEN as error:
        raise UserError(
            f"{path} is not a file of PyTorch weights, or is damaged ({str(error)[:200]}); fetch it again"
        ) from error


def _storages(source: Source, storages: dict[str, Storage]) -> Callable[[Any], Storage]:
    """Finds, and keeps in `storages`, what a pickle names as `("storage", kind, key, device, count)`."""

    def storage(identity: Any) -> Storage:
        if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
            raise Refused("something unknown kept outside of it")
        _, kind, key, _, count, *view = identity
        if not isinstance(kind, Global) or kind.name not in DTYPES or view not in ([], [None]):
            raise Refused("an unknown kind of storage")
        if type(key) is not str or type(count) is not int or count < 0:
            raise Damaged("a storage without key or size")
        if count * np.dtype(DTYPES[kind.name]).itemsize > len(source.data):
            raise Damaged(f"the storage {key!r} is larger than the file")
        found = storages.setdefault(key, Storage(source, key, DTYPES[kind.name], count))
        if (found.dtype, found.count) != (np.dtype(DTYPES[kind.name]), count):
            raise Damaged(f"the storage {key!r} of two kinds or sizes")
        return found

    return storage


def _zipped(mapped: mmap.mmap, source: Source, allowed: dict[str, Maker | None]) -> Any:
    """An archive of `NAME/data.pkl` and, for each storage, `NAME/data/KEY`; all stored as they are."""
    with zipfile.ZipFile(source.path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Damaged(f"{len(pickles)} files data.pkl in the archive")
        root = pickles[0].removesuffix("data.pkl")
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise Damaged(f"{entry.filename} is compressed")
            if entry.filename.startswith(f"{root}data/"):
                start = entry.header_offset  # 30 bytes, then the name and an extra field, then the content
                name, extra = struct.unpack("<HH", mapped[start + 26 : start + 30])
                key = entry.filename.removeprefix(f"{root}data/")
                source.places[key] = (start + 30 + name + extra, entry.file_size, entry.CRC)
        if f"{root}byteorder" in archive.namelist():
            source.big_endian = archive.read(f"{root}byteorder") == b"big"
        return run(io.BytesIO(archive.read(pickles[0])), allowed | STORAGES, _storages(source, {}))


MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def _stream(mapped: mmap.mmap, source: Source, allowed: dict[str, Maker | None]) -> Any:
    """Pickles in a row (magic number, version, the machine, the object, the keys), then the numbers of each key."""
    first = run(mapped, allowed)
    if first != MAGIC:
        return first  # a plain pickle
    if run(mapped, {}) != PROTOCOL:
        raise Damaged("unknown version")
    source.big_endian = not run(mapped, {}).get("little_endian", True)
    storages: dict[str, Storage] = {}
    whole = run(mapped, allowed | STORAGES, _storages(source, storages))
    keys = run(mapped, {})
    at = mapped.tell()
    for key in keys:
        if type(key) is not str or key not in storages:  # the hash of tuples of tuples may take for ever
            raise Damaged("numbers of an unknown storage")
        (count,) = struct.unpack(">q" if source.big_endian else "<q", mapped[at : at + 8])
        if count < storages[key].count:
            raise Damaged(f"the storage {key!r} is cut")
        itemsize = storages[key].dtype.itemsize
        source.places[key] = (at + 8, storages[key].count * itemsize, None)
        at += 8 + count * itemsize
    return whole
