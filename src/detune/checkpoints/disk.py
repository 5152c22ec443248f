"""Errors of a disk: what it may answer to a write, and how that is told."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detune.errors import OutputError

__all__ = ["FULL", "reported", "require_space", "sync", "sync_tree"]

# What a full disk or quota says.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
