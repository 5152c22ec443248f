"""One run that is struck, in a process of its own; the same command after it; and what must hold."""

import faulthandler
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from detune.checkpoints import run_directory
from detune.cli import INTERRUPTED, main
from tests.crashes.commands import COMMANDS, Command, make_models
from tests.crashes.operations import SIGNALS, Blow, Operations

__all__ = ["strike_commands"]

WAITING_SECONDS = 300
"""A run takes one or two."""


# --- one run ---


@dataclass(frozen=True)
class Ran:
    """What became of a run.

    Attributes:
        code: Its exit code, or the negative number of the signal that killed it.
        err: What it printed there.
        names: Of its operations, where it came to its end.
        modules: All that it had imported then.
    """

    code: int
    err: str
    names: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


def run(
    words: tuple[str, ...], folder: Path, at: int | None = None, blow: Blow = Blow.KILL, *, exchanges: bool = True
) -> Ran:
    """Run a command in a process of its own, in a folder that has its temporary files too.

    Args:
        words: Its arguments.
        folder: Where.
        at: The operation to strike; None strikes none.
        blow: How.
        exchanges: Whether two names can be exchanged in one step.
    """
    outside = folder.with_name(f"{folder.name}.said")
    outside.write_text("")
    child = os.fork()
    if child == 0:
        _run(words, folder, outside, at, blow, exchanges)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    names = outside.with_suffix(".names")
    lines = names.read_text().split("\n") if names.exists() else ["", ""]
    names.unlink(missing_ok=True)
    return Ran(code, outside.read_text(), *(tuple(line.split()) for line in lines))


def _run(words: tuple[str, ...], folder: Path, said: Path, at: int | None, blow: Blow, exchanges: bool) -> None:
    code = 1
    try:
        os.chdir(folder)
        with said.open("wb") as err, open(os.devnull, "wb") as out:
            os.dup2(err.fileno(), 2)
            os.dup2(out.fileno(), 1)
        (folder / "tmp").mkdir(exist_ok=True)
        tempfile.tempdir = str(folder / "tmp")
        sys.argv = ["detune", *words]
        # A run that never ends is a finding too, and says where it waits.
        faulthandler.dump_traceback_later(WAITING_SECONDS, exit=True)
        operations = Operations(folder, at, blow)
        operations.install()
        if not exchanges:
            run_directory.exchange = lambda one, other: False
        for number in SIGNALS:
            signal.signal(signal.Signals[number], signal.default_int_handler)
        try:
            main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(bool(error.code))
        operations.at = None
        said.with_suffix(".names").write_text(f"{' '.join(operations.names)}\n{' '.join(sys.modules)}")
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
    ran = run(command.words, folder, at, blow, exchanges=command.exchanges)
    wrong = _judge(command, ran, blow, folder, before, expected)
    if wrong or ran.code == command.code:
        return wrong
    was_done = tree(folder, command.makes) == expected != before
    again = run(command.words, folder, exchanges=command.exchanges)
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
        start = "detune: error: " if blow is Blow.FULL else INTERRUPTED
        if ran.code != command.code and (len(lines) != 1 or not lines[0].startswith(start)):
            return f"it said {ran.err.strip()!r}"
        left = [name for name in left_over(folder, command.makes) if not command.resumes or ".recovering-" not in name]
        if left:
            return f"it left {', '.join(left)}"
    if ran.code == command.code and tree(folder, command.makes) != expected:
        return "it ended as if done and made something else"
    for name in command.makes:
        results = [{path: data for path, data in of.items() if path.split("/")[0] == name} for of in (before, expected)]
        found = tree(folder, (name,))
        if found not in ({}, *results):
            return f"{name} passes for a result"
        if results[0] and not found and command.exchanges:
            return f"{name} is gone"
    return None


def prepare(command: Command, folder: Path) -> None:
    """A folder as the command finds it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "tmp").mkdir()
    for words in command.begins:
        ran = run(words, folder)
        if ran.code:
            raise RuntimeError(f"{words} ended with {ran.code}: {ran.err}")


def operations_of(command: Command, folder: Path) -> tuple[tuple[str, ...], dict[str, bytes]]:
    """The operations of an undisturbed run, and what it makes."""
    prepare(command, folder)
    for module in run(command.words, folder).modules:
        # Imports are most of a run's time: whatever is forked from now on has them.
        if module not in sys.modules:
            with suppress(ImportError):  # names that a package gives to parts of itself
                import_module(module)
    prepare(command, folder)
    ran = run(command.words, folder, exchanges=command.exchanges)
    if ran.code != command.code or ran.err or left_over(folder, command.makes):
        raise RuntimeError(f"{command.words} ended with {ran.code}: {ran.err}, {left_over(folder, command.makes)}")
    return ran.names, tree(folder, command.makes)


# --- all of them ---


def struck(every: int, seed: int, blow: Blow, operations: tuple[str, ...]) -> Iterator[int]:
    """Which operations are struck: all of them, or a sample. A full disk lets files be removed."""
    draw = random.Random(f"{seed}/{blow}")
    for at, name in enumerate(operations):
        if draw.randrange(every) == 0 and not (blow is Blow.FULL and name in ("unlink", "rmdir", "remove")):
            yield at


def strike_commands(names: list[str], every: int, seed: int, blows: list[Blow]) -> int:
    """Strike, tell of each failure at once and of each way when it is through, and count the failures."""
    torch.set_num_threads(1)
    failures = 0
    # No `TemporaryDirectory`: each forked process would remove it at its end.
    root = Path(tempfile.mkdtemp(prefix="detune-crashes-"))
    try:
        make_models(root / "models")
        for name in names:
            operations, expected = operations_of(COMMANDS[name], root / "run")
            for blow in blows:
                chosen = list(struck(every, seed, blow, operations))
                found = 0
                for at in chosen:
                    if wrong := strike(COMMANDS[name], at, blow, root / "run", expected):
                        found += 1
                        print(f"{name}: {blow} at operation {at} ({operations[at]}): {wrong}", flush=True)
                print(f"{name}: {len(chosen)} of {len(operations)} operations, {blow}: {found} failures", flush=True)
                failures += found
    finally:
        shutil.rmtree(root)
    return failures
