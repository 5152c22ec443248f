"""Hidden directories in which something is made until it is whole. Each belongs to whoever holds the lock in it.

    .NAME.KIND-TOKEN/
        lock      locked while the process lives; the system releases it, however the process ends
        ...       what is made

A process that is killed leaves a directory whose lock is nobody's: whoever makes the same thing next removes it. The
lock is removed last, so that what is left of a directory that was being removed is known for what it is.
"""

import errno
import fcntl
import glob
import logging
import os
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from detune.checkpoints.disk import reported
from detune.errors import OutputError

__all__ = [
    "CONTENT",
    "LOCK",
    "is_ours",
    "locked",
    "remove",
    "remove_abandoned",
    "siblings",
    "staging",
    "taken",
    "temporary_directory",
]

logger = logging.getLogger(__name__)

LOCK = "lock"
CONTENT = "content"
_KIND = "partial"
# Error numbers of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Make a hidden directory beside a target, on its file system.

    Args:
        target: What is to be made in it, resolved; its parent exists.

    Yields:
        The directory; it is removed at the end.

    Raises:
        OutputError: The disk refuses.
    """
    directory = target.with_name(f".{target.name}.{_KIND}-{secrets.token_hex(8)}")
    try:
        with reported(target):
            directory.mkdir(mode=0o700)
        with locked(directory, target):
            yield directory
    except BaseException as error:
        # A note that something stays in the directory is dropped: the directory goes.
        error.__notes__ = [note for note in getattr(error, "__notes__", ()) if str(directory) not in note]
        raise
    finally:
        remove(directory)


def remove_abandoned(target: Path) -> None:
    """Remove the hidden directories beside a target that nobody holds any more.

    Args:
        target: The target of `staging`.
    """
    for directory in siblings(target, _KIND):
        if is_ours(directory, _is_staged):
            # Held by a process that lives, or by nobody knows whom.
            with suppress(OutputError), locked(directory, target, needs_lock=True):
                logger.info("removing %s: the process that made it is gone", directory)
                remove(directory)


def _is_staged(name: str) -> bool:
    # The content may have hidden directories of its own beside it.
    return name == CONTENT or name.lstrip(".").startswith(f"{CONTENT}.")


@contextmanager
def temporary_directory(name: str, parent: Path | None = None) -> Iterator[Path]:
    """Make a directory for temporary files, and remove those that killed processes left.

    Args:
        name: What it is for.
        parent: Where; None is the system's place for temporary files.

    Yields:
        The directory.

    Raises:
        OutputError: The disk refuses.
    """
    target = (Path(tempfile.gettempdir()) if parent is None else parent).resolve() / f"detune-{name}"
    remove_abandoned(target)
    with staging(target) as directory:
        content = directory / CONTENT
        with reported(content):
            content.mkdir()
        yield content


def siblings(target: Path, kind: str) -> list[Path]:
    """The hidden directories of a kind beside a target, whoever made them."""
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.{kind}-*"))


def is_ours(directory: Path, knows: Callable[[str], bool]) -> bool:
    """Whether a process of this user made a hidden directory, and nothing else was put into it.

    Args:
        directory: The directory.
        knows: Whether something of a name is made there, besides the lock.
    """
    try:
        names = {path.name for path in directory.iterdir()}
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or not _is_own(status, directory.parent):
            return False
        if not names:
            # Left between two steps, and no loss to anybody.
            return True
        lock = (directory / LOCK).lstat()
        return all(map(knows, names - {LOCK})) and stat.S_ISREG(lock.st_mode) and _is_own(lock, directory.parent)
    except OSError:
        return False


def remove(directory: Path) -> None:
    """Remove a hidden directory, the lock last; in the middle of it a signal may come, but the next one waits."""
    try:
        _remove(directory)
    except BaseException:
        _remove(directory)
        raise


def _remove(directory: Path) -> None:
    with suppress(OSError):
        for path in tuple(directory.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink()
    shutil.rmtree(directory, ignore_errors=True)


def _is_own(status: os.stat_result, parent: Path) -> bool:
    """Whether something belongs to this user, or to whom the directory around it belongs.

    Some network file systems give what root makes to nobody; and who owns the directory could replace all in it.
    """
    return status.st_uid in (os.geteuid(), parent.stat().st_uid)


def taken(path: Path) -> OutputError:
    """The error for something that stands where a hidden directory is to be."""
    return OutputError(f"{path} is in the way", "no run of yours made it, and one needs its place", "move it elsewhere")


@contextmanager
def locked(directory: Path, out: Path, *, needs_lock: bool = False) -> Iterator[None]:
    """Hold a hidden directory in the block.

    Args:
        directory: The directory.
        out: What is made in it, for messages.
        needs_lock: Whether a file system without locks will not do; otherwise there is a word about it.

    Raises:
        OutputError: Another process holds it or has just removed it, its lock is no file of ours, or the disk refuses.
    """
    path = directory / LOCK
    # No link is followed, neither to this directory nor in it, and nothing is written that has a second name.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            descriptor = os.open(LOCK, flags, 0o666, dir_fd=folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO):
            raise taken(path) from None
        with reported(out):
            raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or not _is_own(status, directory.parent):
            raise taken(path)
        with reported(out):
            _lock(descriptor, path, out, needs_lock)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, out: Path, needs_lock: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS and not needs_lock:
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
