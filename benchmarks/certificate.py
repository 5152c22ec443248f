"""Is the certificate right? What it says of problems whose truth is known, by what kind of problem they are.

    python benchmarks/certificate.py --fit fit             # makes src/detune/certificate/calibration.json of a split
    python benchmarks/certificate.py --split sealed        # the table, of a split that nothing was made from
    python benchmarks/certificate.py --bootstrap 60        # against a parametric bootstrap, on some problems of `check`

Needs what `benchmarks/corpus.py` keeps. `in range` is the share of problems whose true W-Error is in the stated
range, `width` the median length of ranges with two ends, `open` how many have no lower one because the answer may be
exact, `above` and `below` on which side of the range the truth is otherwise. Expected: 95 % in range in every line of
50 ranges or more; no "exact" with an entry that is not the base's; of entries called certain one in a million wrong;
the certificate takes 15 % of the solver's time.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

import torch
from calibrate import calibration
from corpus import REFUSED, TOO_SLOW, Outcome, outcomes
from corpus_problems import SPLITS, draw

from detune.certificate.calibration import Assessment
from detune.certificate.certify import calibrated
from detune.certificate.verdict import BAND, Certificate, Verdict
from detune.methods import Intersect
from detune.numerics.float_grid import spacing
from detune.problem import NotRecoverable, Stack

CALIBRATION = Path(__file__).parents[1] / "src" / "detune" / "certificate" / "calibration.json"
FEWEST = 10
DRAWS = 8
# Normal quantile of the central 95 %.
CENTRAL = 1.96
# Anywhere between numbers the mean square distance to the next is a twelfth: nine tenths of that is a grid's.
ON_GRID = 0.9 / 12


@dataclass(frozen=True)
class Judged:
    """An outcome with what the certificate says of it."""

    outcome: Outcome
    certificate: Certificate

    @property
    def true(self) -> float:
        return -math.inf if self.outcome.true is None else self.outcome.true

    @property
    def low(self) -> float:
        return -math.inf if self.certificate.best_w_error is None else self.certificate.best_w_error

    @property
    def high(self) -> float:
        assert self.certificate.worst_w_error is not None
        return self.certificate.worst_w_error

    @property
    def inside(self) -> bool:
        return self.low <= self.true <= self.high


def judged(found: Sequence[Outcome]) -> Iterator[Judged]:
    """Those outcomes whose certificate has a range."""
    for o in found:
        if o.worst is not None:
            yield Judged(o, Certificate(Verdict.APPROXIMATE, "", 0, None, o.best, o.worst))
        elif o.basis is not None and o.predicted is not None:
            rest = {"reason": "", "hidden_mse": o.hidden_mse}
            assessment = Assessment(o.basis, 10**o.predicted, o.covariates, o.doubts, o.at_floor, **rest)
            yield Judged(o, calibrated(assessment))


STRATA: dict[str, Callable[[Judged], str]] = {
    "verdict": lambda j: str(j.certificate.verdict),
    "bin": lambda j: j.outcome.basis or "derived",
    "kind": lambda j: j.outcome.kind,
    "dtype": lambda j: j.outcome.dtype,
    "entries": lambda j: _class(j.outcome.entries, (1e4, 1e5)),
    "deltas, units in the last place": lambda j: _class(j.outcome.ulps, (0.6, 10, 1000)),
    "models": lambda j: _class(j.outcome.models, (3, 4, 6)),
}


def _class(value: float, ends: Sequence[float]) -> str:
    """The half-open interval that a value is in."""
    for low, high in zip((0.0, *ends), (*ends, math.inf), strict=True):
        if low <= value < high:
            return f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} and more"
    raise AssertionError


def table(split: str) -> None:
    """Print what the certificate says of a split."""
    found = outcomes(split)
    ranged = list(judged(found))
    print(f"{'':36} {'ranges':>6} {'in range':>8} {'width':>6} {'9 of 10':>7} {'open':>5} {'above':>5} {'below':>5}")
    print(f"{'all':36} {_figures(ranged)}")
    for title, of in STRATA.items():
        print(title)
        groups: dict[str, list[Judged]] = {}
        for j in ranged:
            groups.setdefault(of(j), []).append(j)
        for name in sorted(groups):
            if len(groups[name]) >= FEWEST:
                print(f"  {name:34} {_figures(groups[name])}")
    others = [o for o in found if o.basis is None and o.worst is None]
    exact = [o for o in others if o.verdict == Verdict.EXACT]
    print(
        f"\n{len(found)} problems; exact: {len(exact)}, {sum(o.wrong > 0 for o in exact)} of them wrong; "
        "not determined: "
        f"{sum(o.verdict == Verdict.NOT_DETERMINED for o in others)}; refused: "
        f"{sum(o.verdict == REFUSED for o in others)}; too slow: {sum(o.verdict == TOO_SLOW for o in others)}"
    )
    certain, wrong = sum(o.certain for o in found), sum(o.certain_wrong for o in found)
    on_grid = [o for o in found if o.certain or str(o.basis).startswith("grid")]
    right = 1 - sum(o.wrong for o in on_grid) / max(1, sum(o.entries for o in on_grid))
    share = certain / max(1, sum(o.entries for o in on_grid))
    print(
        f"on a grid: {100 * right:.3f} % of entries right, {100 * share:.3f} % called certain; of {certain} called "
        f"certain {wrong} wrong"
    )
    solving, judging = sum(o.solving_seconds for o in found), sum(o.judging_seconds for o in found)
    print(f"core seconds: recovery {solving:.0f}, certificate {judging:.1f} ({100 * judging / solving:.1f} %)")
    for j in ranged:
        if not j.inside:
            o = j.outcome
            print(
                f"missed: {j.certificate.verdict}, {j.low:.2f} to {j.high:.2f}, true {j.true:.2f}, {split} {o.seed} ",
                end="",
            )
            print(f"{o.kind} {o.dtype} {o.about} ulps {o.ulps:.3g} {o.method}")


def _figures(rows: Sequence[Judged]) -> str:
    """A line of the table."""
    inside = 100 * sum(j.inside for j in rows) / len(rows)
    widths = sorted(j.high - j.low for j in rows if math.isfinite(j.low))
    wide = [f"{widths[int(share * len(widths))]:.2f}" if widths else "-" for share in (0.5, 0.9)]
    unbounded, above, below = (
        len(rows) - len(widths),
        sum(j.true > j.high for j in rows),
        sum(j.true < j.low for j in rows),
    )
    return f"{len(rows):6} {inside:6.1f} % {wide[0]:>6} {wide[1]:>7} {unbounded:5} {above:5} {below:5}"


def plot(split: str, path: Path) -> None:
    """Draw true against predicted W-Errors, with the ranges."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ranged = [
        j for j in judged(outcomes(split)) if math.isfinite(j.true) and j.certificate.predicted_w_error is not None
    ]
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(12, 4.2))
    for axis, (title, dtypes) in zip(axes, PANELS.items(), strict=True):
        rows = [j for j in ranged if j.outcome.dtype in dtypes]
        for verdict, colour in COLOURS.items():
            chosen = [j for j in rows if j.certificate.verdict is verdict]
            x = [j.certificate.predicted_w_error for j in chosen]
            lows = [max(j.low, min(j.true, j.high) - 3) for j in chosen]
            axis.vlines(x, lows, [j.high for j in chosen], color=colour, alpha=0.4, linewidth=1, zorder=1)
            axis.scatter(x, [j.true for j in chosen], s=9, color=colour, label=verdict, zorder=2)
        missed = [j for j in rows if not j.inside]
        x = [j.certificate.predicted_w_error for j in missed]
        axis.scatter(x, [j.true for j in missed], s=60, marker="x", color="black", zorder=3)
        axis.set_title(title)
        axis.set_xlabel("predicted W-Error")
    axes[0].set_ylabel("true W-Error")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


PANELS = {
    "bfloat16 and float16": ("bfloat16", "float16"),
    "float32 and mixed": ("float32", "mixed"),
    "float64": ("float64",),
}
COLOURS = {Verdict.APPROXIMATE: "tab:orange", Verdict.FLOOR: "tab:blue"}


def bootstrap(problems: int) -> None:
    """Compare with a parametric bootstrap: fresh roundings added to the recovered models, solved by the closed form."""
    rows = [j for j in judged(outcomes("check")) if str(j.outcome.basis).startswith("least squares")][:problems]
    ours, theirs, widths, near_to = [], [], [], []
    seconds = [0.0, 0.0]
    for j in rows:
        problem = draw("check", j.outcome.seed)
        found = _resampled(Stack.of(problem.models, noise=problem.noise), problem.stored)
        if found is None:
            continue
        middle, spread, taken = found
        ours.append(j)
        near_to.append((abs(j.true - (j.outcome.predicted or 0.0)), abs(j.true - middle)))
        theirs.append(abs(j.true - middle) <= CENTRAL * spread)
        widths.append(2 * CENTRAL * spread)
        seconds = [seconds[0] + taken, seconds[1] + j.outcome.judging_seconds]
    inside = 100 * sum(j.inside for j in ours) / len(ours)
    print(f"{len(ours)} least-squares answers of check, {DRAWS} draws")
    print(f"calibrated: {inside:.1f} % in range, width {median(j.high - j.low for j in ours):.2f}, {seconds[1]:.1f} s")
    print(
        f"bootstrap:  {100 * sum(theirs) / len(theirs):.1f} % in range, width {median(widths):.2f}, {seconds[0]:.1f} s"
    )
    near = [100 * sum(distance <= BAND for distance in each) / len(ours) for each in zip(*near_to, strict=True)]
    print(f"within {BAND} of the prediction: {near[0]:.1f} %, of the bootstrap's mean: {near[1]:.1f} %")


def _resampled(stack: Stack, stored: torch.dtype) -> tuple[float, float, float] | None:
    """Mean and spread of log10 of the error of new recoveries, and the seconds that they take."""
    began = time.process_time()
    solver = Intersect()
    try:
        recovery = solver.solve(stack)
        W = recovery.weight.double()
        generator = torch.Generator().manual_seed(0)
        errors = []
        off = ((W.to(stored).double() - W) / spacing(W, stored)).square().mean()
        on_grid = stored == torch.float64 or float(off) < ON_GRID
        for _ in range(DRAWS):
            # A base within its error of the one found, so that its merges are rounded anew.
            base = W + float(stack.noise.max()) * torch.randn(W.shape, generator=generator, dtype=torch.float64)
            base = base.to(stored).double() if on_grid else base
            merges = [
                (base + M_i.dense().double()).to(W_i.dtype)
                for M_i, W_i in zip(recovery.deltas, stack.matrices, strict=True)
            ]
            again = solver.solve(Stack.of(merges)).weight.to(stored).double()
            errors.append(math.log10(max(float((again - base).square().mean()), 1e-300)))
    except NotRecoverable:
        return None
    return fmean(errors), stdev(errors), time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", nargs="+", choices=SPLITS, metavar="SPLIT")
    parser.add_argument("--split", choices=SPLITS)
    parser.add_argument("--bootstrap", type=int, metavar="PROBLEMS")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.fit:
        rows = [o for split in options.fit for o in outcomes(split)]
        CALIBRATION.write_text(json.dumps(calibration(rows), indent=1) + "\n")
    if options.split:
        table(options.split)
    if options.split and options.plot:
        plot(options.split, options.plot)
    if options.bootstrap:
        bootstrap(options.bootstrap)


if __name__ == "__main__":
    main()
