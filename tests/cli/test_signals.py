"""Commands that are told to end: one line, the signal's exit code, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from detune.cli.signals import ENDING, Interrupted, signals_raised
from tests.cases import normal, seeded
from tests.command import run_command
from tests.families import Fine, add, delta, save_plain

# A shell that runs the tests in the background has them ignore SIGINT, and the command would inherit that.
LISTENING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
COMMAND = [sys.executable, "-c", f"{LISTENING}; from detune.cli import main; main()"]
LINE = "detune: interrupted, nothing unfinished passes for a result"


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Fine:
    """Three models whose matrix takes each command seconds."""
    folder, generator = tmp_path_factory.mktemp("models"), seeded(1)
    weight = normal(generator, 768, 768).float()
    models = [
        save_plain(folder / f"model-{i}", {"weight": add(weight, delta(generator, weight, 64))}) for i in range(3)
    ]
    return Fine(save_plain(folder / "base", {"weight": weight}), tuple(models))


def end(words: list[object], folder: Path, signals: list[signal.Signals]) -> tuple[int, str]:
    """Run a command in a folder, where its temporary files are too, and send it signals once it has left a trace."""
    (folder / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(folder / "tmp")}
    with subprocess.Popen(
        [*COMMAND, *map(str, words)], stderr=subprocess.PIPE, text=True, cwd=folder, env=environment
    ) as running:
        deadline = time.monotonic() + 60
        while not [path for path in (*folder.iterdir(), *(folder / "tmp").iterdir()) if path.name != "tmp"]:
            assert running.poll() is None, running.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)
        for number in signals:
            running.send_signal(number)
            time.sleep(0.01)
        _, err = running.communicate(timeout=60)
    return running.returncode, err


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ("recover", signal.SIGINT),
        ("recover --workers", signal.SIGTERM),
        ("extract", signal.SIGINT),
        ("pack", signal.SIGHUP),
        ("audit", signal.SIGTERM),
        ("audit", signal.SIGHUP),
    ],
)
def test_any_signal_ends_in_one_line_and_leaves_nothing(fine, tmp_path, command, number):
    slow = ["--method", "spectral", "--rank", "64"]
    words = {
        "recover": ["recover", *fine.models, "--out", "out", "--mask", "mask", "--adapters", "loras", *slow],
        "recover --workers": ["recover", *fine.models, "--out", "out", *slow, "--workers", "1"],
        "extract": ["extract", *fine.models, "--base", fine.base, "--out", "out"],
        "pack": ["pack", *fine.models, "--out", "out"],
        "audit": ["audit", *fine.models, "--out", "out", *slow],
    }[command]
    # More often than once: people press a key until something happens, and batch systems send to whole groups.
    code, err = end(words, tmp_path, [number, number, signal.SIGTERM, number])
    assert code == 128 + number
    assert err == f"{LINE}; nothing is kept\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["tmp"]


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (
            ["bench", "run", "subset", "--out", "results"],
            "what is finished stays in results: the same command",
        ),
        (["bench", "study", "models", "subset", "--out", "results"], "what is finished stays in results"),
        (["bench", "build", "minilm", "--out", "subset"], "what is finished stays in subset"),
        (["bench", "build", "lora", "--base", "base", "--out", "subset"], "what is finished stays in subset"),
        (["bench", "defences", "--out", "matrix"], "what is finished stays in matrix"),
        (["bench", "leaderboard", "add", "--by", "A", "--out", "matrix"], "what is finished stays in matrix"),
        (["demo", "--out", "models"], "the models made so far stay in models"),
        (["push", "model", "org/name"], "large files that have arrived are kept on the Hub"),
        (["compare", "model", "base"], "nothing is kept"),
        (["defend", "bf16", "model", "out"], "nothing is kept"),
        (["unpack", "models.detune", "--out", "out"], "nothing is kept"),
        (["family", "model", "base"], "nothing is kept"),
    ],
)
def test_each_command_says_what_is_kept(monkeypatch, capsys, words, kept):
    def interrupt(*_: object, **__: object) -> None:
        raise Interrupted(signal.SIGINT)

    for name in (
        *("detune.compare", "detune.check_family", "detune.unpack", "detune.push", "detune.defences.defend"),
        *("detune.bench.subsets.open_subset", "detune.bench.studies.run_study", "detune.bench.run.run_all"),
        *("detune.bench.build.build_subset", "detune.bench.recipes.build_recipe", "detune.demo.story.tell"),
        "detune.bench.defences.bench_defences",
    ):
        monkeypatch.setattr(name, interrupt)
    monkeypatch.setattr("detune.bench.subsets.open_subset", lambda *_, **__: None)
    monkeypatch.setattr("detune.bench.run.plan", lambda *_, **__: ())
    monkeypatch.setattr("detune.bench.methods.find_method", lambda *_: None)
    left = []
    monkeypatch.setattr("detune.cli.leave", lambda code: left.append(code) or sys.exit(code))
    assert run_command(monkeypatch, capsys, *words).err.startswith(f"{LINE}; {kept}")
    assert left == [130]


@pytest.fixture
def handlers() -> Iterator[None]:
    """The process's own afterwards, whatever becomes of them; none is ignored in the test."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_signals_do_not_disturb_the_cleaning_up():
    cleaned = []

    def clean_up() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
            cleaned.append(True)

    with pytest.raises(Interrupted, match="SIGTERM") as raised, signals_raised():
        clean_up()
    assert cleaned
    assert raised.value.exit_code == 143
    # Until the process has ended.
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.usefixtures("handlers")
def test_a_cleaning_up_that_fails_does_not_hide_the_signal():
    def fail() -> None:
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            raise ValueError

    with pytest.raises(Interrupted) as raised, signals_raised():
        fail()
    assert raised.value.exit_code == 129


class Unlucky:
    """What a signal meets in a destructor: Python drops exceptions there."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("handlers")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_was_lost_does_not_keep_the_next_from_being_heard():
    with signals_raised():
        Unlucky()
    with pytest.raises(Interrupted), signals_raised():
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("handlers")
def test_what_was_ignored_stays_ignored():
    """As `nohup` and shells start their background jobs."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals_raised():
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_the_command_is_imported_is_one_line():
    code = """
import runpy, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "detune.cli.recovery":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
runpy.run_module("detune", run_name="__main__")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "detune: interrupted before it began\n")
