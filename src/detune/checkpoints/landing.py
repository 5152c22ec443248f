"""What has landed of a run that is not over, so that the same command does only the rest.

A hidden directory beside the target, named after the run's inputs and options:

    .OUT.recovering-KEY/
        lock          held while the run lives; the system releases it, however the run ends
        checkpoint/   the weight files, data at their final offsets, no headers yet
        parts/        what else tensors leave behind, one file each
        journal/      a file for each process that writes, a line for each tensor

A line is written when the tensor's bytes are on the disk, so that what a line speaks of is there. Runs of other inputs
or options have other directories: a process that outlives its run has nowhere to write what another would take for its
own.
"""

import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detune.checkpoints.atomic import reported, sync
from detune.errors import OutputError

__all__ = ["Landing", "claim"]

logger = logging.getLogger(__name__)

# What file systems say that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Landing:
    """The hidden directory of one run. Processes on any machine that see it may add to it.

    Args:
        directory: Made by `claim`.

    Attributes:
        directory: As given.
        checkpoint: The directory that becomes the output.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.checkpoint = directory / "checkpoint"
        # One file for each process: appends of several machines to one file would overwrite each other.
        self._journal = directory / "journal" / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self._lock = threading.Lock()

    def part(self, name: str, suffix: str) -> Path:
        """Where something that belongs to a tensor goes.

        Args:
            name: The tensor.
            suffix: What it is.
        """
        return self.directory / "parts" / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}{suffix}"

    def record(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write down what has landed. All that the rows speak of must be on the disk.

        Args:
            rows: What JSON can hold.

        Raises:
            OutputError: The disk refuses.
        """
        with self._lock, reported(self._journal), self._journal.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """All that was written down, by any process; the line that one died over is left out."""
        found: list[dict[str, Any]] = []
        for path in sorted((self.directory / "journal").glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    found.append(json.loads(line))
                except ValueError:
                    logger.debug("%s ends in the middle of a line", path)
        return found

    def clear(self) -> None:
        """Forget all that has landed."""
        for part in ("journal", "parts", "checkpoint"):
            shutil.rmtree(self.directory / part, ignore_errors=True)
            (self.directory / part).mkdir()
        sync(self.directory)

    def remove(self) -> None:
        """Remove the directory, once its checkpoint has been moved to its place, or is of no use."""
        shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def claim(out: Path, key: str) -> Iterator[Landing]:
    """Make the hidden directory of a run, or find it again, and keep every other run out of `out` meanwhile.

    What runs of other inputs or options left behind is removed.

    Args:
        out: The directory that the run makes, resolved.
        key: Stands for the run's inputs and options.

    Yields:
        The landing. It stays when the block ends, unless it has been removed.

    Raises:
        OutputError: Another run is writing to `out`, or the disk refuses.
    """
    own = out.with_name(f".{out.name}.recovering-{key}")
    with reported(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for other in out.parent.glob(f".{glob.escape(out.name)}.recovering-*"):
            if other != own:
                with _locked(other, out):
                    logger.info("removing %s: its run had other inputs or options", other)
                    shutil.rmtree(other, ignore_errors=True)
        own.mkdir(exist_ok=True)
    with _locked(own, out):
        landing = Landing(own)
        with reported(out):
            if not landing.checkpoint.is_dir():
                landing.clear()
        yield landing


@contextmanager
def _locked(directory: Path, out: Path) -> Iterator[None]:
    path = directory / "lock"
    with reported(out):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, path, out)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            logger.warning("%s has no file locks: see to it that no other run writes to %s", path.parent, out)
            return
        if not isinstance(error, BlockingIOError | PermissionError):
            raise OutputError(f"cannot lock {path}", str(error), "check the file system") from error
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        raise OutputError(
            f"another run is writing to {out}", f"{holder} holds {path}", "wait for it, or choose another directory"
        ) from None
    # A run that came first may have removed the directory after we opened the file in it.
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(descriptor)):
        raise OutputError(f"another run has just ended in {out}", f"{path} is gone", "try again")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
