"""Which directions the estimates lack, by the score of every entry; and how large deltas are before any is known.

The gradient of the entries' likelihood, at the estimates so far, is the missing part of `M_i` times what the entries
say on average, and noise; its leading singular vectors are those of the missing part where they stand over the noise
(spectral initialisation of a nonlinear channel: Lu & Li 2017, arXiv 1702.06435).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from detune.lattice.entries import Entries, row_blocks
from detune.lattice.estimate import Estimate
from detune.lattice.message_passing import Measurements
from detune.numerics.float_grid import nearest, spacing
from detune.numerics.linalg import randomized_svd
from detune.numerics.random import seeded
from detune.problem.stack import Stack

# A direction counts if its singular value is this many times the noise's largest; the bound holds to a few per cent.
EDGE = 1.03
# Of a singular value at the edge most is noise: what is left of one is about `sqrt(S^2 - (0.9 edge)^2)`.
SHRUNK = 0.9
FIRST_DIRECTIONS, MOST_DIRECTIONS = 16, 64
POWER_PASSES = 3
# Rows with about this many entries show the size of deltas, and the entries with the finest steps show it best.
SAMPLED, FINEST = 1 << 17, 0.03
# No model's delta is taken for smaller than this share of their average: what is too small to be measured is not zero.
SMALLEST_SHARE = 0.1
# Standard errors by which a delta's size may be larger than it seems.
SURE = 3.0


def grown(
    entries: Entries,
    estimates: Sequence[Estimate],
    grid: np.ndarray,
    held: Tensor | None,
    rank: int | None = None,
    seed: int = 0,
) -> tuple[tuple[Estimate, ...], int]:
    """The estimates with the directions that stand over the noise, and how many came.

    Args:
        entries: The models.
        estimates: One for each.
        grid: That W lies on.
        held: Entries that are kept from the fit, `(out, in)`, bool.
        rank: The most directions that any may have.
        seed: Of the test vectors.
    """
    estimates = [e.normalised() for e in estimates]
    parts = []
    for rows in row_blocks(entries):
        said = Measurements.of(entries, estimates, grid, rows, for_rows=False)
        if held is not None:
            said.forget(held[rows].nonzero(as_tuple=True))
        parts.append(said)
    gradients = [torch.cat([part.gradient[i] for part in parts]) for i in range(len(estimates))]
    information = torch.cat([part.alone for part in parts], dim=1)
    averages = [float(of_i.mean()) for of_i in information]
    found, came = [], 0
    for i, e in enumerate(estimates):
        leading = _leading(gradients[i], information[i], rank, e.rank, seeded(seed + i))
        if leading is None:
            found.append(e)
            continue
        U, sizes, V = leading
        # Where W is open, what one model lacks shows in the others too, less and with the other sign.
        largest = sizes / averages[i]
        for j, gradient in enumerate(gradients):
            if j != i and averages[j]:
                largest = torch.maximum(largest, ((U.mT @ gradient) * V.mT).sum(dim=1).abs() / averages[j])
        own = largest <= sizes / averages[i]
        found.append(_with(e, U[:, own], sizes[own], V[:, own], averages[i]))
        came += int(own.sum())
    return tuple(found), came


def _leading(
    gradient: Tensor, information: Tensor, rank: int | None, known: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Singular vectors of a score that stand over the noise, and their singular values without it."""
    most = min(MOST_DIRECTIONS, *gradient.shape, *(() if rank is None else (rank - known,)))
    # The norm of noise of these variances (Bandeira & van Handel 2016, Theorem 1.1).
    edge = float(information.sum(dim=0).max().sqrt() + information.sum(dim=1).max().sqrt())
    if most <= 0 or not edge:
        return None
    width = min(most, FIRST_DIRECTIONS)
    U, S, V = randomized_svd(gradient, width, generator, POWER_PASSES)
    while (r := int((EDGE * edge < S).sum())) > width // 2 and width < most:
        # The last of these vectors are known badly.
        width = min(most, 2 * width)
        U, S, V = randomized_svd(gradient, width, generator, POWER_PASSES)
    return (U[:, :r], (S[:r].square() - (SHRUNK * edge) ** 2).clamp(min=0).sqrt(), V[:, :r]) if r else None


def _with(e: Estimate, U: Tensor, sizes: Tensor, V: Tensor, average: float) -> Estimate:
    """An estimate with more directions, of sizes that the score has times what entries say on average."""
    if not len(sizes):
        return e
    out, columns = len(U), len(V)
    left = torch.cat([e.left, U * (sizes / average) * columns**-0.5], dim=1)
    right = torch.cat([e.right, V * columns**0.5], dim=1)
    size = float(left.square().sum(dim=1).mean())
    rows = e.rows.clamp(min=1 / (average * columns))
    return Estimate(left, right, rows, e.columns.clamp(min=right.shape[1] / (average * out * size)), e.lack)


class DeltaScale(NamedTuple):
    """How large a delta's entries are.

    Attributes:
        rms: Root mean square.
        at_most: What it is hardly more than.
    """

    rms: float
    at_most: float


def delta_scales(stack: Stack) -> list[DeltaScale]:
    """Root mean square of each delta's entries, without knowing them, from two models on.

    `W_i - W_j` times `W_i - W_k` is `M_i^2` on average; entries with fine steps count most. Two models share what
    their difference shows.
    """
    every = max(1, stack.shape[0] * stack.shape[1] // SAMPLED)
    rows = [W_i[::every].cpu() for W_i in stack.matrices]
    rounding = torch.stack(
        [spacing(W_i, dtype).square() / 12 for W_i, dtype in zip(rows, stack.rounded_dtypes, strict=True)]
    )
    values = torch.stack([W_i.double() for W_i in rows])
    summed = rounding.sum(dim=0)
    least = torch.finfo(torch.float64).tiny
    size = (values - values.mean(dim=0)).square().mean(dim=0)
    # The size of the deltas where rounding is finest: there it counts, and elsewhere it would be all that is seen.
    fine = summed <= summed.flatten()[:: max(1, summed.numel() // 10**5)].quantile(FINEST)
    typical = max(float(size[fine].mean() - summed[fine].mean() / stack.n), least)
    weights = 1 / (summed + typical).square()
    weights /= weights.sum()
    if stack.n == 2:
        square = float((weights * ((values[0] - values[1]).square() - summed)).sum()) / 2
        return [DeltaScale(math.sqrt(max(square, least)), math.inf)] * 2
    found = []
    for i in range(stack.n):
        others = values[[j for j in range(stack.n) if j != i]]
        away = values[i] - others
        # The mean over pairs j != k of the products, from their sums.
        products = (away.sum(dim=0).square() - away.square().sum(dim=0)) / (len(others) * (len(others) - 1))
        square = float((weights * products).sum())
        error = float((weights * (products - square)).square().sum().sqrt())
        found.append((square, error))
    typical = max(sum(max(0.0, square) for square, _ in found) / stack.n, least)
    return [
        DeltaScale(math.sqrt(max(square, SMALLEST_SHARE**2 * typical)), math.sqrt(max(0.0, square + SURE * error)))
        for square, error in found
    ]


def scatter(W_1: Tensor, grid: torch.dtype) -> DeltaScale:
    """The size tau of a single model's delta, by the scatter of its entries about the grid.

    Solves `E cos(2 pi W_1 / step) = exp(-2 pi^2 tau^2 / step^2)`, which holds for normal deltas, by bisection.
    """
    W_1 = W_1[:: max(1, W_1.numel() // SAMPLED)].cpu()
    step = spacing(W_1, grid)
    cosine = float(torch.cos(2 * math.pi * (W_1.double() - nearest(W_1, grid)) / step).mean())
    low, high = 1e-6 * float(step.median()), 1e3 * float(step.median())
    while high > 1.001 * low:
        tau = math.sqrt(low * high)
        if float(torch.exp(-2 * (math.pi * tau / step).square()).mean()) > cosine:
            low = tau
        else:
            high = tau
    return DeltaScale(high, math.inf)
