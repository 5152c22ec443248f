"""Running the command inside the test's process."""

import sys
from typing import NamedTuple

import pytest

import detune.cli


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> Ran:
    """Run `detune` with these arguments."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["detune", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        detune.cli.main()
    captured = capsys.readouterr()
    return Ran(int(exit_.value.code or 0), captured.out, captured.err)
