"""Is the certificate right for large matrices? Random problems of more than a million entries, whose truth is known.

    python benchmarks/large.py [PROBLEMS] [FIRST]

The problems of `benchmarks/certificate.py` and its columns, but with sides of 1056 to 2560 and deltas up to a million
times the storage noise, which is some per cent of a float32 weight: these are not always computed in float64, ranks are
those of the pairs, and bits are not looked for. Expected: 95 % in the range, and 95 % within 0.3 where the verdict is
"to the storage floor".
"""

import sys

import torch
from certificate import outcomes, print_table

from detune.methods import Auto

FIRST = 20000
SIDES = (1056, 1280)
MOST_TIMES = 1e6


def main(problems: int = 300, first: int = FIRST) -> None:
    torch.set_num_threads(1)
    print_table(list(outcomes(problems, first, sides=SIDES, most=MOST_TIMES, solver=Auto(lattice=None))))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
