"""Data lands where it belongs, whichever way it goes there."""

import errno
import mmap
import os
import random
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest

from detune.checkpoints import direct_io
from detune.checkpoints.direct_io import DirectFile

BLOCK_BYTES = 3 * mmap.PAGESIZE
# Neighbours that share pages, end on them, and take several blocks.
LENGTHS = (8, 5000, 4096, 1, 40_000, 3 * 4096, 4096 - 50, 0, 12_289, 100_000)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io, "_BLOCK_BYTES", BLOCK_BYTES)


@pytest.fixture
def content() -> bytes:
    return random.Random(0).randbytes(sum(LENGTHS))


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "data"
    path.touch()
    os.truncate(path, len(content))
    return path


def write(path: Path, content: bytes, buffers: deque[mmap.mmap], **options: bool) -> None:
    """All parts, in two threads, from both ends."""

    def write_part(part: tuple[int, int]) -> None:
        start, stop = part

        def read(position: int, out: memoryview) -> None:
            out[:] = content[start + position : start + position + len(out)]

        with DirectFile(path, buffers, **options) as file:
            file.write(start, stop - start, read)

    parts = list(pairwise(accumulate(LENGTHS, initial=0)))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write_part, parts[::2] + parts[::-2]))


@pytest.mark.parametrize("through", [False, True])
def test_parts_of_any_length_at_any_place(path, content, through):
    buffers: deque[mmap.mmap] = deque()
    write(path, content, buffers, through=through)
    assert path.read_bytes() == content
    assert len(buffers) <= 2


def test_a_system_without_direct_writes(path, content, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    write(path, content, deque())
    assert path.read_bytes() == content


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no direct writes to refuse")
@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_a_file_system_without_direct_writes(path, content, monkeypatch, call):
    """It says so when the file is opened, or not before it is written."""
    real, direct, asked = getattr(os, call), set(), []
    opened = os.open

    def remember(path: Any, flags: int, *rest: Any) -> int:
        descriptor = opened(path, flags, *rest)
        (direct.add if flags & os.O_DIRECT else direct.discard)(descriptor)
        return descriptor

    def refuse(first: Any, *rest: Any) -> Any:
        if (rest[0] & os.O_DIRECT) if call == "open" else (first in direct):
            asked.append(first)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(first, *rest)

    monkeypatch.setattr(os, "open", remember)
    monkeypatch.setattr(os, call, refuse)
    write(path, content, deque())
    assert asked
    assert path.read_bytes() == content


def test_an_error_of_the_disk_is_passed_on(path, content, monkeypatch):
    def refuse(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        write(path, content, deque())
