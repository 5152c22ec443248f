"""The operations of a process on files: each is counted, and the one that is meant is struck."""

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from detune.checkpoints import run_directory

__all__ = ["SIGNALS", "Blow", "Operations"]


class Blow(StrEnum):
    """What happens to a run at one of its operations."""

    KILL = "SIGKILL"
    """In the middle of it, if it writes."""
    FULL = "ENOSPC"
    """And for all operations that take space after it."""
    INTERRUPT = "SIGINT"
    TERMINATE = "SIGTERM"
    HANG_UP = "SIGHUP"


SIGNALS = (Blow.INTERRUPT, Blow.TERMINATE, Blow.HANG_UP)


@dataclass
class Operations:
    """Counts the operations of this process on files below a directory, and has one of them fail.

    Attributes:
        root: The directory.
        at: Which one; None has none.
        blow: What happens to it.
        names: Of all that there were, in order.
    """

    root: Path
    at: int | None = None
    blow: Blow = Blow.KILL
    names: list[str] = field(default_factory=list)

    def install(self) -> None:
        """For the rest of this process."""
        for name in ("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "truncate", "link", "symlink"):
            setattr(os, name, partial(self._call, name, getattr(os, name), name in ("mkdir", "link", "symlink")))
        for name in ("fsync", "ftruncate"):
            setattr(os, name, partial(self._call, name, getattr(os, name), False))
        for name in ("pwrite", "write"):
            setattr(os, name, partial(self._write, name, getattr(os, name)))
        # The one step that Python has no name for.
        run_directory.exchange = partial(self._call, "exchange", run_directory.exchange, False)
        os.open = partial(self._open, os.open)
        io.open = builtins.open = partial(self._open_file, io.open)

    def _strike(self, name: str, grows: bool, half: Callable[[], Any] = lambda: None) -> None:
        self.names.append(name)
        now = len(self.names) - 1
        if self.at is None or now < self.at or (now > self.at and not (self.blow is Blow.FULL and grows)):
            return
        if self.blow in SIGNALS:
            # Twice: the second must change nothing.
            os.kill(os.getpid(), signal.Signals[self.blow])
            os.kill(os.getpid(), signal.SIGTERM)
            return
        half()
        if self.blow is Blow.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _is_ours(self, path: Any, dir_fd: int | None = None) -> bool:
        if isinstance(path, int):
            return path > 2
        # Through a descriptor only trees are removed and locks opened, and those are ours.
        return dir_fd is not None or Path(os.path.abspath(os.fsdecode(path))).is_relative_to(self.root)

    def _call(self, name: str, function: Callable[..., Any], grows: bool, *arguments: Any, **options: Any) -> Any:
        if self._is_ours(arguments[0], options.get("dir_fd")):
            self._strike(name, grows)
        return function(*arguments, **options)

    def _write(self, name: str, function: Callable[..., int], descriptor: int, data: Any, *rest: Any) -> int:
        if descriptor > 2:
            self._strike(name, True, lambda: function(descriptor, memoryview(data)[: len(data) // 2], *rest))
        return function(descriptor, data, *rest)

    def _open(self, function: Callable[..., int], path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and self._is_ours(path, options.get("dir_fd")):
            self._strike("open", bool(flags & os.O_CREAT))
        return function(path, flags, *rest, **options)

    def _open_file(
        self,
        function: Callable[..., Any],
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not set("wxa+").intersection(mode) or isinstance(file, int) or not self._is_ours(file):
            return function(file, mode, buffering, encoding, errors, newline, closefd, opener)
        self._strike("open", not set("r").intersection(mode))
        raw = _File(self, file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)


class _File(io.FileIO):
    def __init__(self, operations: Operations, *arguments: Any) -> None:
        self._operations = operations
        super().__init__(*arguments)

    def write(self, data: Any) -> int:
        write = super().write
        self._operations._strike("write", True, lambda: write(memoryview(data).cast("B")[: len(data) // 2]))
        return write(data)

    def truncate(self, size: int | None = None) -> int:
        self._operations._strike("truncate", False)
        return super().truncate(size)
