"""Outputs that appear whole or not at all."""

import errno
import os

import pytest

from detune.checkpoints import new_directory, new_file
from detune.errors import OutputError


def test_a_directory_appears_when_it_is_whole(tmp_path):
    with new_directory(tmp_path / "a" / "out") as partial:
        (partial / "file").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "file").read_text() == "x"
    assert os.listdir(tmp_path / "a") == ["out"]


def test_a_file_appears_when_it_is_whole(tmp_path):
    with new_file(tmp_path / "a" / "out") as partial:
        partial.write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert os.listdir(tmp_path / "a") == ["out"]


@pytest.mark.parametrize("make", [new_directory, new_file])
def test_an_exception_leaves_nothing(tmp_path, make):
    def fail() -> None:
        with make(tmp_path / "out") as partial:
            if partial.is_dir():
                (partial / "file").write_text("x")
            else:
                partial.write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for make, name in ((new_directory, "full"), (new_directory, "file"), (new_file, "file"), (new_file, "empty")):
        with pytest.raises(OutputError, match=rf"{name} exists; expected a new .*nothing is ever overwritten"):
            make(tmp_path / name).__enter__()
    with new_directory(tmp_path / "empty") as partial:
        (partial / "file").touch()
    assert (tmp_path / "empty" / "file").exists()


@pytest.mark.parametrize("make", [new_directory, new_file])
def test_what_appears_in_the_meantime_stays(tmp_path, make):
    def race() -> None:
        with make(tmp_path / "out") as partial:
            if not partial.is_dir():
                partial.touch()
            (tmp_path / "out").write_text("mine")

    with pytest.raises(OutputError, match="out exists"):
        race()
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "no space left for .*out; .*; free some space"), (errno.EIO, "cannot write .*out; .*permissions")],
)
@pytest.mark.parametrize("make", [new_directory, new_file])
def test_a_disk_that_refuses(tmp_path, make, number, message):
    def refuse() -> None:
        with make(tmp_path / "out"):
            raise OSError(number, os.strerror(number))

    with pytest.raises(OutputError, match=message):
        refuse()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [new_directory, new_file])
def test_links_that_go_round_are_one_line(tmp_path, make):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match=r"loop leads nowhere; Symlink loop|cannot write .*loop"):
        make(tmp_path / "loop").__enter__()
    with pytest.raises(OutputError, match="~nobody-has-this-name/x leads nowhere; Could not determine home directory"):
        make("~nobody-has-this-name/x").__enter__()
    with pytest.raises(OutputError, match=r"a\\x00b leads nowhere; embedded null byte; choose another"):
        make("a\0b").__enter__()
