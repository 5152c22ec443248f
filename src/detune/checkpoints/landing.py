"""What has landed of a run that is not over, so that the same command does only the rest.

A hidden directory beside the target, named after the run's inputs and options:

    .OUT.recovering-KEY/
        lock          held while the run lives; the system releases it, however the run ends
        checkpoint/   the weight files, data at their final offsets, no headers yet
        parts/        what else tensors leave behind, one file each
        journal/      a file for each process that writes, a line for each tensor, behind its checksum

A line is written when the tensor's bytes are on the disk, so that what a line speaks of is there; and it carries the
checksums of all that it speaks of, so that the next run finds out what has changed since. They are CRC-32: against
accidents, as whoever may write here could as well write the checksums. Runs of other inputs or options have other
directories: a process that outlives its run has nowhere to write what another would take for its own.
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
import stat
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detune.checkpoints.atomic import reported, sync
from detune.errors import OutputError

__all__ = ["Landing", "claim"]

logger = logging.getLogger(__name__)

_PARTS = ("journal", "parts", "checkpoint")
_AGAIN = "run the same command again: it computes again what has changed"
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
        self._journal = directory / "journal" / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.txt"
        self._lock = threading.Lock()

    def save_part(self, name: str, suffix: str, data: bytes) -> int:
        """Write something that belongs to a tensor, and wait until it is on the disk.

        Args:
            name: The tensor.
            suffix: What it is.
            data: Its content.

        Returns:
            Its CRC-32.

        Raises:
            OutputError: The disk refuses.
        """
        path = self._part(name, suffix)
        with reported(path), path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return zlib.crc32(data)

    def read_part(self, name: str, suffix: str, checksum: int) -> bytes:
        """Read what `save_part` wrote.

        Args:
            name: The tensor.
            suffix: What it is.
            checksum: What `save_part` returned.

        Raises:
            OutputError: It is not there any more, or has changed.
        """
        path = self._part(name, suffix)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise OutputError(f"cannot read {path}", str(error.strerror or error), _AGAIN) from error
        if zlib.crc32(data) != checksum:
            found = f"its checksum is {zlib.crc32(data):08x}, expected {checksum:08x}"
            raise OutputError(f"{path} has changed since it was written", found, _AGAIN)
        return data

    def _part(self, name: str, suffix: str) -> Path:
        return self.directory / "parts" / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}{suffix}"

    def record(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write down what has landed, in whole lines or not at all. All that the rows speak of must be on the disk.

        Args:
            rows: What JSON can hold.

        Raises:
            OutputError: The disk refuses.
        """
        lines = b"".join(_line(row) for row in rows)
        with self._lock, reported(self._journal), self._journal.open("ab", buffering=0) as file:
            start = file.tell()
            try:
                written = 0
                while written < len(lines):
                    written += file.write(lines[written:])
                os.fsync(file.fileno())
            except BaseException:
                # What follows begins with a line of its own.
                file.truncate(start)
                raise

    def rows(self) -> list[Any]:
        """All that was written down, by any process; lines that do not verify are left out, with a word."""
        found: list[Any] = []
        damaged = 0
        for path in self._journals():
            with reported(path):
                lines = path.read_bytes().splitlines()
            for line in lines:
                checksum, _, text = line.partition(b" ")
                if checksum == _checksum(text):
                    found.append(json.loads(text))
                else:
                    damaged += 1
        if damaged:
            logger.warning(
                "%d lines of the journal in %s are damaged or cut off: what they spoke of is computed again",
                damaged,
                self.directory,
            )
        return found

    def keep(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Forget all that has been written down but some rows, whose tensors and parts stay.

        Raises:
            OutputError: The disk refuses.
        """
        before = self._journals()
        self.record(rows)
        for path in before:
            with reported(path):
                path.unlink()

    def _journals(self) -> list[Path]:
        return sorted(path for path in (self.directory / "journal").glob("*.txt") if path.is_file())

    @property
    def is_complete(self) -> bool:
        """Whether all of its directories are there."""
        parts = [self.directory / part for part in _PARTS]
        return all(part.is_dir() and not part.is_symlink() for part in parts)

    def clear(self) -> None:
        """Forget all that has landed."""
        for part in _PARTS:
            path = self.directory / part
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            path.mkdir()
        sync(self.directory)

    def remove(self) -> None:
        """Remove the directory, once its checkpoint has been moved to its place, or is of no use."""
        # The lock last: what has none is not known for ours.
        for part in _PARTS:
            shutil.rmtree(self.directory / part, ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)


def _line(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(row).encode()
    return b"%s %s\n" % (_checksum(text), text)


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


@contextmanager
def claim(out: Path, key: str) -> Iterator[Landing]:
    """Make the hidden directory of a run, or find it again, and keep every other run out of `out` meanwhile.

    What runs of other inputs or options left behind is removed; a directory that no run made stays.

    Args:
        out: The directory that the run makes, resolved.
        key: Stands for the run's inputs and options.

    Yields:
        The landing. It stays when the block ends, unless it has been removed.

    Raises:
        OutputError: Another run is writing to `out`, its place is taken, or the disk refuses.
    """
    own = out.with_name(f".{out.name}.recovering-{key}")
    with reported(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for other in out.parent.glob(f".{glob.escape(out.name)}.recovering-*"):
            if other != own and _is_ours(other):
                with _locked(other, out):
                    logger.info("removing %s: its run had other inputs or options", other)
                    Landing(other).remove()
        try:
            own.mkdir()
        except FileExistsError:
            if not _is_ours(own):
                raise _taken(own) from None
    with _locked(own, out):
        landing = Landing(own)
        with reported(out):
            if not landing.is_complete:
                landing.clear()
        yield landing


def _is_ours(directory: Path) -> bool:
    """Whether a run of this user made a directory, and nothing else was put into it."""
    try:
        names = {path.name for path in directory.iterdir()}
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or not _is_own(status, directory.parent):
            return False
        if not names:
            # Left between two steps, and no loss to anybody.
            return True
        lock = (directory / "lock").lstat()
        return names <= {"lock", *_PARTS} and stat.S_ISREG(lock.st_mode) and _is_own(lock, directory.parent)
    except OSError:
        return False


def _is_own(status: os.stat_result, parent: Path) -> bool:
    """Whether something belongs to this user, or to whom the directory around it belongs.

    Some network file systems give what root makes to nobody; and who owns the directory could replace all in it.
    """
    return status.st_uid in (os.geteuid(), parent.stat().st_uid)


def _taken(path: Path) -> OutputError:
    return OutputError(f"{path} is in the way", "no run of yours made it, and one needs its place", "move it elsewhere")


@contextmanager
def _locked(directory: Path, out: Path) -> Iterator[None]:
    path = directory / "lock"
    # Not through links, of this directory or in it, and not into what others share under another name.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            descriptor = os.open("lock", flags, 0o666, dir_fd=folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO):
            raise _taken(path) from None
        with reported(out):
            raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or not _is_own(status, directory.parent):
            raise _taken(path)
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
