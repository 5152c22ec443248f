"""Hidden directories: each is its process's own while that lives, and nobody's afterwards."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from detune.checkpoints import new_directory, new_file, temporary_directory
from detune.checkpoints.staging import CONTENT, LOCK, remove_abandoned, staging

DYING = """
import os, signal, sys, tempfile
from detune.checkpoints import new_directory, new_file, temporary_directory
make = {{"directory": new_directory, "file": new_file, "temporary": temporary_directory}}["{kind}"]
with make({name!r}) as partial:
    (partial / "file" if partial.is_dir() else partial).write_text("x")
    print(flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["directory", "file", "temporary"])
def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_living_one_makes_is_not(
    tmp_path, monkeypatch, kind
):
    make = {"directory": new_directory, "file": new_file, "temporary": temporary_directory}[kind]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    name = "out" if kind == "temporary" else str(tmp_path / "out")
    code = DYING.format(kind=kind, name=name)
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as first:
        first.stdout.readline()
        (left,) = names(tmp_path)
        with make(name) as partial:
            (partial / "file" if partial.is_dir() else partial).write_text("y")
            assert left in names(tmp_path)
        first.communicate(b"\n")
    assert left in names(tmp_path)
    if kind == "temporary":
        with make(name):
            assert left not in names(tmp_path)
    else:
        with pytest.raises(Exception, match="out exists"):
            make(name).__enter__()
    assert names(tmp_path) == (set() if kind == "temporary" else {"out"})


def test_what_is_left_of_a_removal_is_removed(tmp_path):
    (tmp_path / ".out.partial-0123456789abcdef").mkdir()
    (tmp_path / ".out.partial-fedcba9876543210").mkdir()
    (tmp_path / ".out.partial-fedcba9876543210" / LOCK).touch()
    remove_abandoned(tmp_path / "out")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("content", [["notes"], [CONTENT], [LOCK, CONTENT, "notes"], [f"{LOCK}/x"]])
def test_what_no_process_of_ours_made_is_left_alone(tmp_path, content):
    place = tmp_path / ".out.partial-mine"
    for name in content:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("mine")
    (tmp_path / ".out.partial-file").write_text("mine")
    (tmp_path / ".out.partial-link").symlink_to(place)
    remove_abandoned(tmp_path / "out")
    assert names(tmp_path) == {place.name, ".out.partial-file", ".out.partial-link"}
    assert all((place / name).read_text() == "mine" for name in content)


def test_without_locks_nobody_knows_who_is_alive(tmp_path, monkeypatch):
    place = tmp_path / ".out.partial-0123456789abcdef"
    place.mkdir()
    (place / LOCK).touch()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    remove_abandoned(tmp_path / "out")
    assert names(tmp_path) == {place.name}


def test_what_an_error_says_of_it_goes_with_it(tmp_path):
    def fail() -> None:
        with new_directory(tmp_path / "out") as partial:
            error = KeyboardInterrupt()
            error.add_note(f"what has landed stays in {partial}")
            error.add_note("what has landed stays elsewhere")
            raise error

    with pytest.raises(KeyboardInterrupt) as raised:
        fail()
    assert raised.value.__notes__ == ["what has landed stays elsewhere"]


def test_others_cannot_look_into_it(tmp_path):
    with staging(tmp_path / "out") as directory:
        assert directory.stat().st_mode & 0o077 == 0
    with new_directory(tmp_path / "out") as partial:
        (tmp_path / "usual").mkdir()
        assert partial.stat().st_mode == (tmp_path / "usual").stat().st_mode
