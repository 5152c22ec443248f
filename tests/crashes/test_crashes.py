"""A sample of what `python -m tests.crashes` does: in a process of its own, as it forks."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("command", "every", "seed"), [("recover", 50, 1), ("overwrite", 25, 1), ("pack", 25, 1)])
def test_a_command_that_is_cut_off_anywhere_is_finished_by_the_same_command(command, every, seed):
    words = [sys.executable, "-m", "tests.crashes", command, "--every", str(every), "--seed", str(seed)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.endswith(" 0 failures\n")
    assert done.stdout.count("\n") == 1
    assert done.returncode == 0
