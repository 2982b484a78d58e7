"""Blocks of whole lines of a plain or gzip file; the next block is read and decompressed while this one is parsed."""

import gzip
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from allmrec_jax.errors import UserError

BLOCK_BYTES = 8 << 20
LONGEST_LINE = 32 << 20
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Block:
    """Whole lines of a file, as they stand there.

    data: the bytes; only the file's last line may lack its line feed.
    first: number of the first line, counted from 1.
    lines: number of lines.
    read: bytes of the file (compressed, if it is) read so far, for progress.
    """

    data: bytes
    first: int
    lines: int
    read: int

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """(number, line without its line feed) of every line that is not blank."""
        for number, line in enumerate(self.data.split(b"\n"), self.first):
            if line.strip():
                yield number, line


def is_gzip(path: Path) -> bool:
    """Whether the file begins as gzip files do, whatever it is called."""
    with open(path, "rb") as file:
        return file.read(2) == _GZIP_MAGIC


def blocks(path: Path, size: int = BLOCK_BYTES) -> Iterator[Block]:
    """The file in blocks of about `size` bytes.

    Raises:
      UserError: if the gzip data are damaged or end too early, or a line is so long that this cannot be a text file.
      OSError: if the file cannot be read.
    """
    with open(path, "rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if is_gzip(path) else raw
        line = 1

        def following() -> Block | None:
            try:
                data = file.read(size)
                if data and not data.endswith(b"\n"):
                    rest = file.readline(LONGEST_LINE)
                    if len(rest) == LONGEST_LINE:
                        raise UserError(f"{path} has a line of more than {LONGEST_LINE >> 20} MiB: it is no text file")
                    data += rest
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                how = "cut short" if isinstance(error, EOFError) else f"damaged ({error})"
                raise UserError(
                    f"{path} is {how}: its data end in line {_sound_lines(path) + 1:,}; get it again"
                ) from error
            if not data:
                return None
            return Block(data, line, data.count(b"\n") + (not data.endswith(b"\n")), raw.tell())

        with ThreadPoolExecutor(1, "lines") as reader:
            block = reader.submit(following).result()
            while block is not None:
                line += block.lines
                ahead = reader.submit(following)
                yield block
                block = ahead.result()


def _sound_lines(path: Path) -> int:
    """How many lines of a damaged gzip file come before the damage."""
    lines = 0
    with gzip.open(path) as file:
        try:
            while piece := file.read(1 << 12):
                lines += piece.count(b"\n")
        except (OSError, EOFError, zlib.error):
            pass
    return lines
