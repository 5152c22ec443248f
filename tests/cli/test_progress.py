"""How far a command is: bytes, what is in work and for how long, what has taken longest, and silence."""

import time

import pytest
from rich.progress import Progress as Bar

import detune
from detune.cli.progress import Progress
from detune.cli.terminal import duration
from tests.families import Fine, plain_family


@pytest.fixture
def fine(tmp_path) -> Fine:
    return plain_family(tmp_path / "models")


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


class Row:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


def test_bytes_and_what_is_in_work(clock):
    bar = Bar(disable=True)
    shown = Progress(bar)
    (task,) = bar.tasks

    def described() -> str:
        return str(task.fields["describe"]())

    clock[0] += 3
    assert (task.total, described()) == (None, "opening the models: 3 s")
    shown("before")
    shown("before", Row(9.0))
    shown.start({"a": 600, "b": 400})
    assert (task.total, task.completed, described()) == (1000, 0, "computing")
    shown("a")
    shown("b")
    clock[0] += 75
    assert described() == "a and 1 more: 75 s"
    shown("a", Row(70.0))
    assert (task.completed, described()) == (600, "b: 75 s")
    clock[0] += 75
    assert described() == "b: 2.5 min"
    shown("b", ())
    clock[0] += 4
    assert (task.completed, described()) == (1000, "finishing: 4 s")
    shown.end()
    assert (shown.longest, described()) == ("b 2.5 min, a 70 s, finishing 4 s", "")


def test_of_what_was_quick_nothing_is_said(clock):
    shown = Progress(Bar(disable=True))
    shown.start({"a": 1})
    shown("a")
    clock[0] += 9
    shown("a", ())
    shown.end()
    assert shown.longest == ""


def test_names_alone_are_one_after_the_other(clock):
    bar = Bar(disable=True)
    shown = Progress(bar)
    for name in ("a", "b"):
        shown.at(name)
        clock[0] += 2
    assert bar.tasks[0].fields["describe"]() == "b: 2 s"


@pytest.mark.parametrize(("seconds", "said"), [(0, "0 s"), (99.4, "99 s"), (100, "1.7 min"), (5400, "1 h 30 min")])
def test_times(seconds, said):
    assert duration(seconds) == said


def test_commands_tell_what_is_to_come_and_what_it_becomes(fine, tmp_path):
    pytest.importorskip("zstandard")
    for run in (
        lambda **told: detune.recover(fine.models, tmp_path / "out", **told),
        lambda **told: detune.inspect(fine.models, **told),
        lambda **told: detune.extract(fine.models, tmp_path / "loras", base=fine.base, **told),
        lambda **told: detune.pack(fine.models, tmp_path / "pack", base=fine.base, **told),
    ):
        starts, begun, done = [], [], []
        run(
            on_start=starts.append,
            on_tensor=lambda name, became, begun=begun, done=done: (begun if became is None else done).append(name),
        )
        (sizes,) = starts
        assert sizes["layer.0.weight"] == 3 * 80 * 64 * 4
        assert sum(sizes.values()) == 3 * (4 * 80 * 64 * 4 + 50 * 16 * 4 + 64 * 4 + 8)
        assert sorted(begun) == sorted(done) == sorted(sizes)


def test_a_pack_without_a_base_tells_of_both_stages(fine, tmp_path):
    starts = []
    detune.pack(fine.models, tmp_path / "pack", on_start=starts.append)
    assert [set(start) for start in starts] == [set(starts[0])] * 2


def test_a_run_that_goes_on_counts_what_is_left(fine, tmp_path, monkeypatch):
    solved = []

    def stop(name: str, row: object) -> None:
        if row is not None:
            solved.append(name)
        if len(solved) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        detune.recover(fine.models, tmp_path / "out", on_tensor=stop)
    (note,) = raised.value.__notes__
    assert note.startswith(f"what is complete stays in {tmp_path}/.out.recovering-")
    kept = int(note.partition(", ")[2].split()[0])
    assert kept >= 3
    starts = []
    detune.recover(fine.models, tmp_path / "out", on_start=starts.append)
    assert len(starts[0]) == 7 - kept


@pytest.mark.parametrize("verb", ["recover", "extract", "pack"])
def test_quiet_prints_nothing_but_errors(command, fine, tmp_path, monkeypatch, verb):
    monkeypatch.setenv("FORCE_COLOR", "1")
    words = [verb, *fine.specs, "--out", tmp_path / "out", "--quiet", *["--base", fine.base] * (verb != "recover")]
    assert command(*words) == (0, "", "")
    ran = command(*words)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("detune: error: ")
    if verb == "pack":
        assert command("unpack", tmp_path / "out", "--out", tmp_path / "again", "-q") == (0, "", "")


def test_in_a_terminal_there_is_a_bar(command, fine, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    ran = command("recover", *fine.specs, "--out", tmp_path / "out")
    assert "of 0.3 MB" in ran.err
    assert "opening the models" in ran.err
