"""Directories and files that appear whole or not at all, and take the place of something only where that is allowed."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from detune.errors import OutputError

__all__ = [
    "FULL",
    "check_new",
    "hidden",
    "move_into_place",
    "new_directory",
    "new_file",
    "reported",
    "require_space",
    "sync",
]

# What a full disk or quota says.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_new(out: Path, *, directory: bool = True) -> None:
    """Refuse a target that is already there; an empty directory may become a filled one.

    Raises:
        OutputError: There is something in its place.
    """
    if not out.exists() or (directory and out.is_dir() and not any(out.iterdir())):
        return
    expected = "a new or empty directory" if directory else "a new file"
    raise OutputError(f"{out} exists", f"expected {expected}", "choose another: nothing is ever overwritten here")


@contextmanager
def new_directory(out: Path | str, check: Callable[[Path], None] = check_new) -> Iterator[Path]:
    """Fill a hidden directory beside `out`, which takes its place when the block ends normally.

    Args:
        out: The directory to make; it may exist if it is empty.
        check: Refuses a target by raising; what it lets pass is replaced. Called at both ends.

    Yields:
        The hidden directory. An exception removes it.

    Raises:
        OutputError: `check` refused, or the disk does.
    """
    target = Path(out).expanduser().resolve()
    with reported(target):
        check(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = hidden(target)
        partial.mkdir()
        try:
            yield partial
            move_into_place(partial, target, check)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def move_into_place(partial: Path, target: Path, check: Callable[[Path], None] = check_new) -> None:
    """Rename a finished directory to its target once all of it is on the disk.

    Args:
        partial: The directory, on the file system of the target.
        target: Its place. What is there is moved aside first and removed last.
        check: Refuses a target by raising: somebody may have put something there in the meantime.
    """
    for directory, _, files in os.walk(partial):
        for path in (*(Path(directory) / file for file in files), Path(directory)):
            sync(path)
    check(target)
    aside = hidden(target, "replaced") if target.exists() and any(target.iterdir()) else None
    try:
        if aside:
            os.rename(target, aside)
        os.rename(partial, target)
    except BaseException:
        if aside and aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    sync(target.parent)
    if aside:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def new_file(out: Path | str) -> Iterator[Path]:
    """Write a hidden file beside `out`, which takes its place when the block ends normally.

    Args:
        out: The file to make.

    Yields:
        Where to write it. An exception removes what is there.

    Raises:
        OutputError: `out` exists, or the disk refuses.
    """
    target = Path(out).expanduser().resolve()
    with reported(target):
        check_new(target, directory=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = hidden(target)
        try:
            yield partial
            sync(partial)
            check_new(target, directory=False)
            os.rename(partial, target)
            sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)


def hidden(target: Path, why: str = "partial") -> Path:
    """A name beside the target that nobody else has."""
    return target.with_name(f".{target.name}.{why}-{os.getpid()}-{secrets.token_hex(4)}")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
