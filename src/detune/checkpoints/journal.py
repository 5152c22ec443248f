"""A journal: a directory with a file for each process that writes, and lines in them, each behind its checksum."""

import logging
import os
import secrets
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detune.checkpoints.disk import reported
from detune.files import seal, unseal

__all__ = ["Journal"]

logger = logging.getLogger(__name__)


class Journal:
    """The lines that processes of any machine have written down in a directory.

    Args:
        directory: The directory; somebody else makes it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # One file for each process: appends of several machines to one file would overwrite each other.
        self._own = directory / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.txt"
        self._lock = threading.Lock()

    def record(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows down, in whole lines or not at all. All that they speak of must be on the disk.

        Args:
            rows: What JSON can hold.

        Raises:
            OutputError: The disk refuses.
        """
        lines = b"".join(map(seal, rows))
        with self._lock, reported(self._own), self._own.open("ab", buffering=0) as file:
            start = file.tell()
            try:
                written = 0
                while written < len(lines):
                    written += file.write(lines[written:])
                os.fsync(file.fileno())
            except BaseException:
                # The next row begins with a line of its own.
                file.truncate(start)
                raise

    def rows(self) -> list[Any]:
        """All that was written down, by any process; lines that do not verify are left out, with a word.

        Raises:
            OutputError: The disk refuses.
        """
        found: list[Any] = []
        damaged = 0
        for path in self._files():
            with reported(path):
                lines = path.read_bytes().splitlines()
            for line in lines:
                row = unseal(line)
                if row is None:
                    damaged += 1
                else:
                    found.append(row)
        if damaged:
            logger.warning(
                "%d lines of the journal in %s are damaged or cut off: what they spoke of is computed again",
                damaged,
                self._directory.parent,
            )
        return found

    def keep(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Forget all that was written down but some rows.

        Raises:
            OutputError: The disk refuses.
        """
        before = self._files()
        self.record(rows)
        for path in before:
            with reported(path):
                path.unlink()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written down."""
        return not any(path.stat().st_size for path in self._files())

    def _files(self) -> list[Path]:
        return sorted(path for path in self._directory.glob("*.txt") if path.is_file())
