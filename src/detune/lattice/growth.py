"""Which directions the estimates lack, by the score of every entry.

The gradient of the entries' likelihood, at the estimates so far, is the missing part of `M_i` times what the entries
say on average, and noise; its leading singular vectors are those of the missing part where they stand over the noise
(spectral initialisation of a nonlinear channel: Lu & Li 2017, arXiv 1702.06435).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from detune.lattice.entries import Entries, row_blocks
from detune.lattice.estimate import Estimate
from detune.lattice.message_passing import Measurements
from detune.numerics.linalg import randomized_svd
from detune.numerics.random import seeded

# A direction counts if its singular value is this many times the noise's largest; the bound holds to a few per cent
# (any number does: `benchmarks/constants.py`).
EDGE = 1.03
# Of a singular value at the edge most is noise: what is left of one is about `sqrt(S^2 - (0.9 edge)^2)` (any number
# does: `benchmarks/constants.py`).
SHRUNK = 0.9
FIRST_DIRECTIONS, MOST_DIRECTIONS = 16, 64
POWER_PASSES = 3


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
        seed: Seed of the test vectors.
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
