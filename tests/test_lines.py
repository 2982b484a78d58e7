"""Blocks of lines of plain and gzip files: every line once, and damage named."""

import gzip

import pytest

from allmrec_jax.data import lines
from allmrec_jax.errors import UserError


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_blocks_hold_every_line_once_with_its_number(compress, size, tmp_path):
    text = "".join(f"line {number}\n" for number in range(1, 40)) + "\n\nlast"
    (tmp_path / "f").write_bytes(gzip.compress(text.encode()) if compress else text.encode())
    found = list(lines.blocks(tmp_path / "f", size))
    assert b"".join(block.data for block in found).decode() == text
    numbered = [pair for block in found for pair in block]
    assert numbered == [(number, f"line {number}".encode()) for number in range(1, 40)] + [(42, b"last")]
    assert sum(block.lines for block in found) == 42
    assert found[-1].read == (tmp_path / "f").stat().st_size


def test_gzip_files_of_several_members_are_read_whole(tmp_path):
    (tmp_path / "f.gz").write_bytes(gzip.compress(b"a\nb") + gzip.compress(b"c\nd\n"))
    assert b"".join(block.data for block in lines.blocks(tmp_path / "f.gz")) == b"a\nbc\nd\n"


def test_damaged_gzip_files_are_refused(tmp_path):
    whole = gzip.compress("".join(f"{n}\n" for n in range(10_000)).encode())
    (tmp_path / "torn.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut short: its.* data end in line [\d,]{4,}; get it again"):
        list(lines.blocks(tmp_path / "torn.gz", 100))
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 255
    (tmp_path / "broken.gz").write_bytes(bytes(broken))
    with pytest.raises(UserError, match=r"is damaged \(.*in line|cut short"):
        list(lines.blocks(tmp_path / "broken.gz", 100))


def test_a_file_without_line_feeds_is_no_text_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST_LINE", 100)
    (tmp_path / "f").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="it is no text file"):
        list(lines.blocks(tmp_path / "f", 10))
