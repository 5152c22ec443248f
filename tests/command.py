"""Running the command inside the test's process."""

import sys
from typing import NamedTuple

import click
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


def leaves(command: click.Command, *words: str) -> dict[str, click.Command]:
    """Every command below a group, by its words; some groups make theirs when they are asked."""
    if not isinstance(command, click.Group):
        return {" ".join(words): command}
    context, found = click.Context(command), dict[str, click.Command]()
    for name in command.list_commands(context):
        sub = command.get_command(context, name)
        assert sub is not None
        found |= leaves(sub, *words, name)
    return found
