"""Is the certificate right? What it predicts against the truth, on random problems whose truth is known.

    python benchmarks/certificate.py [PROBLEMS] [PNG] [FIRST]

Prints for each verdict and dtype in how many problems the truth is in the stated range, within 0.3 of the prediction,
and on which side of the range it is otherwise; how wide ranges are, in the median and in nine of ten; and how many have
no lower end, because the weight may be exact. Expected: 95 % in the range; 95 % within 0.3 where the verdict is "to the
storage floor". All are drawn. Problems have seeds from 13000 on: solvers, thresholds and ranges were made by what was
seen at those below.
"""

import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from detune.certificate.certify import Verdict, certify
from detune.methods import Auto, Lattice
from detune.metrics import w_error
from detune.numerics.float_grid import name_of
from detune.problem import NotRecoverable, Solver, Stack
from detune.problem.storage_noise import storage_variance

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALVES)
BAND = 0.3
GOAL = 95.0
COLOURS = {
    Verdict.NOT_DETERMINED: "tab:red",
    Verdict.APPROXIMATE: "tab:orange",
    Verdict.FLOOR: "tab:blue",
    Verdict.EXACT: "tab:green",
}
RANGED = (Verdict.FLOOR, Verdict.APPROXIMATE)
# Solvers, thresholds and ranges were made by what was seen at seeds below.
FIRST = 13000
SIDES = (40, 64, 96, 128)
MOST_TIMES = 1e4
SOLVER, ON_GRID = Auto(), Lattice()


@dataclass(frozen=True)
class Problem:
    """What was drawn.

    Attributes:
        W: The base, `(out, in)`, float64.
        models: `round(W + M_i)`, `(n, out, in)`.
        times: Size of the deltas, over that of the rounding errors of the base's dtype.
        about: In words.
    """

    W: Tensor
    models: Tensor
    times: float
    about: str


@dataclass(frozen=True)
class Outcome:
    """A prediction and what came of it; W-Errors are of the weight as stored.

    Attributes:
        verdict: The certificate's.
        dtype: Storage dtype of the models.
        predicted: Predicted W-Error; None where no error is expected, or where there is no telling.
        best: Lower end of its range; None where the weight may be exact.
        worst: Upper end; None where no error is expected, or where there is no telling.
        true: W-Error; `-inf` where every entry is right.
        wrong: Entries that are not the base's own number.
        times: Size of the deltas, over that of the rounding errors of the base's dtype.
        solving_seconds: Time of the recovery.
        judging_seconds: Time of the certificate.
        about: The problem.
    """

    verdict: Verdict
    dtype: torch.dtype
    predicted: float | None
    best: float | None
    worst: float | None
    true: float
    wrong: int
    times: float
    solving_seconds: float
    judging_seconds: float
    about: str

    @property
    def low(self) -> float:
        return -math.inf if self.best is None else self.best

    @property
    def high(self) -> float:
        return -math.inf if self.worst is None else self.worst

    @property
    def inside(self) -> bool:
        """Whether the range holds the truth; the range of an exact answer is that alone."""
        return self.verdict is not Verdict.NOT_DETERMINED and self.low <= self.true <= self.high

    @property
    def right(self) -> bool:
        """Whether the prediction is within 0.3 of the truth."""
        if self.expected is None or math.isinf(self.expected):
            return self.expected == self.true
        return abs(self.expected - self.true) <= BAND

    @property
    def expected(self) -> float | None:
        """The prediction; `-inf` where no error is expected, None where there is no telling."""
        return -math.inf if self.predicted is None and self.verdict is not Verdict.NOT_DETERMINED else self.predicted


def draw(seed: int, coarse: bool = False, sides: Sequence[int] = SIDES, most: float = MOST_TIMES) -> Problem:
    """A problem: shapes 40 to 256, ranks 1 to 16, 3 to 8 models, or from one on where the bits can come back.

    Half of the bases lie on their dtype's grid, as published ones do; in float64 all do. Deltas are 3 to 10,000 times
    the storage noise.

    Args:
        seed: Of everything.
        coarse: Whether the base is in half precision and the merges in float32: there the bits can come back. Deltas
            are 0.1 to 1000 times the rounding errors of the base's dtype; to 10 times those of one or two models.
        sides: For other shapes: the shorter side is one of these, the longer up to twice the longest.
        most: For larger deltas than 10,000 times the storage noise.
    """
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    side = pick.choice(sides)
    other = min(2 * max(sides), int(side * pick.choice([1, 1.5, 2, 3])))
    shape = pick.choice([(side, other), (other, side)])
    highest = min(16, min(shape) // 3, max(shape) // 4)
    n = pick.randint(1 if coarse else 3, 8)
    ranks = [pick.randint(1, highest)] * n if pick.random() < 0.5 else [pick.randint(1, highest) for _ in range(n)]
    dtype, decay, shared = (
        pick.choice(HALVES if coarse else DTYPES),
        pick.choice([0, 2, 4, 7]),
        pick.choice([0, 0.5, 0.9, 0.97, 0.99]),
    )
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    on_grid = coarse or pick.random() < 0.5
    W = W.to(dtype).double() if on_grid else W
    times = 10 ** (pick.uniform(-1, 3 if n > 2 else 1) if coarse else pick.uniform(math.log10(3), math.log10(most)))
    size = min(30.0, times * float(storage_variance(W.to(dtype)).mean().sqrt()))
    common = torch.randn(shape[1], max(ranks), generator=generator, dtype=torch.float64)
    models = []
    for r in ranks:
        own = torch.randn(shape[1], r, generator=generator, dtype=torch.float64)
        V = torch.linalg.qr(shared**0.5 * common[:, :r] + (1 - shared) ** 0.5 * own)[0]
        U = torch.linalg.qr(torch.randn(shape[0], r, generator=generator, dtype=torch.float64))[0]
        M_i = (U * torch.exp(torch.linspace(0, -decay, r, dtype=torch.float64))) @ V.mT
        models.append((W + M_i * (size * math.sqrt(W.numel() / r))).to(torch.float32 if coarse else dtype))
    grid = f"on the {name_of(dtype)} grid" if on_grid else "off the grid"
    about = f"seed {seed} {shape} ranks {ranks} decay {decay} shared {shared} deltas {times:.3g} {grid}"
    return Problem(W, torch.stack(models), times, about)


def outcomes(
    problems: int,
    first: int,
    coarse: bool = False,
    sides: Sequence[int] = SIDES,
    most: float = MOST_TIMES,
    solver: Solver = SOLVER,
) -> Iterator[Outcome]:
    refused = 0
    for seed in range(first, first + problems):
        problem = draw(seed, coarse, sides, most)
        stack = Stack.of(problem.models)
        began = time.perf_counter()
        try:
            recovery = (solver if stack.n > 2 else ON_GRID).solve(stack)
        except NotRecoverable:
            refused += 1
            continue
        solved = time.perf_counter()
        certificate = certify(stack, recovery, stored=problem.models.dtype)
        judged = time.perf_counter()
        weight = recovery.weight.to(problem.models.dtype)
        true, wrong = w_error(weight, problem.W), int(weight.double().ne(problem.W).sum())
        print(f"\r{seed + 1 - first} of {problems}", end="", file=sys.stderr, flush=True)
        yield Outcome(
            certificate.verdict,
            problem.models.dtype,
            certificate.predicted_w_error,
            certificate.best_w_error,
            certificate.worst_w_error,
            true,
            wrong,
            problem.times,
            solved - began,
            judged - solved,
            problem.about,
        )
    if refused:
        print(f"{refused} of {problems} refused")


def print_table(seen: list[Outcome]) -> None:
    columns = ("problems", "in range", "within 0.3", "too good", "too bad", "width", "9 of 10", "open")
    print(f"{'verdict':21} {'dtype':8}", *(f"{name:>{max(8, len(name))}}" for name in columns))
    ranged = [o for o in seen if o.verdict in RANGED]
    groups = {str(verdict): [o for o in seen if o.verdict is verdict] for verdict in Verdict}
    for title, group in {**groups, "floor or approximate": ranged}.items():
        for dtype in (*DTYPES, None):
            rows = [o for o in group if dtype in (None, o.dtype)]
            if rows:
                name = "all" if dtype is None else str(dtype).removeprefix("torch.")
                print(f"{title:21} {name:8} {_figures(rows)}")
    judging, solving = (sum(getattr(o, name) for o in seen) for name in ("judging_seconds", "solving_seconds"))
    print(f"\nmean time: recovery {solving / len(seen):.2f} s, certificate {judging / len(seen):.2f} s")
    for o in seen:
        if not o.inside and o.verdict is not Verdict.NOT_DETERMINED:
            ends = f"{o.low:.2f} to {o.high:.2f}"
            print(f"missed: {o.verdict}, {ends}, true {o.true:.2f}, {name_of(o.dtype)} {o.about}")
    inside = _share([o.inside for o in ranged])
    floor = [o.right for o in seen if o.verdict is Verdict.FLOOR]
    wrong = [o.right for o in seen if o.verdict is Verdict.EXACT].count(False)
    met = inside >= GOAL and (not floor or _share(floor) >= GOAL) and not wrong
    within = f"{_share(floor):.1f} % within {BAND}" if floor else "none"
    print(
        f"in range: {inside:.1f} %, target {GOAL:.0f} %; {Verdict.FLOOR}: {within}, target {GOAL:.0f} %; "
        f"{Verdict.EXACT}: {wrong} wrong: {'met' if met else 'MISSED'}"
    )


def _figures(rows: list[Outcome]) -> str:
    """A line of the table."""
    told = rows[0].verdict is not Verdict.NOT_DETERMINED
    inside, right = (_share([getattr(o, name) for o in rows]) for name in ("inside", "right"))
    good, bad = sum(told and o.true > o.high for o in rows), sum(told and o.true < o.low for o in rows)
    widths = sorted(o.high - o.low for o in rows if o.best is not None)
    wide = [f"{widths[int(share * len(widths))]:8.2f}" if widths else f"{'-':>8}" for share in (0.5, 0.9)]
    shares = [f"{share:{width}.1f} %" if told else f"{'-':>{width + 2}}" for share, width in ((inside, 6), (right, 8))]
    unbounded = sum(o.best is None and o.worst is not None for o in rows)
    return f"{len(rows):8} {shares[0]} {shares[1]} {good:8} {bad:8} {' '.join(wide)} {unbounded:8}"


def _share(held: list[bool]) -> float:
    """In per cent; of none it is all."""
    return 100 * sum(held) / len(held) if held else 100.0


def plot(seen: list[Outcome], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.2))
    panels = ((torch.bfloat16, torch.float16), (torch.float32,), (torch.float64,))
    for axis, dtypes in zip(axes, panels, strict=True):
        rows = [o for o in seen if o.dtype in dtypes and o.predicted is not None and math.isfinite(o.true)]
        for verdict in (Verdict.APPROXIMATE, Verdict.FLOOR):
            chosen = [o for o in rows if o.verdict is verdict]
            if verdict is Verdict.APPROXIMATE:
                # Where the weight may be exact, the range goes on down for ever.
                lows = [o.predicted - 1 if o.best is None else o.best for o in chosen]
                axis.vlines(
                    [o.predicted for o in chosen],
                    lows,
                    [o.worst for o in chosen],
                    color="sandybrown",
                    linewidth=1,
                    zorder=1,
                )
            outside = [o for o in chosen if not o.inside]
            axis.scatter([o.predicted for o in outside], [o.true for o in outside], s=60, marker="x", color="black")
            axis.scatter(
                [o.predicted for o in chosen],
                [o.true for o in chosen],
                s=9,
                color=COLOURS[verdict],
                label=verdict,
                zorder=2,
            )
        ends = [min(o.predicted for o in rows) - 0.5, max(o.predicted for o in rows) + 0.5]
        axis.fill_between(ends, [e - BAND for e in ends], [e + BAND for e in ends], color="0.9", zorder=0)
        axis.set_title(" and ".join(map(name_of, dtypes)))
        axis.set_xlabel("predicted W-Error")
    axes[0].set_ylabel("true W-Error")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(problems: int = 200, path: str = "docs/certificate.png", first: int = FIRST) -> None:
    torch.set_num_threads(1)
    seen = list(outcomes(problems, first))
    print_table(seen)
    plot(seen, Path(path))


if __name__ == "__main__":
    main(*(kind(word) for kind, word in zip((int, str, int), sys.argv[1:], strict=False)))
