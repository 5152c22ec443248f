"""Directories and files that appear whole or not at all, and never in place of anything."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detune.errors import OutputError

__all__ = ["check_new", "new_directory", "new_file", "sync"]


@contextmanager
def new_directory(out: Path | str) -> Iterator[Path]:
    """Fill a hidden directory beside `out`, which takes its place when the block ends normally.

    Args:
        out: The directory to make; it may exist if it is empty.

    Yields:
        The hidden directory. An exception removes it.

    Raises:
        OutputError: `out` exists and is not empty, or the disk refuses.
    """
    target = Path(out).expanduser().resolve()
    with _reported(target):
        check_new(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _hidden(target)
        partial.mkdir()
        try:
            yield partial
            for directory, _, files in os.walk(partial):
                for path in (*(Path(directory) / file for file in files), Path(directory)):
                    sync(path)
            check_new(target)
            os.rename(partial, target)
            sync(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


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
    with _reported(target):
        check_new(target, directory=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _hidden(target)
        try:
            yield partial
            sync(partial)
            check_new(target, directory=False)
            os.rename(partial, target)
            sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)


def check_new(out: Path, *, directory: bool = True) -> None:
    """Refuse a target that is already there; an empty directory may become a filled one.

    Raises:
        OutputError: There is something in its place.
    """
    if not out.exists() or (directory and out.is_dir() and not any(out.iterdir())):
        return
    expected = "a new or empty directory" if directory else "a new file"
    raise OutputError(f"{out} exists", f"expected {expected}", "choose another: nothing is ever overwritten here")


def _hidden(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _reported(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"no space left for {target}", str(error), "free some space or choose another disk"
            ) from error
        raise OutputError(f"cannot write {target}", str(error), "check the directory and its permissions") from error
