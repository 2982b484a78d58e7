"""Files that are whole or not there, and what is in them in short."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

MODEL_FILES = {".safetensors", ".gguf", ".bin", ".json", ".txt", ".model"}
BLOCKS, BLOCK = 256, 1 << 16


def digest(path: Path) -> str:
    """A short hash of a file: of all of it up to 16 MiB, of its size and 16 MiB spread evenly over it beyond."""
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= BLOCKS * BLOCK:
            found.update(file.read())
        else:
            for k in range(BLOCKS):
                file.seek(k * (size - BLOCK) // (BLOCKS - 1))
                found.update(file.read(BLOCK))
    return found.hexdigest()[:16]


def model_files(path: Path) -> dict[str, str]:
    """Name -> `digest` of the weights, settings and tokenizer in a model's folder, so that another model of the same
    name is not taken for this one. A path of one file is that file alone."""
    if path.is_file():
        return {path.name: digest(path)}
    found = sorted(file for file in path.rglob("*") if file.suffix in MODEL_FILES and file.is_file())
    return {str(file.relative_to(path)): digest(file) for file in found}


@contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens `path` for writing bytes. A reader, or a run interrupted here, finds the old file or the new one, never
    half of one. Its folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
