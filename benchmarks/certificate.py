"""Is the certificate right? Its prediction against the truth, on random problems whose truth is known.

    python benchmarks/certificate.py [PROBLEMS] [PNG]

Prints the share of predictions within 0.3 for each verdict, and draws all of them.
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
from detune.solvers import Auto, NotRecoverable, Stack
from detune.solvers.certificate import Verdict, certify
from detune.solvers.stack import storage_variance

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BAND = 0.3
# Thresholds were set on the seeds below.
FIRST = 2000
SOLVER = Auto()


@dataclass(frozen=True)
class Problem:
    """What was drawn.

    Attributes:
        W: The base, `(out, in)`, float64.
        models: `round(W + M_i)`, `(n, out, in)`.
        about: In words.
    """

    W: Tensor
    models: Tensor
    about: str


@dataclass(frozen=True)
class Outcome:
    """A prediction and what came of it; W-Errors are of the weight as stored.

    Attributes:
        verdict: The certificate's.
        dtype: Storage dtype.
        predicted: Predicted W-Error; None where there is no telling.
        true: W-Error; `-inf` where every entry is right.
        solving_seconds: Time of the recovery.
        judging_seconds: Time of the certificate.
        about: The problem.
    """

    verdict: Verdict
    dtype: torch.dtype
    predicted: float | None
    true: float
    solving_seconds: float
    judging_seconds: float
    about: str

    @property
    def right(self) -> bool:
        if self.verdict is Verdict.EXACT:
            return self.true == -math.inf
        return self.predicted is not None and abs(self.predicted - self.true) <= BAND


def draw(seed: int) -> Problem:
    """A problem: shapes 40 to 256, ranks 1 to 16, 3 to 8 models, deltas of 3 to 10,000 times the storage noise.

    Half of the bases lie on their dtype's grid, as published ones do; in float64 all do.
    """
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    side = pick.choice([40, 64, 96, 128])
    other = min(256, int(side * pick.choice([1, 1.5, 2, 3])))
    shape = pick.choice([(side, other), (other, side)])
    most = min(16, min(shape) // 3, max(shape) // 4)
    n = pick.randint(3, 8)
    ranks = [pick.randint(1, most)] * n if pick.random() < 0.5 else [pick.randint(1, most) for _ in range(n)]
    dtype, decay, shared = pick.choice(DTYPES), pick.choice([0, 2, 4, 7]), pick.choice([0, 0.5, 0.9, 0.97, 0.99])
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    on_grid = pick.random() < 0.5
    W = W.to(dtype).double() if on_grid else W
    times = 10 ** pick.uniform(math.log10(3), 4)
    size = min(30.0, times * float(storage_variance(W.to(dtype)).mean().sqrt()))
    common = torch.randn(shape[1], max(ranks), generator=generator, dtype=torch.float64)
    models = []
    for r in ranks:
        own = torch.randn(shape[1], r, generator=generator, dtype=torch.float64)
        V = torch.linalg.qr(shared**0.5 * common[:, :r] + (1 - shared) ** 0.5 * own)[0]
        U = torch.linalg.qr(torch.randn(shape[0], r, generator=generator, dtype=torch.float64))[0]
        M_i = (U * torch.exp(torch.linspace(0, -decay, r, dtype=torch.float64))) @ V.mT
        models.append((W + M_i * (size * math.sqrt(W.numel() / r))).to(dtype))
    grid = "on the grid" if on_grid else "off the grid"
    about = f"seed {seed} {shape} ranks {ranks} decay {decay} shared {shared} deltas {times:.0f} {grid}"
    return Problem(W, torch.stack(models), about)


def outcomes(problems: int) -> Iterator[Outcome]:
    for seed in range(FIRST, FIRST + problems):
        problem = draw(seed)
        stack = Stack.of(problem.models)
        began = time.perf_counter()
        try:
            recovery = SOLVER.solve(stack)
        except NotRecoverable:
            continue
        solved = time.perf_counter()
        certificate = certify(stack, recovery, stored=problem.models.dtype)
        judged = time.perf_counter()
        true = w_error(recovery.weight.to(problem.models.dtype), problem.W)
        verdict, predicted = certificate.verdict, certificate.predicted_w_error
        print(f"\r{seed + 1 - FIRST} of {problems}", end="", file=sys.stderr, flush=True)
        yield Outcome(verdict, problem.models.dtype, predicted, true, solved - began, judged - solved, problem.about)


def print_table(seen: list[Outcome]) -> None:
    print(f"{'verdict':22} {'dtype':10} {'problems':>8} {'within 0.3':>10} {'too good':>8} {'too bad':>8}")
    for verdict in Verdict:
        for dtype in (*DTYPES, None):
            rows = [o for o in seen if o.verdict is verdict and dtype in (None, o.dtype)]
            if not rows:
                continue
            off = [(o.predicted or 0.0) - o.true for o in rows if not o.right and o.predicted is not None]
            name = "all" if dtype is None else str(dtype).removeprefix("torch.")
            within = 100 * sum(o.right for o in rows) / len(rows)
            good, bad = sum(x < 0 for x in off), sum(x > 0 for x in off)
            print(f"{verdict:22} {name:10} {len(rows):8} {within:8.1f} % {good:8} {bad:8}")
    judging, solving = (sum(getattr(o, name) for o in seen) for name in ("judging_seconds", "solving_seconds"))
    print(f"\nmean time: recovery {solving / len(seen):.2f} s, certificate {judging / len(seen):.2f} s")
    for o in seen:
        if o.verdict is Verdict.FLOOR and not o.right:
            print(f"missed: predicted {o.predicted:.2f}, true {o.true:.2f}, {o.dtype} {o.about}")


def plot(seen: list[Outcome], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.2))
    panels = ((torch.bfloat16, torch.float16), (torch.float32,), (torch.float64,))
    for axis, dtypes in zip(axes, panels, strict=True):
        rows = [o for o in seen if o.dtype in dtypes and o.predicted is not None and math.isfinite(o.true)]
        for verdict, colour in ((Verdict.APPROXIMATE, "tab:orange"), (Verdict.FLOOR, "tab:blue")):
            chosen = [o for o in rows if o.verdict is verdict]
            axis.scatter([o.predicted for o in chosen], [o.true for o in chosen], s=9, color=colour, label=verdict)
        ends = [min(o.predicted for o in rows) - 0.5, max(o.predicted for o in rows) + 0.5]
        axis.fill_between(ends, [e - BAND for e in ends], [e + BAND for e in ends], color="0.9", zorder=0)
        axis.set_title(" and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes))
        axis.set_xlabel("predicted W-Error")
    axes[0].set_ylabel("true W-Error")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(problems: int = 300, path: str = "docs/certificate.png") -> None:
    torch.set_num_threads(1)
    seen = list(outcomes(problems))
    print_table(seen)
    plot(seen, Path(path))


if __name__ == "__main__":
    main(*(kind(word) for kind, word in zip((int, str), sys.argv[1:], strict=False)))
