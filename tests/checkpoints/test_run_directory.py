"""The directory that holds a run's results: one run at a time, and nothing of another's."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from detune.checkpoints import claim, identity, open_checkpoint
from detune.errors import OutputError
from tests.families import plain_family, tree


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_recorded_is_found_again(tmp_path):
    with claim(tmp_path / "out", "key") as run_directory:
        run_directory.journal.record([{"name": "a"}, {"name": "b"}])
    with claim(tmp_path / "out", "key") as again:
        assert again.journal.rows() == [{"name": "a"}, {"name": "b"}]
        # By another process: another file.
        again.journal.record([{"name": "c"}])
        assert len(list((again.directory / "journal").iterdir())) == 2
        assert sorted(row["name"] for row in again.journal.rows()) == ["a", "b", "c"]
        again.clear()
        assert again.journal.rows() == []
        again.remove()
    assert names(tmp_path) == set()


def test_another_key_starts_from_nothing_and_removes_what_was_left(tmp_path):
    with claim(tmp_path / "out", "one") as run_directory:
        run_directory.journal.record([{"name": "a"}])
    with claim(tmp_path / "other", "one"), claim(tmp_path / "out", "two") as run_directory:
        assert run_directory.journal.rows() == []
        assert names(tmp_path) == {".other.recovering-one", ".out.recovering-two"}


@pytest.mark.parametrize("key", ["one", "two"])
def test_a_run_keeps_every_other_one_out_until_it_dies(tmp_path, key):
    """However it dies: a lock that stayed would have to be removed by hand."""
    program = f"""
import os, signal, sys, pathlib
from detune.checkpoints import claim
with claim(pathlib.Path({str(tmp_path / "out")!r}), "one") as run_directory:
    run_directory.journal.record([dict(name="a")])
    print(flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        with pytest.raises(OutputError, match=rf"another run is writing to .*out; process {first.pid} on .*; wait"):
            claim(tmp_path / "out", key).__enter__()
        first.communicate(b"\n")
    with claim(tmp_path / "out", key) as run_directory:
        assert len(run_directory.journal.rows()) == (1 if key == "one" else 0)


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claim(tmp_path / "out", "key"):
        pass
    assert "has no file locks: see to it that no other run writes to" in caplog.text


def test_identity_is_that_of_the_content(tmp_path):
    fine = plain_family(tmp_path)
    first = identity(open_checkpoint(fine.models[0]))
    assert identity(open_checkpoint(fine.models[0])) == first
    assert identity(open_checkpoint(fine.models[1])) != first
    file = fine.models[0] / "model.safetensors"
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    data[len(data) // 2 : len(data) // 2 + 30_000] = bytes(30_000)
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert identity(open_checkpoint(fine.models[0])) != first


def test_identity_of_a_merge_is_that_of_its_adapter_too(tmp_path):
    (tmp_path / "base").mkdir()
    fine = plain_family(tmp_path / "models")
    first = open_checkpoint(fine.models[0])
    # A configuration beside the weights decides what they mean.
    before = identity(first)
    (fine.models[0] / "config.json").write_text("{ }")
    assert identity(first) != before


@pytest.mark.parametrize("content", [["notes"], ["parts"], ["lock", "parts", "notes"], ["lock/x"]])
@pytest.mark.parametrize("own", [True, False])
def test_what_no_run_made_is_left_alone(tmp_path, content, own):
    place = tmp_path / ".out.recovering-one"
    for name in content:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("mine")
    before = tree(place)
    if own:
        with pytest.raises(OutputError, match=r"\.out\.recovering-one is in the way; no run of yours made it"):
            claim(tmp_path / "out", "one").__enter__()
    else:
        with claim(tmp_path / "out", "two") as run_directory:
            run_directory.remove()
    assert tree(place) == before
    assert names(tmp_path) == {place.name}


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "directory", "link to the directory", "pipe"])
@pytest.mark.parametrize("key", ["one", "two"])
def test_a_planted_lock_is_not_followed(tmp_path, kind, key):
    victim, place = tmp_path / "victim", tmp_path / ".out.recovering-one"
    victim.write_text("mine")
    place.mkdir()
    if kind == "link":
        (place / "lock").symlink_to(victim)
    elif kind == "dangling link":
        (place / "lock").symlink_to(tmp_path / "nothing")
    elif kind == "hard link":
        os.link(victim, place / "lock")
    elif kind == "directory":
        (place / "lock").mkdir()
    elif kind == "pipe":
        os.mkfifo(place / "lock")
    else:
        place.rmdir()
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    if key == "one" or kind == "hard link":
        with pytest.raises(OutputError, match=r"recovering-one.* is in the way; no run of yours made it"):
            claim(tmp_path / "out", key).__enter__()
    else:
        with claim(tmp_path / "out", key) as run_directory:
            run_directory.remove()
    assert victim.read_text() == "mine"
    assert not (tmp_path / "nothing").exists()
    assert not (tmp_path / "elsewhere" / "lock").exists()
    assert place.exists()


def test_what_another_user_made_is_left_alone(tmp_path, monkeypatch):
    with claim(tmp_path / "out", "one") as run_directory:
        run_directory.journal.record([{"name": "a"}])
    theirs = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: theirs)
    own, stat = Path.stat, tmp_path.stat()

    def of_another(path, **options):
        # The directory around it is this user's.
        found = own(path, **options)
        return os.stat_result((*found[:4], theirs, *found[5:])) if path == tmp_path else found

    monkeypatch.setattr(Path, "stat", of_another)
    assert stat.st_uid != theirs
    with pytest.raises(OutputError, match=r"recovering-one is in the way; no run of yours made it"):
        claim(tmp_path / "out", "one").__enter__()
    assert (run_directory.directory / "lock").exists()


@pytest.mark.parametrize("kind", ["link", "directory"])
@pytest.mark.parametrize("name", ["part", "results.new"])
def test_what_is_written_does_not_go_through_what_stands_there(tmp_path, kind, name):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    with claim(tmp_path / "out", "key") as run:
        run.save_part("a", ".mask", b"before")
        place = next((run.directory / "parts").iterdir()) if name == "part" else run.directory / name
        place.unlink(missing_ok=True)
        if kind == "link":
            place.symlink_to(victim)
        else:
            (place / "x").mkdir(parents=True)
        checksum = run.save_part("a", ".mask", b"after")
        run.note.write({"out": "hash"})
        assert run.read_part("a", ".mask", checksum) == b"after"
        assert run.noted.hashes == {"out": "hash"}
    assert victim.read_text() == "mine"
