"""The answer once the `M_i` are known on a grid: the base's bits, and which of them are certain."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from detune.lattice.estimate import Estimate
from detune.lattice.intervals import Residual, View, views
from detune.lattice.message_passing import sweep, sweep_each
from detune.numerics.float_grid import spacing
from detune.numerics.random import seeded
from detune.problem.recovery import PredictedError
from detune.problem.stack import Stack

# An entry is certain if the probability of another grid point is below DOUBT with all variances SAFETY times as large.
DOUBT = 1e-9
SAFETY = 4.0
# So many standard deviations to either side are as much.
BEYOND_DOUBT = SAFETY**0.5 * NormalDist().inv_cdf(1 - DOUBT / 2)
# None is in a row or column where the M_i lie outside their intervals by more than this, in squared deviations, summed,
# and by more than so many standard deviations than they do in others.
MOST_STRAIN = 3.0
DEVIATIONS, SCATTER = 4.0, 2.4
# With fewer entries of a line for each of its numbers than this, entries are answered by what has not seen them.
FEW_ENTRIES = 64
FOLDS = 8
# Steps of so many powers of two around 1 are told apart.
EXPONENTS = 128
# Of the number of wrong entries.
DRAWS = 4000
# The share of them that is below the range of the error, and the share above it.
OUTSIDE = 0.01
# What they are outside by counts from this share of a step on.
HARMLESS = 0.01


@dataclass(frozen=True)
class BaseBits:
    """The most likely grid point of every entry.

    Attributes:
        weight: `(out, in)`, compute dtype.
        certain: Where it is certain, `(out, in)`, bool.
        expected: Error that the others are expected to leave.
        foreseeable: The probability that it is within a factor of two of its median.
        relative_residual: As in `Recovery`.
        noise_ratio: As there.
    """

    weight: Tensor
    certain: Tensor
    expected: PredictedError
    foreseeable: float
    relative_residual: float
    noise_ratio: float


@dataclass(frozen=True)
class Part:
    """Entries of the stack, and estimates that answer for them.

    Attributes:
        estimates: One for each model.
        entries: Which entries, `(out, in)`, bool; None is all.
    """

    estimates: Sequence[Estimate]
    entries: Tensor | None = None


def cross_fitted(
    stack: Stack, estimates: Sequence[Estimate], grid: torch.dtype, seed: int
) -> tuple[tuple[Estimate, ...], list[Part]]:
    """Estimates from all entries, and for each entry estimates that have not seen it.

    A row that has few entries for each of its numbers bends to every one of them: what it then says of an entry is
    that entry's own word, and wrong grid points confirm themselves. So each of a few parts of such a matrix is answered
    by a sweep over the others. Where entries are many it makes no difference, and is not done.
    """
    out, width = stack.shape
    widest = max(e.left.shape[1] for e in estimates)
    if min(out, width) >= FEW_ENTRIES * widest:
        whole = sweep(stack, estimates, grid, seed=seed)
        return whole, [Part(whole)]
    drawn = torch.randint(FOLDS, stack.shape, generator=seeded(seed, stack.device), device=stack.device)
    folds = [drawn == fold for fold in range(FOLDS)]
    whole, *others = sweep_each(stack, estimates, grid, [None, *(~fold for fold in folds)], seed)
    return whole, list(map(Part, others, folds))


def base_bits(stack: Stack, parts: Sequence[Part], grid: torch.dtype) -> BaseBits:
    """One pass over the stack for each part.

    Args:
        stack: The models.
        parts: All entries, each once.
        grid: The dtype that W lies on.
    """
    weight = torch.empty(stack.shape, dtype=stack.dtype, device=stack.device)
    certain = torch.ones(stack.shape, dtype=torch.bool, device=stack.device)
    strained_rows, strained_columns = (weight.new_zeros(stack.n, size, dtype=torch.float64) for size in stack.shape)
    wrong = strained_rows.new_zeros(EXPONENTS)
    residual = Residual()
    for part in parts:
        for view in views(stack, part.estimates):
            entries = slice(None) if part.entries is None else part.entries[view.rows]
            block = _Block.of(view, grid, part.entries)
            weight[view.rows][entries] = block.weight[entries].to(weight.dtype)
            certain[view.rows].view(-1)[block.places] = block.certain
            rows, columns = view.lines(block.places)
            strained_rows[:, view.rows].index_add_(1, rows, block.strain)
            strained_columns.index_add_(1, columns, block.strain)
            wrong += block.wrong
            residual.add(stack, view, block.weight, entries)
    # A row of L, or of R, that has locked onto wrong points strains its line of the matrix.
    off_rows, off_columns = _off(strained_rows), _off(strained_columns)
    certain[off_rows] = False
    certain[:, off_columns] = False
    return BaseBits(
        weight,
        certain,
        *_outlook(wrong.cpu(), weight.numel()),
        residual.relative,
        residual.noise_ratio,
    )


def _exponent(step: Tensor) -> Tensor:
    """Of a power of two, as an index."""
    return (torch.frexp(step)[1] + EXPONENTS // 2).clamp(0, EXPONENTS - 1).long()


def _outlook(wrong: Tensor, entries: int) -> tuple[PredictedError, float]:
    """The mean squared error, and the probability to be within a factor of two of its median.

    Wrong entries come one by one, and those with the longest steps weigh most: their numbers are Poisson numbers.

    Args:
        wrong: How many of each step to expect, by its exponent.
        entries: Of the matrix.
    """
    exponents = torch.arange(EXPONENTS, dtype=torch.float64) - EXPONENTS // 2 - 1
    draws = torch.poisson(wrong.expand(DRAWS, -1), generator=seeded(0))
    sums = (draws * torch.exp2(2 * exponents)).sum(dim=1)
    median = float(sums.median())
    near = (sums >= median / 2) & (sums <= 2 * median)
    least, most = (float(sums.quantile(share)) for share in (OUTSIDE, 1 - OUTSIDE))
    return PredictedError(median / entries, least / entries, most / entries), float(near.double().mean())


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
        wrong: How many wrong entries of each step to expect, by the step's exponent, `(EXPONENTS,)`.
    """

    weight: Tensor
    places: Tensor
    certain: Tensor
    strain: Tensor
    wrong: Tensor

    @classmethod
    def of(cls, view: View, grid: torch.dtype, entries: Tensor | None) -> "_Block":
        settled = view.settle(grid, BEYOND_DOUBT)
        if entries is not None:
            settled.open.logical_and_(entries[view.rows])
        weight, places = settled.weight, settled.open.flatten().nonzero().squeeze(1)
        v = view.variance(places)
        # Independent errors of n models leave W more certain than one that they share.
        v = v + len(v) * view.common(places, v)
        found = view.posterior(places, v, grid, least_reach=1)
        certain = found.doubt < DOUBT
        asked = certain.nonzero().squeeze(1)
        careful = view.posterior(places[asked], SAFETY * v[:, asked], grid, least_reach=1)
        certain[asked] = (careful.doubt < DOUBT) & (careful.weight == found.weight[asked])
        weight.view(-1)[places] = found.weight
        low, high, m = view.at(places)
        step = spacing(found.weight, grid)
        outside = torch.maximum(low - found.weight - m, m + found.weight - high).clamp(min=0)
        strain = (outside - HARMLESS * step).clamp(min=0).square() / v
        # An error is a step, or a few of them where W is as good as continuous.
        counts = (found.variance / step.square()).clamp(max=1.0)
        unit = torch.maximum(step, found.variance.sqrt())
        wrong = counts.new_zeros(EXPONENTS).index_add_(0, _exponent(unit), counts)
        return cls(weight, places, certain, strain, wrong)
