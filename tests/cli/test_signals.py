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
    assert err == f"{LINE}\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["tmp"]


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
