"""Directories and files that appear whole or not at all, where nothing is."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import permutations
from pathlib import Path

from detune.checkpoints.disk import reported, require_writable, sync, sync_tree
from detune.checkpoints.staging import CONTENT, remove_abandoned, staging
from detune.errors import OutputError, reason_of

__all__ = ["Same", "check_new", "new_directory", "new_file", "require_apart", "resolved"]

# Tells whether two results are the same: the new one, and the one that stands in its place.
Same = Callable[[Path, Path], bool]


def resolved(out: Path | str) -> Path:
    """Follow the links to where something is to be made.

    Args:
        out: As the user gave it.

    Raises:
        OutputError: They lead round, or to the home of a user that there is none of; no path has such characters.
    """
    try:
        return Path(out).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"{out} leads nowhere", reason_of(error), "choose another") from error


def check_new(out: Path, *, directory: bool = True) -> None:
    """Refuse a target that is already there, or where nothing can be; an empty directory may become a filled one.

    Raises:
        OutputError: There is something in its place, or the directory that it is to be in may not be written to.
    """
    require_writable(out)
    if not out.exists() or (directory and out.is_dir() and not any(out.iterdir())):
        return
    expected = "a new or empty directory" if directory else "a new file"
    raise OutputError(f"{out} exists", f"expected {expected}", "choose another: nothing is ever overwritten here")


def require_apart(*places: Path | str | None) -> None:
    """Refuse places of results of which one is another, or lies inside: the first to come would keep the other out.

    Args:
        places: As the user gave them; None is no place.

    Raises:
        OutputError: Two are not apart.
    """
    for one, other in permutations([resolved(place) for place in places if place is not None], 2):
        if one.is_relative_to(other):
            raise OutputError(f"{one} lies inside {other}", "each result needs its own place", "choose another")


@contextmanager
def new_directory(
    out: Path | str, check: Callable[[Path], None] = check_new, same: Same | None = None
) -> Iterator[Path]:
    """Fill a hidden directory beside `out`, which takes its place when the block ends normally.

    What earlier processes left there that were killed over the same is removed.

    Args:
        out: The directory to make; it may exist if it is empty.
        check: Refuses a target by raising. Called at both ends.
        same: Tells whether what is made is what stands there already, which then stays: nothing is refused before.

    Yields:
        The hidden directory. An exception removes it.

    Raises:
        OutputError: `check` refused, or the disk does.
    """
    with _in_its_place(resolved(out), check, same) as made:
        made.mkdir()
        yield made


@contextmanager
def new_file(out: Path | str, same: Same | None = None) -> Iterator[Path]:
    """Write a hidden file beside `out`, which takes its place when the block ends normally.

    What earlier processes left there that were killed over the same is removed.

    Args:
        out: The file to make.
        same: See `new_directory`.

    Yields:
        Where to write it, in a directory that is removed at the end. An exception removes what is there.

    Raises:
        OutputError: `out` exists, or the disk refuses.
    """
    with _in_its_place(resolved(out), partial(check_new, directory=False), same) as made:
        yield made


@contextmanager
def _in_its_place(target: Path, check: Callable[[Path], None], same: Same | None) -> Iterator[Path]:
    """Make something in a hidden directory beside its place, and rename it there when the block ends normally."""
    with reported(target):
        remove_abandoned(target)
        if same is None:
            check(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with staging(target) as directory:
            made = directory / CONTENT
            yield made
            alike = target.is_dir() if made.is_dir() else target.is_file()
            if same is not None and alike and same(made, target):
                return
            (sync_tree if made.is_dir() else sync)(made)
            check(target)
            os.rename(made, target)
            sync(target.parent)
