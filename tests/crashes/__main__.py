"""Commands that are killed, told to end or out of disk at each of their file operations, and then run again.

    python -m tests.crashes                        every operation of every command, in every way
    python -m tests.crashes --every 9 --seed 1     a sample
    python -m tests.crashes recover --by SIGKILL   some of it

A process that has imported everything forks one for each run, which is what makes thousands of runs affordable. There
Python's own functions are replaced, so that each operation on a file is counted, and the one that is meant fails.
"""

import argparse
import sys

from tests.crashes.commands import COMMANDS
from tests.crashes.operations import Blow
from tests.crashes.runner import strike_commands

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", default=[], choices=[*COMMANDS, []])
    parser.add_argument(
        "--by", nargs="+", type=Blow, default=list(Blow), choices=list(Blow), help="How; all by default."
    )
    parser.add_argument(
        "--every", type=int, default=1, help="Strike one of N operations, drawn at random.", metavar="N"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names = arguments.commands or list(COMMANDS)
    sys.exit(min(1, strike_commands(names, arguments.every, arguments.seed, arguments.by)))
