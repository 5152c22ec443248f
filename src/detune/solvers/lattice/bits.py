"""The answer once the `M_i` are known on a grid: the base's bits, and which of them are certain."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from detune.solvers.grid import spacing
from detune.solvers.lattice.estimate import Estimate
from detune.solvers.lattice.view import View, views
from detune.solvers.stack import Stack

# An entry is certain if the probability of another grid point is below DOUBT with all variances SAFETY times as large.
DOUBT = 1e-9
SAFETY = 4.0
# So many standard deviations to either side are as much.
BEYOND_DOUBT = SAFETY**0.5 * NormalDist().inv_cdf(1 - DOUBT / 2)
# None is in a row or column where the M_i lie outside their intervals by more than this, in squared deviations, summed,
# and by more than so many standard deviations than they do in others.
MOST_STRAIN = 3.0
DEVIATIONS, SCATTER = 4.0, 2.4
# What they are outside by counts from this share of a step on.
HARMLESS = 0.01


@dataclass(frozen=True)
class BaseBits:
    """The most likely grid point of every entry.

    Attributes:
        weight: `(out, in)`, compute dtype.
        certain: Where it is certain, `(out, in)`, bool.
        expected_mse: Mean squared error per entry that the others are expected to leave.
        relative_residual: As in `Recovery`.
        noise_ratio: As there.
    """

    weight: Tensor
    certain: Tensor
    expected_mse: float
    relative_residual: float
    noise_ratio: float


def base_bits(stack: Stack, estimates: Sequence[Estimate], grid: torch.dtype) -> BaseBits:
    """One pass over the stack.

    Args:
        stack: The models.
        estimates: One for each.
        grid: The dtype that W lies on.
    """
    weight = torch.empty(stack.shape, dtype=stack.dtype, device=stack.device)
    certain = torch.ones(stack.shape, dtype=torch.bool, device=stack.device)
    strained_rows, strained_columns = (weight.new_zeros(stack.n, size, dtype=torch.float64) for size in stack.shape)
    expected = residual = spread = rounding = 0.0
    for view in views(stack, estimates):
        block = _Block.of(view, grid)
        weight[view.rows] = block.weight
        certain[view.rows].view(-1)[block.places] = block.certain
        rows, columns = view.lines(block.places)
        strained_rows[:, view.rows].index_add_(1, rows, block.strain)
        strained_columns.index_add_(1, columns, block.strain)
        expected += block.expected
        stored = torch.stack([W_i[view.rows].to(stack.device, torch.float64) for W_i in stack.matrices])
        spread += float((stored - stored.mean(dim=0)).square().sum())
        residual += float(stored.sub_(block.weight).sub_(view.m).square().sum())
        rounding += float((view.high - view.low).square().sum()) / 12
    # A row of L, or of R, that has locked onto wrong points strains its line of the matrix.
    certain[_off(strained_rows)] = False
    certain[:, _off(strained_columns)] = False
    return BaseBits(
        weight,
        certain,
        expected / weight.numel(),
        (residual / spread) ** 0.5 if spread > 0 else 0.0,
        (residual / rounding) ** 0.5,
    )


def _off(strained: Tensor) -> Tensor:
    """Which lines are strained more than the others, in any model, `(lines,)`.

    What a line was not fitted to strains it a little: that is chance, a sum of rare contributions, whose variance is
    some `SCATTER` times its mean.
    """
    usual = strained.median(dim=1, keepdim=True).values
    return (strained > MOST_STRAIN + usual + DEVIATIONS * (SCATTER * usual).sqrt()).any(dim=0)


@dataclass(frozen=True)
class _Block:
    """The answer in some rows.

    Attributes:
        weight: `(rows, in)`, float64.
        places: The entries that had to be looked at, in the flattened rows; all others are certain.
        certain: Which of these are, `(entries,)`, bool.
        strain: By how many squared deviations each `M_i` lies outside its interval there, `(n, entries)`.
        expected: Sum of the squared errors to expect.
    """

    weight: Tensor
    places: Tensor
    certain: Tensor
    strain: Tensor
    expected: float

    @classmethod
    def of(cls, view: View, grid: torch.dtype) -> "_Block":
        settled = view.settle(grid, BEYOND_DOUBT)
        weight, places = settled.weight, settled.open.flatten().nonzero().squeeze(1)
        v = view.variance(places)
        found = view.posterior(places, v, grid, least_reach=1)
        certain = found.doubt < DOUBT
        asked = certain.nonzero().squeeze(1)
        careful = view.posterior(places[asked], SAFETY * v[:, asked], grid, least_reach=1)
        certain[asked] = (careful.doubt < DOUBT) & (careful.weight == found.weight[asked])
        weight.view(-1)[places] = found.weight
        low, high, m = view.at(places)
        outside = torch.maximum(low - found.weight - m, m + found.weight - high).clamp(min=0)
        strain = (outside - HARMLESS * spacing(found.weight, grid)).clamp(min=0).square() / v
        return cls(weight, places, certain, strain, float(found.variance.sum()))
