"""Sweeps of the interval fit: every `M_i = L R^T` given the posterior of its entries, rows by rows, then columns.

The posterior of an entry sees each `M_i` through its estimate `N(m, v)`; what it adds to that is a measurement, whose
gradient and precision are the score's: `(m_new - m) / v` and `(1 - v_new / v) / v`. A half sweep makes one Newton step
for each row of the L of all models together, given R (`detune.solvers.lattice.joint`). That is generalised approximate
message passing (Rangan 2011, arXiv 1010.5141) with the low-rank factors as its linear part.

The r numbers of a row need no more than a few hundred entries each, so wide matrices are seen through some of their
columns: a sweep costs in proportion to `out + in`, not to their product.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detune.solvers.lattice.estimate import LEAST_SIZE, Estimate
from detune.solvers.lattice.joint import Measurements, joint_steps
from detune.solvers.lattice.posterior import SLACK
from detune.solvers.lattice.truncated import one_sided, truncated_normal
from detune.solvers.lattice.view import Settled, View, views
from detune.solvers.random import seeded
from detune.solvers.stack import Stack

# A row of L is fitted to so many entries, or so many for each of its numbers, if there are more.
MOST_SEEN, SEEN_PER_RANK = 1024, 48
# Of what an entry says of all M_i together a little is left, whatever W.
MOST_PULL = 0.999
# A measurement that says nothing still has a precision: a line without any would leave its factors free.
LEAST_SHARE = 1e-9
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
    estimates = half_sweep(stack, estimates, grid, used, seed)
    turned = half_sweep(
        stack.transposed, [e.transposed for e in estimates], grid, None if used is None else used.mT, seed
    )
    return tuple(e.transposed for e in turned)


def half_sweep(
    stack: Stack, estimates: Sequence[Estimate], grid: torch.dtype | None, used: Tensor | None = None, seed: int = 0
) -> tuple[Estimate, ...]:
    """New left factors for the right ones, row by row."""
    estimates = tuple(map(_normalised, estimates))
    seen = _seen(stack, estimates, seed)
    looked_at = estimates
    if seen is not None:
        stack = replace(stack, matrices=tuple(W_i.index_select(1, seen.to(W_i.device)) for W_i in stack.matrices))
        looked_at = tuple(e.given_columns(seen) for e in estimates)
        used = None if used is None else used[:, seen]
    outer = [(e.right[:, :, None] * e.right[:, None, :]).flatten(start_dim=1) for e in looked_at]
    # Rows of L are as large as they have been: what the data leave open stays near zero.
    prior = [1 / e.left.square().mean(dim=0).clamp(min=LEAST_SIZE) for e in estimates]
    right = [e.right for e in looked_at]
    left = [torch.empty_like(e.left) for e in estimates]
    spread = [torch.empty_like(e.rows[0]) for e in estimates]
    for view in views(stack, looked_at):
        measured = _measurements(view, grid, None if used is None else used[view.rows])
        factors = [
            torch.linalg.cholesky((alone @ o).unflatten(1, (len(p), len(p))) + p.diag())
            for alone, o, p in zip(measured.alone, outer, prior, strict=True)
        ]
        start = [e.left[view.rows] for e in estimates]
        steps = joint_steps(measured, start, right, prior, factors)
        for i, (L, step, factor) in enumerate(zip(start, steps, factors, strict=True)):
            left[i][view.rows] = L + step
            spread[i][view.rows] = torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2).mean(dim=1)
    return tuple(
        replace(e, left=L, rows=torch.stack([q, e.rows[1]]), columns=torch.stack([e.columns[0], _profile(e.right)]))
        for e, L, q in zip(estimates, left, spread, strict=True)
    )


def _measurements(view: View, grid: torch.dtype | None, used: Tensor | None) -> Measurements:
    """What the entries say, those that are used."""
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
    h = (1 - (found.delta_variance - found.pull.square()) / v).clamp(min=LEAST_SHARE) / v
    q = found.pull / v
    q *= (MOST_PULL / (q.square() / h).sum(dim=0)).clamp(max=1).sqrt()
    for whole, part in ((gradient, (found.delta - m) / v), (precision, h), (pull, q)):
        whole.flatten(start_dim=1)[:, places] = part
        if used is not None:
            whole *= used
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


def _normalised(estimate: Estimate) -> Estimate:
    """The same product with orthogonal columns of L, and `R^T R = in * I`: R's coordinates are then all alike."""
    Q, T = torch.linalg.qr(estimate.right)
    U, S, Vh = torch.linalg.svd(estimate.left @ T.mT, full_matrices=False)
    root = Q.shape[0] ** 0.5
    return replace(estimate, left=U * (S / root), right=(Q @ Vh.mT) * root)


def _profile(right: Tensor) -> Tensor:
    return right.square().sum(dim=1)
