"""A sample of what `python -m tests.crashes` does: in a process of its own, as it forks."""

import subprocess
import sys

import pytest

from tests.crashes.operations import Blow


@pytest.mark.parametrize(("command", "every", "seed"), [("recover", 50, 1), ("overwrite", 25, 1), ("pack", 25, 1)])
def test_a_command_that_is_cut_off_anywhere_is_finished_by_the_same_command(command, every, seed):
    words = [sys.executable, "-m", "tests.crashes", command, "--every", str(every), "--seed", str(seed)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    # A line for each way, and none for a failure.
    assert [line.split(", ", 1)[1] for line in done.stdout.splitlines()] == [f"{blow}: 0 failures" for blow in Blow]
    assert done.returncode == 0
