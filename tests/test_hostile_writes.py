"""Every path that a command writes to, watched by the interpreter itself, lies in what it was told to make."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.command import run_command
from tests.families import Fine, State, edit, plain_family, tree

# What each event of `sys.audit` changes: the places among its arguments of a path, and of the open directory that it is
# relative to, if there is one.
CHANGES = {
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.utime": ((0, 3),),
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Which paths this process has changed since `begin`; a hook of the interpreter stays for good."""

    def __init__(self) -> None:
        self._seen: list[Path] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._seen is None:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike) and (arguments[2] or 0) & WRITES:
            self._seen.append(Path(os.fsdecode(arguments[0])))
        for place, directory in CHANGES.get(event, ()):
            if isinstance(arguments[place], str | bytes | os.PathLike):
                descriptor = -1 if directory is None else arguments[directory]
                folder = "" if descriptor == -1 else os.readlink(f"/proc/self/fd/{descriptor}")
                self._seen.append(Path(folder, os.fsdecode(arguments[place])))

    @contextmanager
    def watching(self) -> Iterator[list[Path]]:
        self._seen = seen = []
        try:
            yield seen
        finally:
            self._seen = None


WATCH = Watch()
# Opened in a directory that `run_directory.py` holds open; the event does not say which.
BY_DESCRIPTOR = {Path("lock")}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Fine:
    """A family whose tensors are called as paths to elsewhere."""
    folder = tmp_path_factory.mktemp("hostile")
    fine = plain_family(folder / "models")
    names = dict(
        zip(
            ("layer.0.weight", "layer.1.weight", "layer.2.weight", "norm.weight"),
            ("../../elsewhere/x.weight", f"{folder}/elsewhere/y.weight", "a/../../../z.weight", "~/norm.weight"),
            strict=True,
        )
    )

    def rename(state: State) -> None:
        for old, new in names.items():
            state[new] = state.pop(old)

    for model in (fine.base, *fine.models):
        edit(model, rename)
    return fine


COMMANDS = {
    "recover": ("recover", "{models}", "--out", "{out}", "--adapters", "{out}-loras", "--mask", "{out}-mask"),
    "overwrite": ("recover", "{models}", "--out", "{out}", "--overwrite", "--method", "mean"),
    "extract": ("extract", "{models}", "--base", "{base}", "--out", "{out}-extracted"),
    "pack": ("pack", "{models}", "--base", "{base}", "--out", "{out}-pack"),
    "unpack": ("unpack", "{out}-pack", "--out", "{out}-unpacked"),
    "audit": ("audit", "{models}", "--base", "{base}", "--out", "{out}-audit", "--weights-only"),
    "defend": ("defend", "noise", "{base}", "{out}-release"),
    "inspect": ("inspect", "{models}"),
    "family": ("family", "{models}"),
    "compare": ("compare", "{base}", "{out}"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_commands_write_where_they_were_told(hostile, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "tmp").mkdir()
    for variable in ("TMPDIR", "HOME", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path)
    root = hostile.base.parents[1]
    before = tree(root)
    out = tmp_path / "work" / "out"
    places = {"base": hostile.base, "out": out}
    told: set[str] = set()
    for name, command in COMMANDS.items():
        words = [
            spec for word in command for spec in (hostile.specs if word == "{models}" else [word.format(**places)])
        ]
        with WATCH.watching() as seen:
            ran = run_command(monkeypatch, capsys, *words)
        assert ran.code == (name == "audit"), (name, ran.err)
        told |= {Path(word).name for word in words if word.startswith(str(out))}
        for path in seen:
            if path in BY_DESCRIPTOR or path == Path(os.devnull) or "__pycache__" in path.parts:
                continue
            path = Path(os.path.abspath(path))
            if path.is_relative_to(tmp_path / "tmp") or path == out.parent:
                continue
            assert path.is_relative_to(out.parent), (name, path)
            # What is made, or a hidden name of it.
            first = path.relative_to(out.parent).parts[0]
            assert first in told or any(first.lstrip(".").startswith(f"{known}.") for known in told), (name, path)
        if name in ("inspect", "family", "compare"):
            assert not [path for path in seen if path.is_relative_to(tmp_path / "work")]
    assert tree(root) == before
    assert not (root / "elsewhere").exists()
    left = {path.name for path in out.parent.iterdir()}
    assert left == {"out", *(f"out-{what}" for what in ("loras", "mask", "extracted", "pack"))} | {
        *("out-unpacked", "out-audit", "out-release"),
    }
