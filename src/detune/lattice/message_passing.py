"""Sweeps of the interval fit: every `M_i = L R^T` given what its entries say, rows by rows, then columns.

Each entry's posterior sees the `M_i` through the estimates so far; what it adds is a normal measurement of the `M_i`
(`detune.lattice.kernels`). A half sweep makes one Newton step for each row of the L of all models together, given R:
where an entry's W is open it says only how the `M_i` differ, and rows that are fitted model by model, each taking W
from the others, undo a common error in many small steps.

The r numbers of a row need no more than a few hundred entries each, so large matrices are seen through some of their
rows and columns.

Reference:
    Minka, "Expectation propagation for approximate Bayesian inference", UAI 2001 (arXiv 1301.2294);
    Rangan, "Generalized approximate message passing", 2011 (arXiv 1010.5141): the same for many small contributions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from detune.lattice.entries import Entries, row_blocks
from detune.lattice.estimate import Estimate, known, means
from detune.numerics.float_grid import COARSE
from detune.problem.recovery import FEWEST_MODELS

# Conjugate gradients: a model's own equations are close to those of all, so few steps, or a small rest, are enough (any
# number does: `benchmarks/constants.py`).
MOST_STEPS, REST = 24, 0.01
# What divides must stay positive (any small number does).
LEAST = 1e-30
# A squared deviation beyond 25 says no more: the rest is a wild entry (any number does:
# `benchmarks/constants.py`).
MOST_SQUARE = 25.0
# Squares that are this many times what they should be do not come by chance in one row of two thousand: chi-squared of
# one degree, as one entry often says most of what a row's held-out entries say (derived).
LOCKED = 12.0
# What is held to be lacking changes by no more than these factors in a half sweep: it is seen in few entries (any
# number does: `benchmarks/constants.py`).
MOST_RISE, MOST_FALL = 8.0, 0.9
# One or two models hold W only modulo what they differ by, and so do one or two fine ones beside coarse ones: a fit
# that is sure too early locks rows onto wrong points (any number does: `benchmarks/constants.py`).
SLOW_FALL = 0.3
# A fine model that lacks less than 0.03 steps of the grid of W leaves each entry one grid point, and nothing is left to
# lock onto (derived: four standard deviations are a fifth of a step).
RESOLVED = 0.03
# Rows that steps are measured in (any number does).
MEASURED = 16


@dataclass(frozen=True)
class Measurements:
    """Measurements of the `M_i` by the entries of some rows, `(n, rows, in)`, float32; see `detune.lattice.kernels`."""

    gradient: Tensor
    precision: Tensor
    pull: Tensor

    @classmethod
    def of(
        cls, entries: Entries, estimates: Sequence[Estimate], grid: np.ndarray, rows: slice, for_rows: bool
    ) -> "Measurements":
        """Ask the entries of some rows."""
        from detune.lattice.kernels import measure

        low, high = entries.block(rows)
        here = [e.part(rows, slice(None)) for e in estimates]
        found = [np.empty(low.shape, dtype=np.float32) for _ in range(3)]
        measure(low, high, means(here), known(here, grid), for_rows, *found)
        return cls(*map(torch.from_numpy, found))

    def forget(self, entries: tuple[Tensor, ...]) -> None:
        """Leave out entries, given by their rows and columns: they say nothing."""
        rows, columns = entries
        for part in (self.gradient, self.precision, self.pull):
            part[:, rows, columns] = 0

    @property
    def alone(self) -> Tensor:
        """Precisions of each `M_i` with the others as they are."""
        return (self.precision - self.pull.square()).clamp(min=0)


def sweep(
    entries: Entries,
    estimates: Sequence[Estimate],
    grid: np.ndarray,
    held: Tensor | None = None,
    *,
    careful: bool = False,
) -> tuple[Estimate, ...]:
    """New left factors for the right ones, then new right factors for the left ones.

    Args:
        entries: The models.
        estimates: One for each.
        grid: That W lies on, as in `Known`.
        held: Entries that are kept from the fit, `(out, in)`, bool: they tell what the estimates lack. None fits all.
        careful: Whether the fit has begun from nothing: one or two fine models beside coarse ones settle slowly then.
    """
    found = half_sweep(entries, estimates, grid, held, careful=careful)
    turned = [e.transposed for e in found]
    found = half_sweep(entries.transposed, turned, grid, None if held is None else held.mT, careful=careful)
    return tuple(e.transposed for e in found)


def half_sweep(
    entries: Entries,
    estimates: Sequence[Estimate],
    grid: np.ndarray,
    held: Tensor | None = None,
    *,
    careful: bool = False,
) -> tuple[Estimate, ...]:
    """New left factors for the right ones, without directions that are no larger than what they are uncertain by."""
    begun = [e.normalised() for e in estimates]
    return tuple(e.significant() for e in stepped(entries, begun, grid, held, careful=careful))


def stepped(
    entries: Entries,
    estimates: Sequence[Estimate],
    grid: np.ndarray,
    held: Tensor | None = None,
    *,
    careful: bool = False,
) -> tuple[Estimate, ...]:
    """A Newton step for each row of the left factors, and how well its numbers are known then."""
    equations = [_Equations.of(e) for e in estimates]
    seen = [_Lack() for _ in estimates]
    lefts: list[list[Tensor]] = [[] for _ in estimates]
    variances: list[list[Tensor]] = [[] for _ in estimates]
    most_falls = _most_falls(entries, estimates, grid, careful) if held is not None else (0.0,) * len(seen)
    for rows in row_blocks(entries):
        said = Measurements.of(entries, estimates, grid, rows, for_rows=True)
        here = [e.part(rows, slice(None)) for e in estimates]
        if held is not None:
            at = held[rows].nonzero(as_tuple=True)
            wider = [lack.add(said, i, here[i], at) for i, lack in enumerate(seen)]
            said.forget(at)
        for i, (step, variance) in enumerate(_joint_steps(said, here, equations)):
            lefts[i].append(here[i].left + step)
            if held is not None:
                # No row is less certain than rows are large.
                most = here[i].left.square().mean() if here[i].rank else variance.new_zeros(())
                variance = torch.maximum(variance, torch.minimum(variance * wider[i], most))
            variances[i].append(variance)
    return tuple(
        replace(
            e,
            left=torch.cat(left),
            rows=torch.cat(variance),
            lack=e.lack if held is None else lack.update(e.lack, most_fall),
        )
        for e, left, variance, lack, most_fall in zip(estimates, lefts, variances, seen, most_falls, strict=True)
    )


def _most_falls(entries: Entries, estimates: Sequence[Estimate], grid: np.ndarray, careful: bool) -> tuple[float, ...]:
    """By how much the lack of each estimate may fall in a half sweep."""
    if entries.n < FEWEST_MODELS or not careful:
        return (SLOW_FALL if entries.n < FEWEST_MODELS else MOST_FALL,) * entries.n
    low, high = entries.block(slice(0, MEASURED))
    own = [float(np.median(each)) for each in high - low]
    if sum(each <= COARSE * min(own) for each in own) >= FEWEST_MODELS:
        return (MOST_FALL,) * entries.n
    step = float(grid[0] * np.median(np.abs(low[0])))
    return tuple(
        SLOW_FALL if 2 * each < step and e.lack > (RESOLVED * step) ** 2 else MOST_FALL
        for e, each in zip(estimates, own, strict=True)
    )


class _Lack:
    """The part that an estimate lacks, by entries that the fit has not seen.

    Were the variances right, the squared gradient of an entry would be its precision on average.
    """

    def __init__(self) -> None:
        self.squares, self.information, self.uncertain = 0.0, 0.0, 0.0

    def add(self, said: Measurements, model: int, estimate: Estimate, at: tuple[Tensor, ...]) -> Tensor:
        """Take in entries; returns what their rows' variances must be multiplied by, `(rows,)`: a row may be locked."""
        rows, columns = at
        own = estimate.rows[rows] * estimate.right.square().sum(dim=1)[columns]
        variance = own + estimate.left.square().sum(dim=1)[rows] * estimate.columns[columns] + estimate.lack
        precision = (said.precision[model][at] - said.pull[model][at].square()).clamp(min=0)
        # The measurements leave out the rows' own variance; it is noise to these.
        wider = 1 + precision * own
        precision = precision / wider
        squares = (said.gradient[model][at] / wider).square()
        by_row = [torch.zeros(len(estimate.rows)).index_add_(0, rows, each) for each in (squares, precision)]
        ratio = by_row[0] / by_row[1].clamp(min=LEAST)
        self.squares += float(torch.minimum(squares, MOST_SQUARE * precision).sum())
        self.information += float(precision.sum())
        self.uncertain += float((precision * variance).sum())
        return torch.where(ratio > LOCKED, ratio, 1.0)

    def update(self, lack: float, most_fall: float) -> float:
        if not self.information:
            return lack
        ratio = min(self.squares / self.information, 1 + MOST_RISE)
        change = (ratio - 1) * self.uncertain / self.information
        return max(0.0, lack + max(change, -most_fall * lack))


@dataclass(frozen=True)
class _Equations:
    """The part that the rows of one model's equations have in common.

    Attributes:
        right: R, `(in, r)`, with `R^T R = in I`.
        energy: Mean square of each of its rows, `(in,)`.
        prior: Precision of a row's coordinates before anything is seen: rows are as large as they have been.
    """

    right: Tensor
    energy: Tensor
    prior: Tensor

    @classmethod
    def of(cls, estimate: Estimate) -> "_Equations":
        right = estimate.right
        energy = right.square().sum(dim=1) / max(1, estimate.rank)
        return cls(right, energy, 1 / estimate.left.square().mean(dim=0).clamp(min=LEAST))

    def spectrum(self, precision: Tensor) -> tuple[Tensor, Tensor]:
        """Mean variance of each row's coordinates, `(rows,)`, and about what entries add to precisions, `(rows, 1)`."""
        from detune.lattice.inverse_spectrum import inverse_spectrum

        variance, curvature = (precision.new_zeros(len(precision)) for _ in range(2))
        if len(self.prior):
            every = (precision, self.energy, self.prior, variance, curvature)
            inverse_spectrum(*(part.numpy() for part in every))
        return variance, curvature[:, None]


def _joint_steps(
    said: Measurements, estimates: Sequence[Estimate], equations: Sequence[_Equations]
) -> list[tuple[Tensor, Tensor]]:
    """Steps of every L, and the variances of its coordinates, `(rows, r_i)` and `(rows,)`.

    Conjugate gradients on the equations of all models. A row has many more entries than coordinates, and R is
    normalised, so a model's own matrix is close to a multiple of the identity beside the prior: its mean preconditions.
    """
    from detune.lattice.kernels import weigh

    spectra = [of_i.spectrum(alone) for of_i, alone in zip(equations, said.alone, strict=True)]
    inverses = [1 / (of_i.prior + curvature) for of_i, (_, curvature) in zip(equations, spectra, strict=True)]
    y = torch.empty_like(said.precision)

    def preconditioned(x: list[Tensor]) -> list[Tensor]:
        return [inverse * x_i for x_i, inverse in zip(x, inverses, strict=True)]

    def applied(x: list[Tensor]) -> list[Tensor]:
        for x_i, of_i, y_i in zip(x, equations, y, strict=True):
            torch.mm(x_i, of_i.right.mT, out=y_i)
        weigh(said.precision.numpy(), said.pull.numpy(), y.numpy())
        return [y_i @ of_i.right + of_i.prior * x_i for y_i, of_i, x_i in zip(y, equations, x, strict=True)]

    residual = [
        g @ of_i.right - of_i.prior * e.left for g, of_i, e in zip(said.gradient, equations, estimates, strict=True)
    ]
    steps = [torch.zeros_like(r) for r in residual]
    direction = preconditioned(residual)
    size = first = _dot(residual, direction)
    for _ in range(MOST_STEPS):
        unsolved = size > REST**2 * first
        if not bool(unsolved.any()):
            break
        image = applied(direction)
        # Rounding can leave an ill-determined direction no curvature, or a negative one: no step is taken along it.
        curvature = _dot(direction, image)
        along = torch.where(unsolved & (curvature > 0), size / curvature.clamp(min=LEAST), 0.0)
        steps = [x + along * d for x, d in zip(steps, direction, strict=True)]
        residual = [r - along * a for r, a in zip(residual, image, strict=True)]
        toward = preconditioned(residual)
        before, size = size, _dot(residual, toward)
        direction = [t + size / before.clamp(min=LEAST) * d for t, d in zip(toward, direction, strict=True)]
    return [(step, variance) for step, (variance, _) in zip(steps, spectra, strict=True)]


def _dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Row by row over all models, `(rows, 1)`."""
    return torch.stack([(x_i * y_i).sum(dim=1) for x_i, y_i in zip(x, y, strict=True)]).sum(dim=0)[:, None]
