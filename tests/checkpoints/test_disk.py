"""What is done to a disk in one step."""

import ctypes
import errno
import os
from pathlib import Path

import pytest

from detune.checkpoints import disk
from detune.checkpoints.disk import discard, exchange


@pytest.mark.parametrize("kind", ["file", "directory", "link", "link to a directory", "pipe", "nothing"])
def test_what_stands_in_a_place_is_discarded(tmp_path: Path, kind: str) -> None:
    kept, place = tmp_path / "kept", tmp_path / "place"
    (kept / "x").mkdir(parents=True)
    if kind == "file":
        place.touch()
    elif kind == "directory":
        (place / "x").mkdir(parents=True)
    elif kind == "link":
        place.symlink_to(tmp_path / "nothing")
    elif kind == "link to a directory":
        place.symlink_to(kept)
    elif kind == "pipe":
        os.mkfifo(place)
    discard(place)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "x"]


def two(folder: Path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / f"of {name}").touch()
    return folder / "a", folder / "b"


def test_two_directories_change_places(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    assert exchange(one, other)
    assert [path.name for folder in (one, other) for path in folder.iterdir()] == ["of b", "of a"]
    with pytest.raises(FileNotFoundError, match="nothing"):
        exchange(one, tmp_path / "nothing")


def test_systems_and_file_systems_that_cannot_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda *_, **__: object())
        assert not exchange(one, other)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "_RENAME_EXCHANGE", 1 << 30)  # no flag that there is
        assert not exchange(one, other)
    assert errno.EINVAL in disk._NO_EXCHANGE
    assert [path.name for folder in (one, other) for path in folder.iterdir()] == ["of a", "of b"]
