"""Where the interval fit starts when least squares has nothing: from the score, entry by entry.

With `M_i ~ N(0, tau^2)` every entry's posterior mean is a nonlinear measurement of `M_i[a, b]`: for one float32 merge
it is the merge's distance from the grid, shrunk where the step is short. Divided by the variance it is the score of
the likelihood at zero, whose leading singular vectors are those of `M_i` (spectral initialisation of a nonlinear
channel: Lu & Li 2017, arXiv 1702.06435).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from detune.fitting.differences import find_differences
from detune.lattice.estimate import Estimate
from detune.lattice.intervals import views
from detune.numerics.float_grid import interval, nearest, spacing
from detune.numerics.linalg import randomized_svd
from detune.numerics.random import seeded
from detune.problem.low_rank import LowRank
from detune.problem.stack import Stack

# Rows with about so many entries show the size of the deltas.
SAMPLED = 1 << 18
# Entries with the finest steps show the size of the deltas.
FINEST = 0.03
# Neighbouring singular values of noise differ by less than this factor; the last wider gap ends the signal.
GAP = 1.1
# Matrices up to here have all their singular values taken.
SMALL = 1024
POWER_PASSES = 4


class FactorSpaces(NamedTuple):
    """Orthonormal bases that hold the factors of every `M_i`: `(out, .)` and `(in, .)`, float64."""

    left: Tensor
    right: Tensor


def known_spaces(stack: Stack, rank: int | None) -> FactorSpaces | None:
    """Column and row space of `W_1 - W_2 = M_1 - M_2`, which hold those of both; None if it has no low rank."""
    rows, columns = (find_differences(s, rank, fold=False).of(0, 1) for s in (stack, stack.transposed))
    if rows.full_rank or columns.full_rank or not rows.rank or not columns.rank:
        return None
    return FactorSpaces(columns.basis, rows.basis)


def within(estimates: Sequence[Estimate], spaces: FactorSpaces | None) -> tuple[Estimate, ...]:
    """The estimates with their factors projected onto spaces that hold the true ones."""
    if spaces is None:
        return tuple(estimates)
    left, right = spaces
    return tuple(replace(e, left=left @ (left.mT @ e.left), right=right @ (right.mT @ e.right)) for e in estimates)


def delta_scale(stack: Stack, grid: torch.dtype) -> float:
    """Root mean square of the deltas, without knowing them.

    Two models or more: what differs between neighbours, less its rounding, in the entries with the finest steps. One:
    the scatter of its entries about the grid, where a normal delta of size tau leaves `E cos(2 pi W_1 / step) =
    exp(-2 pi^2 tau^2 / step^2)`; solved for tau by bisection.
    """
    every = max(1, stack.shape[0] * stack.shape[1] // SAMPLED)
    rows = [W_i[::every].to(stack.device) for W_i in stack.matrices]
    if stack.n == 1:
        return _scatter(rows[0], grid)
    total, count = 0.0, 0
    for i in range(stack.n):
        pair = [rows[j % stack.n] for j in (i, i + 1)]
        ends = [interval(W_i) for W_i in pair]
        rounding = torch.stack([(high - low).square() / 12 for low, high in ends]).sum(dim=0)
        fine = rounding <= rounding.flatten()[:: max(1, rounding.numel() // 10**5)].quantile(FINEST)
        total += float(((pair[0].double() - pair[1].double())[fine].square() - rounding[fine]).sum())
        count += 2 * int(fine.sum())
    least = torch.finfo(torch.float64).tiny
    return math.sqrt(max(total, least) / max(1, count))


def _scatter(W_1: Tensor, grid: torch.dtype) -> float:
    step = spacing(W_1, grid)
    cosine = float(torch.cos(2 * math.pi * (W_1.double() - nearest(W_1, grid)) / step).mean())
    low, high = 1e-6 * float(step.median()), 1e3 * float(step.median())
    while high > 1.001 * low:
        tau = math.sqrt(low * high)
        if float(torch.exp(-2 * (math.pi * tau / step).square()).mean()) > cosine:
            low = tau
        else:
            high = tau
    return high


def score_start(
    stack: Stack,
    grid: torch.dtype,
    tau: float,
    rank: int | None = None,
    spaces: FactorSpaces | None = None,
    used: Tensor | None = None,
) -> tuple[Estimate, ...] | None:
    """Estimates from the leading singular vectors of each model's score; None where nothing leads.

    Args:
        stack: The models.
        grid: The dtype that W lies on.
        tau: Root mean square of the deltas.
        rank: Of every estimate; None ends each at the last gap in its singular values.
        spaces: What is known of the factors.
        used: Which entries to use, `(out, in)`, bool; None is all.
    """
    out, columns = stack.shape
    nothing = LowRank(torch.zeros(out, 1, device=stack.device), torch.zeros(columns, 1, device=stack.device))
    prior = [Estimate.of(nothing, tau**2) for _ in range(stack.n)]
    scores = torch.empty(stack.n, out, columns, dtype=torch.float32, device=stack.device)
    information = torch.zeros(stack.n, dtype=torch.float64, device=stack.device)
    for view in views(stack, prior):
        everything = torch.arange(view.m[0].numel(), device=view.m.device)
        v = view.variance(everything)
        found = view.posterior(everything, v, grid)
        score = (found.delta / v * tau).unflatten(1, view.m.shape[1:])
        scores[:, view.rows] = score.float() if used is None else (score * used[view.rows]).float()
        information += (1 - found.delta_variance / v).sum(dim=1)
    # In units of tau: what the score's entries say on average, between nothing and all.
    information /= out * columns
    if not bool(torch.isfinite(scores).all()):
        return None
    estimates = []
    for score, share in zip(scores, information, strict=True):
        leading = _leading(score, float(share), tau, rank, spaces)
        if leading is None:
            return None
        estimates.append(leading)
    return tuple(estimates)


def _leading(
    score: Tensor, information: float, tau: float, rank: int | None, spaces: FactorSpaces | None
) -> Estimate | None:
    out, columns = score.shape
    if spaces is not None:
        core = spaces.left.mT @ score.double() @ spaces.right
        U, S, Vh = torch.linalg.svd(core)
        U, V = spaces.left @ U, spaces.right @ Vh.mT
    else:
        U, S, V = _svd(score)
    # The spaces of a difference are as wide as two adapters together.
    found = -(-len(S) // 2) if spaces is not None else _before_last_gap(S)
    r = found if rank is None else min(len(S), rank)
    if not r:
        return None
    share = max(information, 1e-6)
    left = U[:, :r].double() * (S[:r].double() * tau / share)
    variance = tau**2 * min(1.0, r * (out + columns) / (share * out * columns))
    return Estimate.of(LowRank(left, V[:, :r].double()), variance)


def _svd(score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if min(score.shape) <= SMALL:
        U, S, Vh = torch.linalg.svd(score, full_matrices=False)
        return U, S, Vh.mT
    return randomized_svd(score, SMALL // 4, seeded(0, score.device), POWER_PASSES)


def _before_last_gap(S: Tensor) -> int:
    wide = (S[: len(S) // 2] > GAP * S[1 : len(S) // 2 + 1]).nonzero()
    return int(wide[-1]) + 1 if len(wide) else 0
