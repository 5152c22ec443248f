"""How far a command is: bytes, what is in work and for how long, what has taken longest, and silence."""

import re
import time

import pytest
from rich.progress import Progress as Bar

import detune
import detune.cli
from detune.audit import audit
from detune.cli.progress import Progress
from detune.cli.progress_bars import progress_bar
from detune.cli.terminal import duration
from detune.defences import Bf16, defend
from tests.command import leaves
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
    assert (task.total, described()) == (None, "3 s: opening the models")
    shown("before")
    shown("before", Row(9.0))
    shown.start({"a": 600, "b": 400})
    assert (task.total, task.completed, described()) == (1000, 0, "computing")
    shown("a")
    shown("b")
    clock[0] += 75
    assert described() == "75 s: a and 1 more"
    shown("a", Row(70.0))
    assert (task.completed, described()) == (600, "75 s: b")
    clock[0] += 75
    assert described() == "2.5 min: b"
    shown("b", ())
    clock[0] += 4
    assert (task.completed, described()) == (1000, "4 s: finishing")
    shown.stage("drawing the tree")
    clock[0] += 30
    assert described() == "30 s: drawing the tree"
    shown.stage("")
    assert (shown.longest, described()) == ("b 2.5 min, a 70 s, drawing the tree 30 s", "")


def test_parts_in_words_where_no_bar_is_seen(capsys):
    shown = Progress(Bar(disable=True), in_words=True)
    for parts in ({"training": 1, "merging": 1}, {"attack": 1}, {}):
        shown.start(parts)
        for part in parts:
            shown(part)
            shown(part, True)
    assert capsys.readouterr() == ("", "training (1 of 2)\nmerging (2 of 2)\nattack (1 of 1)\n")


@pytest.mark.parametrize("columns", [80, 120])
def test_a_narrow_terminal_cuts_the_name_and_nothing_else(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar(unit="bytes") as bar:
        shown = Progress(bar)
        name = "model.layers.10.self_attn.query.weight " * 4
        shown.start({"a": 2_000_000, "b": 3_000_000, name: 400_000_000})
        for part in "ab":
            shown(part)
            shown(part, ())
        shown(name)
        bar.refresh()
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    frames = [line for line in re.split(r"[\r\n]+", seen) if "0 s: mo" in line]
    assert frames
    for frame in frames:
        assert len(frame.rstrip()) <= columns
        assert re.search(r"5\.0 MB of 405\.0 MB 0:00:0\d about [\d.e-]+ \w+ left 0 s: mo", frame), frame
        assert frame.rstrip().endswith("…"), frame


def test_of_what_was_quick_nothing_is_said(clock):
    shown = Progress(Bar(disable=True))
    shown.start({"a": 1})
    shown("a")
    clock[0] += 9
    shown("a", ())
    shown.stage("")
    assert shown.longest == ""


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
        lambda **told: detune.check_family(fine.models, **told),
        lambda **told: audit(fine.models, weights_only=True, **told),
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


def test_so_do_those_of_one_model_or_two(fine, tmp_path):
    detune.pack(fine.models, tmp_path / "pack", base=fine.base)
    of_a_model = 4 * 80 * 64 * 4 + 50 * 16 * 4 + 64 * 4 + 8
    of_files = sum(file.stat().st_size for model in fine.models for file in model.iterdir())

    def unpacking(on_tensor, **told):
        detune.unpack(tmp_path / "pack", tmp_path / "unpacked", on_file=on_tensor, **told)

    for run, total in (
        (lambda **told: detune.compare(fine.models[0], fine.base, **told), 2 * of_a_model),
        (lambda **told: defend(Bf16(), fine.models[0], tmp_path / "release", **told), of_a_model),
        (unpacking, of_files),
    ):
        starts, calls = [], []
        run(on_start=starts.append, on_tensor=lambda name, became, calls=calls: calls.append((name, became is None)))
        (sizes,) = starts
        assert sum(sizes.values()) == total
        assert calls == [(name, begun) for name in sizes for begun in (True, False)]


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


COMMANDS = {
    "recover": ["recover", "{models}", "--out", "{out}"],
    "inspect": ["inspect", "{models}"],
    "family": ["family", "{models}"],
    "compare": ["compare", "{model}", "{base}"],
    "audit": ["audit", "{models}", "--weights-only"],
    "extract": ["extract", "{models}", "--base", "{base}", "--out", "{out}"],
    "pack": ["pack", "{models}", "--base", "{base}", "--out", "{out}"],
    "unpack": ["unpack", "{pack}", "--out", "{out}"],
    "defend": ["defend", "bf16", "{model}", "{out}"],
}


@pytest.fixture
def words_of(fine, tmp_path):
    def words(name: str) -> list[str]:
        """Return the command's words, with the places where it reads and writes."""
        detune.pack(fine.models, tmp_path / "pack", base=fine.base)
        filled = {"{models}": fine.specs, "{model}": fine.specs[:1], "{base}": [str(fine.base)]}
        filled |= {"{out}": [str(tmp_path / "out")], "{pack}": [str(tmp_path / "pack")]}
        return [each for word in COMMANDS[name] for each in filled.get(word, [word])]

    return words


@pytest.mark.parametrize("name", COMMANDS)
def test_quiet_prints_nothing_but_errors(command, words_of, monkeypatch, name):
    monkeypatch.setenv("FORCE_COLOR", "1")
    words = [*words_of(name), "--quiet"]
    # What three releases give away is told by the exit code.
    assert command(*words) == (1 if name == "audit" else 0, "", "")
    ran = command(*words[:-2], "nowhere", *words[-1:]) if "--out" not in words and name != "defend" else command(*words)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("detune: error: ")


@pytest.mark.parametrize("name", COMMANDS)
def test_in_a_terminal_there_is_a_bar(command, words_of, monkeypatch, name):
    monkeypatch.setenv("FORCE_COLOR", "1")
    ran = command(*words_of(name))
    assert re.search(r"[\d.]+ MB of 0\.[123] MB", ran.err)
    assert "opening the models" in ran.err
    assert ran.out


@pytest.mark.parametrize("name", COMMANDS)
def test_what_took_longest_is_told(command, words_of, monkeypatch, name):
    monkeypatch.setattr("detune.cli.progress.WORTH_TELLING_SECONDS", 0.0)
    assert re.search(r"^took longest: .+ [\d.e-]+ s", command(*words_of(name)).out, re.MULTILINE)


def test_every_command_that_shows_progress_can_be_quiet():
    commands = {name: {option.name for option in found.params} for name, found in leaves(detune.cli.cli).items()}
    loud = {name for name, options in commands.items() if "quiet" not in options}
    assert loud == {"defend frozen-a", "bench leaderboard build"}, "which write a small file at once"
    assert {name for name, options in commands.items() if "as_json" in options} <= set(commands) - loud
