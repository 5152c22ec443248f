"""Sweeps of the interval fit: every `M_i = L R^T` given the posterior of its entries, rows by rows, then columns.

The posterior of an entry sees each `M_i` through its estimate `N(m, v)`; what it adds to that is a measurement, whose
gradient and precision are the score's: `(m_new - m) / v` and `(1 - v_new / v) / v`. A half sweep makes one Newton step
for each row of the L of all models together, given R (`detune.lattice.joint_rows`). That is generalised approximate
message passing (Rangan 2011, arXiv 1010.5141) with the low-rank factors as its linear part.

The r numbers of a row need no more than a few hundred entries each, so wide matrices are seen through some of their
columns: a sweep costs in proportion to `out + in`, not to their product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detune.lattice.estimate import Estimate
from detune.lattice.intervals import Settled, View, views
from detune.lattice.joint_rows import LEAST_SHARE, Measurements, fit_rows, normalised
from detune.lattice.posterior import SLACK
from detune.lattice.truncated_normal import one_sided, truncated_normal
from detune.numerics.random import seeded
from detune.problem.stack import Stack

# A row of L is fitted to so many entries, or so many for each of its numbers, if there are more.
MOST_SEEN, SEEN_PER_RANK = 1024, 48
# An end of its interval that is so many standard deviations off says nothing of an M_i.
SILENT = 4.5


def sweep(
    stack: Stack, estimates: Sequence[Estimate], grid: torch.dtype | None, used: Tensor | None = None, seed: int = 0
) -> tuple[Estimate, ...]:
    """New left factors for the right ones, then new right factors for the left ones.

    Args:
        stack: The models.
        estimates: One for each.
        grid: The dtype that W lies on; None is no grid.
        used: Which entries to use, `(out, in)`, bool; None is all.
        seed: Of the columns, and rows, that are looked at.
    """
    return next(sweep_each(stack, estimates, grid, [used], seed))


def sweep_each(
    stack: Stack, estimates: Sequence[Estimate], grid: torch.dtype | None, uses: Sequence[Tensor | None], seed: int = 0
) -> Iterator[tuple[Estimate, ...]]:
    """A sweep from the same start for each of several choices of entries; what all entries say first is found once.

    Args:
        stack: As in `sweep`.
        estimates: As there.
        grid: As there.
        uses: As `used` there, each.
        seed: As there.
    """
    for left, used in zip(half_sweep(stack, estimates, grid, uses, seed), uses, strict=True):
        turned = [None if used is None else used.mT]
        (found,) = half_sweep(stack.transposed, [e.transposed for e in left], grid, turned, seed)
        yield tuple(e.transposed for e in found)


def half_sweep(
    stack: Stack,
    estimates: Sequence[Estimate],
    grid: torch.dtype | None,
    uses: Sequence[Tensor | None] = (None,),
    seed: int = 0,
) -> list[tuple[Estimate, ...]]:
    """New left factors for the right ones, row by row, for each choice of entries."""
    estimates = tuple(map(normalised, estimates))
    seen = _seen(stack, estimates, seed)
    looked_at = estimates
    if seen is not None:
        stack = replace(stack, matrices=tuple(W_i.index_select(1, seen.to(W_i.device)) for W_i in stack.matrices))
        looked_at = tuple(e.given_columns(seen) for e in estimates)
        uses = [None if used is None else used[:, seen] for used in uses]
    measured = ((view.rows, _measurements(view, grid)) for view in views(stack, looked_at))
    return fit_rows(estimates, seen, measured, uses)


def _measurements(view: View, grid: torch.dtype | None) -> Measurements:
    """What the entries say."""
    gradient, precision, pull = (torch.zeros_like(view.m) for _ in range(3))
    if grid is None:
        places = torch.arange(view.m[0].numel(), device=view.m.device)
    else:
        settled = view.settle(grid, SLACK)
        _measure_settled(view, settled, precision.view(-1), gradient.view(-1))
        places = settled.open.flatten().nonzero().squeeze(1)
    v = view.variance(places)
    _, _, m = view.at(places)
    found = view.posterior(places, v, grid, common=view.common(places, v))
    said = Measurements.of(found, m, v)
    for whole, part in ((gradient, said.gradient), (precision, said.precision), (pull, said.pull)):
        whole.flatten(start_dim=1)[:, places] = part
    return Measurements(gradient, precision, pull)


def _measure_settled(view: View, settled: Settled, precision: Tensor, gradient: Tensor) -> None:
    """Fill in what the entries with one grid point say: only those near an end of their interval say anything."""
    above = settled.weight + view.m
    to_high = view.high - above
    to_low = above.sub_(view.low)
    near = (torch.minimum(to_low, to_high) < SILENT * view.deviation) & ~settled.open
    places = near.flatten().nonzero().squeeze(1)
    v = view.variance_of(places)
    std = v.sqrt()
    below, above = to_low.flatten()[places] / std, to_high.flatten()[places] / std
    shift, share = one_sided(torch.minimum(below, above))
    shift = torch.where(below < above, shift, -shift)
    both = (torch.maximum(below, above) < SILENT).nonzero().squeeze(1)
    if len(both):
        moments = truncated_normal(-below[both], (below + above)[both])
        shift[both], share[both] = moments.mean, 1 - moments.variance
    precision[places] = share.clamp_(min=LEAST_SHARE) / v
    gradient[places] = shift / std


def _seen(stack: Stack, estimates: Sequence[Estimate], seed: int) -> Tensor | None:
    """The columns that a half sweep looks at; None is all."""
    columns = stack.shape[1]
    enough = max(MOST_SEEN, SEEN_PER_RANK * max(e.left.shape[1] for e in estimates))
    if columns <= enough:
        return None
    generator = seeded(seed, stack.device)
    return torch.randperm(columns, generator=generator, device=stack.device)[:enough].sort().values
