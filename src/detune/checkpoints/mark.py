"""The mark by which a recovery is known again, and its files from others.

It is part of `detune.json`, which is written last: the size and the time of every other file beside it. What has been
put there since, or changed, is somebody's work, whatever it is called.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["MARK", "find_foreign", "missing_files", "write_mark"]

MARK = "detune.json"
_FORMAT = "detune-recover/1"
# The report of a million tensors takes half of it.
_MOST_BYTES = 2**30


def write_mark(directory: Path, report: Mapping[str, Any]) -> None:
    """Write `detune.json` into a directory that is otherwise finished.

    Args:
        directory: The directory.
        report: What else the file is to hold.
    """
    files = {name: _state(path) for name, path in _files(directory)}
    content = {"format": _FORMAT, **report, "files": files}
    (directory / MARK).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def find_foreign(directory: Path) -> str | None:
    """Find what would be lost with a directory, besides what a recovery can make again.

    Args:
        directory: The directory.

    Returns:
        The first thing that is not as a recovery left it, in words; None where there is none.
    """
    known = _read_mark(directory)
    if known is None:
        return f"it holds {next((name for name, _ in _files(directory)), 'nothing')} and no {MARK} of a recovery"
    for name, path in _files(directory):
        if name != MARK and name not in known:
            return f"{name} is not of the recovery"
        if name != MARK and (_state(path) is None or known[name] != _state(path)):
            return f"{name} has changed since the recovery"
    return None


def missing_files(directory: Path) -> list[str]:
    """The files that a recovery made in a directory and that are not there any more; none where there is no mark."""
    known = _read_mark(directory) or {}
    return [name for name in known if not os.path.lexists(directory / name)]


def _read_mark(directory: Path) -> Mapping[str, Any] | None:
    path = directory / MARK
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > _MOST_BYTES:
            return None
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        return None
    files = content.get("files")
    return files if isinstance(files, dict) else None


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    """Everything below a directory but directories with something in them, by relative path."""
    for folder, folders, files in os.walk(directory):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        empty = [name for name in folders if name not in links and not any((here / name).iterdir())]
        for name in sorted((*files, *links, *empty)):
            yield (here / name).relative_to(directory).as_posix(), here / name


def _state(path: Path) -> list[int] | None:
    """Size and time of a file; None of anything else."""
    status = path.lstat()
    return [status.st_size, status.st_mtime_ns] if stat.S_ISREG(status.st_mode) else None
