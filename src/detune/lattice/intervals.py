"""The stack as intervals, some rows at a time, and which of its entries there is anything to say about.

Once the `M_i` are known to a fraction of a step, most entries leave W one grid point, and their intervals reach so far
beyond `g + M_i` that they say nothing new of the `M_i`. They are told by a few comparisons; only the others are worth
their posterior.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from detune.lattice.estimate import LEAST_SIZE, Estimate
from detune.lattice.posterior import Posterior, posterior
from detune.numerics.float_grid import interval, nearest, spacing
from detune.problem.stack import Stack

# Entries of all models that are worked on at a time: what is computed of them stays in the processor's cache.
BLOCK_ENTRIES = 1 << 17


@dataclass(frozen=True)
class Settled:
    """The entries of some rows, told apart.

    Attributes:
        weight: The grid point next to the middle of what is feasible, `(rows, in)`, float64: W where it is settled.
        open: Where it is not, `(rows, in)`, bool.
    """

    weight: Tensor
    open: Tensor


@dataclass(frozen=True)
class View:
    """Some rows of the stack as intervals, with what the estimates say of them.

    A place is an index into the flattened rows, of one model or of all models one after the other.

    Attributes:
        rows: Which rows.
        low: Lower ends of the intervals, `(n, rows, in)`, float64.
        high: Upper ends.
        m: Means of the `M_i`.
        row_variance: What rows add to the variances of the `M_i`, `(n, 2, rows)`; see `Estimate`.
        column_variance: What columns add, `(n, 2, in)`.
        shared_rows: Of the variances, the multiples that models share, `(n, rows)`; see `Estimate`.
        shared_columns: `(n, in)`; the two are added.
    """

    rows: slice
    low: Tensor
    high: Tensor
    m: Tensor
    row_variance: Tensor
    column_variance: Tensor
    shared_rows: Tensor
    shared_columns: Tensor

    @classmethod
    def of(cls, stack: Stack, estimates: Sequence[Estimate], rows: slice) -> "View":
        """Read some rows."""
        ends = [interval(W_i[rows].to(stack.device)) for W_i in stack.matrices]
        return cls(
            rows,
            torch.stack([low for low, _ in ends]),
            torch.stack([high for _, high in ends]),
            torch.stack([estimate.mean(rows) for estimate in estimates]),
            torch.stack([estimate.scale * estimate.rows[:, rows] for estimate in estimates]),
            torch.stack([estimate.columns.flip(0) for estimate in estimates]),
            torch.stack([estimate.shared_rows[rows] for estimate in estimates]),
            torch.stack([estimate.shared_columns for estimate in estimates]),
        )

    @cached_property
    def deviation(self) -> Tensor:
        """A bound for the standard deviation of each `M_i` in each row, `(n, rows, 1)`."""
        variance = (self.row_variance * self.column_variance.amax(dim=2, keepdim=True)).sum(dim=1)
        variance *= 1 + self.shared_rows + self.shared_columns.amax(dim=1, keepdim=True)
        return variance.clamp(min=LEAST_SIZE).sqrt()[..., None]

    def settle(self, grid: torch.dtype, reach: float) -> Settled:
        """Tell the entries that have one grid point, on which all models agree, from the others.

        Args:
            grid: The dtype that W lies on.
            reach: A grid point is alone if the intervals rule its neighbours out by so many standard deviations.
        """
        low, high = (self.low - self.m).amax(dim=0), (self.high - self.m).amin(dim=0)
        weight = nearest((low + high) / 2, grid)
        slack = reach * self.deviation.amax(dim=0)
        # The next point towards zero is the nearest: at a power of two by half of the step.
        step = spacing(weight.abs() * (1 - torch.finfo(grid).eps / 4), grid)
        alone = (low <= weight) & (weight <= high) & (weight - step < low - slack) & (weight + step > high + slack)
        return Settled(weight, alone.logical_not_())

    def variance(self, places: Tensor) -> Tensor:
        """Of all `M_i`, `(n, entries)`."""
        rows, columns = self.lines(places)
        variance = (self.row_variance[..., rows] * self.column_variance[..., columns]).sum(dim=1)
        return variance.clamp(min=LEAST_SIZE)

    def variance_of(self, places: Tensor) -> Tensor:
        """Of the `M_i` of single models, what they share with it, `(entries,)`; places run over all models."""
        rows, columns = self.lines(places)
        models, rows = rows // self.m.shape[1], rows % self.m.shape[1]
        variance = (self.row_variance[models, :, rows] * self.column_variance[models, :, columns]).sum(dim=1)
        variance *= 1 + self.shared_rows[models, rows] + self.shared_columns[models, columns]
        return variance.clamp(min=LEAST_SIZE)

    def common(self, places: Tensor, v: Tensor) -> Tensor:
        """Variance of the error that all `M_i` share, given their own, `(entries,)`."""
        rows, columns = self.lines(places)
        shared: Tensor = ((self.shared_rows[:, rows] + self.shared_columns[:, columns]) * v).amin(dim=0)
        return shared

    def posterior(
        self,
        places: Tensor,
        v: Tensor,
        grid: torch.dtype | None,
        least_reach: int = 0,
        common: Tensor | None = None,
    ) -> Posterior:
        """See `detune.lattice.posterior.posterior`.

        Args:
            places: Which entries, `(entries,)`.
            v: Variances of the `M_i` there, `(n, entries)`.
            grid: As there.
            least_reach: As there.
            common: As there.
        """
        return posterior(*self.at(places), v, grid, least_reach, common)

    def at(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`low`, `high` and `m` of single entries, `(n, entries)` each."""
        low, high, m = (t.flatten(start_dim=1).index_select(1, places) for t in (self.low, self.high, self.m))
        return low, high, m

    def lines(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The rows, counted from the view's first, and the columns of places."""
        width = self.low.shape[2]
        return torch.div(places, width, rounding_mode="floor"), places % width


def views(stack: Stack, estimates: Sequence[Estimate]) -> Iterator[View]:
    """The whole stack, some rows at a time."""
    out, columns = stack.shape
    height = max(1, BLOCK_ENTRIES // (stack.n * columns))
    for start in range(0, out, height):
        yield View.of(stack, estimates, slice(start, min(start + height, out)))


@dataclass
class Residual:
    """What an answer leaves of the models, added up view by view: the figures of a `Recovery`."""

    squares: float = 0.0
    spread: float = 0.0
    rounding: float = 0.0

    def add(self, stack: Stack, view: View, weight: Tensor, entries: Tensor | slice = slice(None)) -> None:
        """Take in some rows.

        Args:
            stack: The models.
            view: Of the rows.
            weight: The answer there, `(rows, in)`.
            entries: Which of them count, `(rows, in)`, bool; all by default.
        """
        stored = torch.stack([W_i[view.rows].to(stack.device, torch.float64) for W_i in stack.matrices])
        self.spread += float((stored - stored.mean(dim=0))[:, entries].square().sum())
        self.squares += float((stored - weight - view.m)[:, entries].square().sum())
        self.rounding += float((view.high - view.low)[:, entries].square().sum()) / 12

    @property
    def relative(self) -> float:
        """`Recovery.relative_residual`."""
        return math.sqrt(self.squares / self.spread) if self.spread > 0 else 0.0

    @property
    def noise_ratio(self) -> float:
        """`Recovery.noise_ratio`."""
        return math.sqrt(self.squares / self.rounding)
