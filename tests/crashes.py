"""Commands that are killed, told to end or out of disk at each of their file operations, and then run again.

    python -m tests.crashes                        every operation of every command, in every way
    python -m tests.crashes --every 9 --seed 1     a sample
    python -m tests.crashes recover --by SIGKILL   some of it

A process that has imported everything forks one for each run, which is what makes thousands of runs affordable. There
Python's own functions are replaced, so that each operation on a file is counted, and the one that is meant fails.
"""

import argparse
import builtins
import errno
import io
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch

from detune.cli import main
from tests.cases import normal, seeded
from tests.families import add, delta, save_plain

LINE = "detune: interrupted, nothing unfinished passes for a result"


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


@dataclass(frozen=True)
class Command:
    """A command, in a directory of its own.

    Attributes:
        words: Its arguments.
        makes: What it makes there, and nothing else.
        begins: Commands that have been run there before.
        resumes: Whether what it has done when it is cut off is of use to it.
        code: What it exits with when it is done.
    """

    words: tuple[str, ...]
    makes: tuple[str, ...]
    begins: tuple[tuple[str, ...], ...] = ()
    resumes: bool = False
    code: int = 0


MODELS = ("../models/model-0", "../models/model-1", "../models/model-2")
RECOVER = ("recover", *MODELS, "--out", "out", "--dtype", "bfloat16")
COMMANDS = {
    "recover": Command((*RECOVER, "--adapters", "ad", "--mask", "m.npz"), ("out", "ad", "m.npz"), resumes=True),
    "overwrite": Command(
        (*RECOVER, "--overwrite"), ("out",), (("recover", *MODELS, "--out", "out", "--method", "mean"),), resumes=True
    ),
    "extract": Command(("extract", *MODELS, "--base", "../models/base", "--out", "ad"), ("ad",)),
    "pack": Command(("pack", *MODELS, "--out", "pack"), ("pack",)),
    "unpack": Command(("unpack", "pack", "--out", "un"), ("pack", "un"), (("pack", *MODELS, "--out", "pack"),)),
    "audit": Command(("audit", *MODELS, "--base", "../models/base", "--out", "audit"), ("audit",), code=1),
    "defend": Command(("defend", "bf16", MODELS[0], "release"), ("release",)),
}


def make_models(folder: Path) -> None:
    """A bf16 base that float32 merges give away to the bit, in a tree of two files."""
    generator = seeded(3)
    base = {f"layer.{i}.weight": normal(generator, 48, 40).bfloat16().float() for i in range(2)}
    base["norm.weight"] = normal(generator, 40).bfloat16().float()
    for i in range(3):
        changed = {name: add(base[name], delta(generator, base[name], 2)) for name in base if "layer" in name}
        save_plain(folder / f"model-{i}", base | changed)
    save_plain(folder / "base", base)


# --- the operations ---


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


# --- one run ---


@dataclass(frozen=True)
class Ran:
    """What became of a run.

    Attributes:
        code: Its exit code, or the negative number of the signal that killed it.
        err: What it printed there.
        names: Of its operations, where it came to its end.
    """

    code: int
    err: str
    names: tuple[str, ...] = ()


def run(words: tuple[str, ...], folder: Path, at: int | None = None, blow: Blow = Blow.KILL) -> Ran:
    """Run a command in a process of its own, in a folder that has its temporary files too.

    Args:
        words: Its arguments.
        folder: Where.
        at: The operation to strike; None strikes none.
        blow: How.
    """
    outside = folder.with_name(f"{folder.name}.said")
    outside.write_text("")
    child = os.fork()
    if child == 0:
        _run(words, folder, outside, at, blow)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    names = outside.with_suffix(".names")
    ran = Ran(code, outside.read_text(), tuple(names.read_text().split()) if names.exists() else ())
    names.unlink(missing_ok=True)
    return ran


def _run(words: tuple[str, ...], folder: Path, said: Path, at: int | None, blow: Blow) -> None:
    code = 1
    try:
        os.chdir(folder)
        with said.open("wb") as err, open(os.devnull, "wb") as out:
            os.dup2(err.fileno(), 2)
            os.dup2(out.fileno(), 1)
        (folder / "tmp").mkdir(exist_ok=True)
        tempfile.tempdir = str(folder / "tmp")
        sys.argv = ["detune", *words]
        operations = Operations(folder, at, blow)
        operations.install()
        for number in SIGNALS:
            signal.signal(signal.Signals[number], signal.default_int_handler)
        try:
            main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(bool(error.code))
        operations.at = None
        said.with_suffix(".names").write_text(" ".join(operations.names))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


# --- what must hold ---


def tree(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Every file, without what tells one run from another: times."""
    files = {}
    for name in names:
        paths = [folder / name] if (folder / name).is_file() else sorted((folder / name).rglob("*"))
        for path in paths:
            if path.is_file():
                data = path.read_bytes()
                files[str(path.relative_to(folder))] = _timeless(data) if path.suffix in (".json", ".html") else data
    return files


def _timeless(data: bytes) -> bytes:
    data = re.sub(rb'("seconds": |in |&#34;seconds&#34;: )[0-9.e-]+', b"", data)
    # Size and time of a file; sizes of those with times in them.
    return re.sub(rb'"[^"]+": \[\s*\d+,\s*\d{18,}\s*\]', b"", data)


def left_over(folder: Path, names: tuple[str, ...]) -> list[str]:
    """What should not be there, by its first two names."""
    found = {path.name for path in folder.iterdir()} - {*names, "tmp"}
    return sorted(found | {f"tmp/{path.name}" for path in (folder / "tmp").iterdir()})


def strike(command: Command, at: int, blow: Blow, folder: Path, expected: dict[str, bytes]) -> str | None:
    """Strike one operation, run the command again, and judge.

    Args:
        command: The command.
        at: Which operation.
        blow: How.
        folder: To be made anew.
        expected: What an undisturbed run makes.

    Returns:
        What is wrong; None where all is well.
    """
    prepare(command, folder)
    before = tree(folder, command.makes)
    ran = run(command.words, folder, at, blow)
    wrong = _judge(command, ran, blow, folder, before, expected)
    if wrong or ran.code == command.code:
        return wrong
    was_done = tree(folder, command.makes) == expected != before
    again = run(command.words, folder)
    # All was in its place, but for the exit code.
    refused = was_done and again.code == 2 and "exists" in again.err
    if again.code != command.code and not refused:
        return f"the same command ended with {again.code}: {again.err.strip()}"
    if left := left_over(folder, command.makes):
        return f"the same command left {', '.join(left)}"
    if tree(folder, command.makes) != expected:
        return "the same command made something else"
    return None


def _judge(
    command: Command, ran: Ran, blow: Blow, folder: Path, before: dict[str, bytes], expected: dict[str, bytes]
) -> str | None:
    """What is wrong with how a run ended."""
    lines = ran.err.splitlines()
    codes = {Blow.KILL: (-signal.SIGKILL,), Blow.FULL: (2,)}.get(blow) or tuple(
        128 + signal.Signals[name] for name in SIGNALS
    )
    if ran.code not in (command.code, *codes):
        return f"it ended with {ran.code}: {ran.err.strip()}"
    if blow is not Blow.KILL:
        start = "detune: error: " if blow is Blow.FULL else LINE
        if ran.code != command.code and (len(lines) != 1 or not lines[0].startswith(start)):
            return f"it said {ran.err.strip()!r}"
        left = [name for name in left_over(folder, command.makes) if not command.resumes or ".recovering-" not in name]
        if left:
            return f"it left {', '.join(left)}"
    if ran.code == command.code and tree(folder, command.makes) != expected:
        return "it ended as if done and made something else"
    for name in command.makes:
        results = [{path: data for path, data in of.items() if path.split("/")[0] == name} for of in (before, expected)]
        if tree(folder, (name,)) not in ({}, *results):
            return f"{name} passes for a result"
    return None


def prepare(command: Command, folder: Path) -> None:
    """A folder as the command finds it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "tmp").mkdir()
    for words in command.begins:
        if (code := run(words, folder).code) != 0:
            raise RuntimeError(f"{words} ended with {code}")


def operations_of(command: Command, folder: Path) -> tuple[tuple[str, ...], dict[str, bytes]]:
    """The operations of an undisturbed run, and what it makes."""
    prepare(command, folder)
    ran = run(command.words, folder)
    if ran.code != command.code or ran.err or left_over(folder, command.makes):
        raise RuntimeError(f"{command.words} ended with {ran.code}: {ran.err}, {left_over(folder, command.makes)}")
    return ran.names, tree(folder, command.makes)


def strikes(every: int, seed: int, blows: list[Blow], operations: tuple[str, ...]) -> Iterator[tuple[int, Blow]]:
    """Which operations are struck, and how: all of them in all ways, or a sample. A full disk lets files be removed."""
    draw = random.Random(seed)
    for at, name in enumerate(operations):
        for blow in blows:
            if draw.randrange(every) == 0 and not (blow is Blow.FULL and name in ("unlink", "rmdir", "remove")):
                yield at, blow


def run_all(names: list[str], every: int, seed: int, blows: list[Blow]) -> int:
    """Strike, tell of what went wrong, and count it."""
    torch.set_num_threads(1)
    failures = 0
    # No `TemporaryDirectory`: each forked process would remove it at its end.
    root = Path(tempfile.mkdtemp(prefix="detune-crashes-"))
    try:
        make_models(root / "models")
        for name in names:
            failures += strike_all(name, root / "run", every, seed, blows)
    finally:
        shutil.rmtree(root)
    return failures


def strike_all(name: str, folder: Path, every: int, seed: int, blows: list[Blow]) -> int:
    """The same for one command."""
    command = COMMANDS[name]
    operations, expected = operations_of(command, folder)
    struck: dict[str, int] = Counter()
    failures = 0
    for at, blow in strikes(every, seed, blows, operations):
        struck[blow] += 1
        wrong = strike(command, at, blow, folder, expected)
        if wrong:
            failures += 1
            print(f"{name}: {blow} at operation {at} ({operations[at]}): {wrong}", flush=True)
    told = ", ".join(f"{count} {blow}" for blow, count in sorted(struck.items()))
    print(f"{name}: {len(operations)} operations; {told}; {failures} failures", flush=True)
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", default=list(COMMANDS), choices=[*COMMANDS, []])
    parser.add_argument(
        "--by", nargs="+", type=Blow, default=list(Blow), choices=list(Blow), help="How; all by default."
    )
    parser.add_argument("--every", type=int, default=1, help="Strike one of so many, drawn at random.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names = arguments.commands or list(COMMANDS)
    sys.exit(min(1, run_all(names, arguments.every, arguments.seed, arguments.by)))
