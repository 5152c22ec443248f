"""The disk: what is to be on it, what has no place there, and its errors, told as what they mean for the target."""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detune.errors import OutputError

__all__ = [
    "FULL",
    "discard",
    "exchange",
    "reported",
    "require_space",
    "require_writable",
    "sync",
    "sync_tree",
    "write_new",
]

# Error numbers of a full disk or quota.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# From <fcntl.h> and <linux/fs.h>: paths from where the process is, and a flag of `renameat2`.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# Error numbers of systems, file systems and sandboxes that cannot exchange names.
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Sync all that is in a directory, and itself."""
    for directory, _, files in os.walk(root):
        for path in (*(Path(directory) / file for file in files), Path(directory)):
            sync(path)


def discard(path: Path) -> None:
    """Remove whatever stands in a place, a link as itself; nothing may."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_new(path: Path, data: bytes) -> None:
    """Write a file anew, not through a link or into whatever else stands there, and wait until it is on the disk."""
    discard(path)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def exchange(one: Path, other: Path) -> bool:
    """Have two names change places in one step.

    Args:
        one: A file or directory.
        other: Another, on the same file system.

    Returns:
        Whether they have: only Linux can, and not on every file system.

    Raises:
        OSError: The disk refuses.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def require_space(out: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        out: What is to be made.
        needed_bytes: What is still to be written of it.

    Raises:
        OutputError: There is less space.
    """
    available = shutil.disk_usage(_existing(out.parent)).free
    if available < needed_bytes:
        raise OutputError(
            f"no space left for {out}",
            f"it needs {needed_bytes} bytes and {out.parent} has {available} available",
            "free some space or choose another disk",
        )


def require_writable(out: Path) -> None:
    """Refuse to begin what this user could not put in its place in the end.

    Args:
        out: What is to be made, resolved.

    Raises:
        OutputError: The directory that it is to be in, or the nearest that exists, is none or may not be written to.
    """
    with reported(out):
        parent = _existing(out.parent)
    if not parent.is_dir():
        raise OutputError(f"cannot write {out}", f"{parent} is no directory", "choose another place")
    # The effective user counts, where the system can tell.
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise OutputError(
            f"cannot write {out}", f"{parent} may not be written to", "change its permissions, or choose another place"
        )


@contextmanager
def reported(target: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Tell of an OSError in the block as what it means for the target.

    Args:
        target: What is being written.
        needed_bytes: How much the whole takes, if that is known.

    Raises:
        OutputError: The disk is full, or refuses.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise OutputError(
                f"cannot write {target}", str(error), "check the directory and its permissions"
            ) from error
        found = str(error)
        if needed_bytes is not None:
            available = shutil.disk_usage(_existing(target)).free
            found = f"the checkpoint needs {needed_bytes} bytes and {available} are available now: {error.strerror}"
        raise OutputError(f"no space left for {target}", found, "free some space or choose another disk") from error


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
