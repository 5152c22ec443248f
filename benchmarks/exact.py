"""Is "exact" ever wrong? Random bases in bf16 and fp16 with merges in float32, where the bits can come back.

    python benchmarks/exact.py [PROBLEMS] [PNG] [FIRST]

One to eight models, of the kinds of `benchmarks/certificate.py`, and the same columns. Expected: no "exact" with an
entry that is not the base's own number, and 95 % in the range. Problems have seeds from 10000 on: verdicts and ranges
were made by what was seen at those below.
"""

import sys
from pathlib import Path

import matplotlib
import torch
from certificate import COLOURS, Outcome, outcomes, print_table

matplotlib.use("Agg")
from matplotlib import pyplot

# Verdicts and ranges were made by what was seen at seeds below.
FIRST = 10000


def plot(seen: list[Outcome], path: Path) -> None:
    figure, axis = pyplot.subplots(figsize=(6, 4.2))
    for verdict, colour in COLOURS.items():
        chosen = [o for o in seen if o.verdict is verdict]
        axis.scatter([o.times for o in chosen], [o.wrong for o in chosen], s=9, color=colour, label=verdict)
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(-0.5, 3 * max(2, *(o.wrong for o in seen)))
    axis.set_xlabel("deltas, over the base's rounding")
    axis.set_ylabel("wrong entries")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(problems: int = 100, path: str = "docs/exact.png", first: int = FIRST) -> None:
    torch.set_num_threads(1)
    seen = list(outcomes(problems, first, coarse=True))
    print_table(seen)
    plot(seen, Path(path))


if __name__ == "__main__":
    main(*(kind(word) for kind, word in zip((int, str, int), sys.argv[1:], strict=False)))
