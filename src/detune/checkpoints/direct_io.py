"""Files that data is written into at known offsets, past the page cache where the system has a way.

What is written counts only once it is on the disk, so a copy of it in the system's memory helps nobody: making one
takes processor time for fresh pages (more than all else that writing does, on virtual machines many times more) and
pushes out what was cached of the inputs. Linux writes whole pages directly from memory; what is left at the ends of a
tensor, and everything on systems and file systems that cannot, goes the usual way. The two never touch the same page.
"""

import errno
import mmap
import os
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["DirectFile", "Read"]

Read = Callable[[int, memoryview], None]
"""Fills memory with bytes from a position on."""

_PAGE_BYTES = mmap.PAGESIZE
_BLOCK_BYTES = 16 * 2**20
# Error numbers of a file system that writes to pages of its own only.
_INDIRECT = (errno.EINVAL, errno.EOPNOTSUPP)


class DirectFile:
    """A file of a fixed size, open for writing. A context manager; writes only from one thread.

    Args:
        path: The file.
        buffers: Memory to pass on to whoever opens the next file: fresh memory costs as much as fresh pages of a file.
        through: Whether each write waits for the disk.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path, buffers: deque[mmap.mmap], *, through: bool = False) -> None:
        flags = os.O_WRONLY | (os.O_DSYNC if through else 0)
        self._buffers = buffers
        self._descriptor = os.open(path, flags)
        self._direct = _open_direct(path, flags)

    def write(self, offset: int, length: int, read: Read) -> int:
        """Write what is read, block by block.

        Args:
            offset: Where it goes.
            length: Number of bytes.
            read: Called with the position from the beginning of what is written, and the memory to fill.

        Returns:
            The CRC-32 of what was written.

        Raises:
            OSError: The disk refuses.
        """
        checksum = 0
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = mmap.mmap(-1, _BLOCK_BYTES + _PAGE_BYTES)
        try:
            stop = offset + length
            start = offset
            while start < stop:
                # Blocks end on pages, and lie in memory as they will in the file.
                end = min(stop, (start + _BLOCK_BYTES) // _PAGE_BYTES * _PAGE_BYTES)
                lead = start % _PAGE_BYTES
                with memoryview(buffer) as whole, whole[lead : lead + end - start] as block:
                    read(start - offset, block)
                    checksum = zlib.crc32(block, checksum)
                    self._write_block(block, start, end)
                start = end
        finally:
            self._buffers.append(buffer)
        return checksum

    def _write_block(self, block: memoryview, start: int, end: int) -> None:
        first, last = -(-start // _PAGE_BYTES) * _PAGE_BYTES, end // _PAGE_BYTES * _PAGE_BYTES
        if self._direct is None or first >= last:
            _write_at(self._descriptor, block, start)
            return
        _write_at(self._descriptor, block[: first - start], start)
        try:
            _write_at(self._direct, block[first - start : last - start], first)
        except OSError as error:
            if error.errno not in _INDIRECT:
                raise
            self._close_direct()
            _write_at(self._descriptor, block[first - start : last - start], first)
        _write_at(self._descriptor, block[last - start :], last)

    def _close_direct(self) -> None:
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_direct()
        os.close(self._descriptor)


def _open_direct(path: Path, flags: int) -> int | None:
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno not in _INDIRECT:
            raise
        return None


def _write_at(descriptor: int, memory: memoryview, offset: int) -> None:
    done = 0
    while done < len(memory):
        done += os.pwrite(descriptor, memory[done:], offset + done)
