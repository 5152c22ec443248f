"""`python -m tests.fuzzing`: some thousand mutations of every format, the same for the same seed."""

import argparse
import faulthandler
import sys
import traceback
from random import Random

from detune.errors import printable
from tests.fuzzing.runner import fuzz
from tests.fuzzing.targets import TARGETS

# Slower ones get fewer: of a second each, and not of a millisecond.
SHARES = {"names": 0.05, "commands": 0.1, "config": 0.3}


def main() -> None:
    """Run, and end with exit code 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="FORMAT", help=f"of {', '.join(TARGETS)}; all without")
    parser.add_argument("--mutations", type=int, default=5000, help="in all [%(default)s]")
    parser.add_argument("--seed", type=int, default=None, help="[drawn, and printed]")
    parser.add_argument("--only", type=int, help="the one mutation of this number, with its traceback")
    chosen = parser.parse_args()
    unknown = set(chosen.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no format {', '.join(sorted(unknown))}")
    # Where the time is spent in C, no exception ends it.
    faulthandler.enable()
    seed = Random().randrange(10**6) if chosen.seed is None else chosen.seed
    names = chosen.targets or list(TARGETS)
    shares = sum(SHARES.get(name, 1.0) for name in names)
    print(f"seed {seed}", flush=True)
    failed = False
    for name in names:
        count = round(chosen.mutations * SHARES.get(name, 1.0) / shares)
        numbers = range(count) if chosen.only is None else range(chosen.only, chosen.only + 1)
        counts, findings = fuzz(TARGETS[name], numbers, seed)
        print(f"{name:12} {counts['read']:6} read {counts['refused']:6} refused {counts['found']:6} found", flush=True)
        for finding in findings:
            failed = True
            print(f"  --seed {seed} {name} --only {finding.number}: {printable(finding.what)}", flush=True)
            if chosen.only is not None and finding.error is not None:
                traceback.print_exception(finding.error)
    sys.exit(failed)


if __name__ == "__main__":
    main()
