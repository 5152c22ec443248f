"""Is the certificate right? Its prediction against the truth, on random problems whose truth is known.

    python benchmarks/certificate.py [PROBLEMS] [PNG] [FIRST]

Prints the share of predictions within 0.3 for each verdict, and draws all of them. Expected: 95 % where the verdict is
"to the storage floor". Problems have seeds from 4000 on: solvers and thresholds were made by what was seen at those
below.
"""

import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from detune.metrics import w_error
from detune.solvers import Auto, NotRecoverable, OnGrid, Stack
from detune.solvers.certificate import Verdict, certify
from detune.solvers.grid import name_of
from detune.solvers.stack import storage_variance

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
# Solvers and thresholds were made by what was seen at seeds below.
FIRST = 4000
SOLVER, ON_GRID = Auto(), OnGrid()


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
    true: float
    wrong: int
    times: float
    solving_seconds: float
    judging_seconds: float
    about: str

    @property
    def right(self) -> bool:
        if self.expected is None or math.isinf(self.expected):
            return self.expected == self.true
        return abs(self.expected - self.true) <= BAND

    @property
    def expected(self) -> float | None:
        """The prediction; `-inf` where no error is expected, None where there is no telling."""
        return -math.inf if self.predicted is None and self.verdict is not Verdict.NOT_DETERMINED else self.predicted


def draw(seed: int, coarse: bool = False) -> Problem:
    """A problem: shapes 40 to 256, ranks 1 to 16, 3 to 8 models, or from one on where the bits can come back.

    Half of the bases lie on their dtype's grid, as published ones do; in float64 all do. Deltas are 3 to 10,000 times
    the storage noise.

    Args:
        seed: Of everything.
        coarse: Whether the base is in half precision and the merges in float32: there the bits can come back. Deltas
            are 0.1 to 1000 times the rounding errors of the base's dtype; to 10 times those of one or two models.
    """
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    side = pick.choice([40, 64, 96, 128])
    other = min(256, int(side * pick.choice([1, 1.5, 2, 3])))
    shape = pick.choice([(side, other), (other, side)])
    most = min(16, min(shape) // 3, max(shape) // 4)
    n = pick.randint(1 if coarse else 3, 8)
    ranks = [pick.randint(1, most)] * n if pick.random() < 0.5 else [pick.randint(1, most) for _ in range(n)]
    dtype, decay, shared = (
        pick.choice(HALVES if coarse else DTYPES),
        pick.choice([0, 2, 4, 7]),
        pick.choice([0, 0.5, 0.9, 0.97, 0.99]),
    )
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    on_grid = coarse or pick.random() < 0.5
    W = W.to(dtype).double() if on_grid else W
    times = 10 ** (pick.uniform(-1, 3 if n > 2 else 1) if coarse else pick.uniform(math.log10(3), 4))
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


def outcomes(problems: int, first: int, coarse: bool = False) -> Iterator[Outcome]:
    refused = 0
    for seed in range(first, first + problems):
        problem = draw(seed, coarse)
        stack = Stack.of(problem.models)
        began = time.perf_counter()
        try:
            recovery = (SOLVER if stack.n > 2 else ON_GRID).solve(stack)
        except NotRecoverable:
            refused += 1
            continue
        solved = time.perf_counter()
        certificate = certify(stack, recovery, stored=problem.models.dtype)
        judged = time.perf_counter()
        weight = recovery.weight.to(problem.models.dtype)
        true, wrong = w_error(weight, problem.W), int(weight.double().ne(problem.W).sum())
        verdict, predicted = certificate.verdict, certificate.predicted_w_error
        print(f"\r{seed + 1 - first} of {problems}", end="", file=sys.stderr, flush=True)
        yield Outcome(
            verdict,
            problem.models.dtype,
            predicted,
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
    print(f"{'verdict':22} {'dtype':10} {'problems':>8} {'within 0.3':>10} {'too good':>8} {'too bad':>8}")
    for verdict in Verdict:
        for dtype in (*DTYPES, None):
            rows = [o for o in seen if o.verdict is verdict and dtype in (None, o.dtype)]
            if not rows:
                continue
            off = [o.expected - o.true for o in rows if not o.right and o.expected is not None]
            name = "all" if dtype is None else str(dtype).removeprefix("torch.")
            within = 100 * sum(o.right for o in rows) / len(rows)
            good, bad = sum(x < 0 for x in off), sum(x > 0 for x in off)
            print(f"{verdict:22} {name:10} {len(rows):8} {within:8.1f} % {good:8} {bad:8}")
    judging, solving = (sum(getattr(o, name) for o in seen) for name in ("judging_seconds", "solving_seconds"))
    print(f"\nmean time: recovery {solving / len(seen):.2f} s, certificate {judging / len(seen):.2f} s")
    for o in seen:
        if o.verdict in (Verdict.EXACT, Verdict.FLOOR) and not o.right:
            print(f"missed: predicted {o.expected:.2f}, true {o.true:.2f}, {o.dtype} {o.about}")
    floor = [o.right for o in seen if o.verdict is Verdict.FLOOR]
    exact = [o.right for o in seen if o.verdict is Verdict.EXACT]
    share = 100 * sum(floor) / len(floor) if floor else None
    met = all(exact) and (share is None or share >= GOAL)
    said = "none" if share is None else f"{share:.1f} %, target {GOAL:.0f} %"
    wrong = f"{exact.count(False)} wrong of {len(exact)}"
    print(f"{Verdict.FLOOR}: {said}; {Verdict.EXACT}: {wrong}: {'met' if met else 'MISSED'}")


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
            axis.scatter(
                [o.predicted for o in chosen], [o.true for o in chosen], s=9, color=COLOURS[verdict], label=verdict
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
