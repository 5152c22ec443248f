"""The test for a grid: how likely entries that the fit has not seen are with the base on it, and off it."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from detune.lattice.entries import Entries
from detune.lattice.estimate import Estimate
from detune.numerics.random import seeded

# Entries kept from the fit: their share, and how many the test looks at (any number does: `benchmarks/constants.py`).
HELD, TESTED = 1 / 16, 1 << 12
# A start may be off by more than it promises: its variances times each of these are tried for a sign of the grid (any
# numbers do).
WIDER = (1.0, 4.0, 16.0, 64.0, 256.0, 4096.0)
# A sign: it comes by chance once in ten times (derived: Markov's inequality).
SIGN = 1.0
# Entries that are read together: any number does, it bounds memory.
TOGETHER = 1024


def held_out(shape: tuple[int, int], seed: int) -> Tensor:
    """Draw the entries that are kept from the fit, `(out, in)`, bool."""
    return torch.rand(shape, generator=seeded(seed)) < HELD


def log10_ratio(entries: Entries, estimates: Sequence[Estimate], grid: np.ndarray, held: Tensor) -> float:
    """How much likelier the held-out entries are with W on the grid, as a decimal logarithm.

    Were W off the grid, the ratio's expectation would be 1, so by Markov's inequality it exceeds 10^x with a
    probability of at most 10^-x: an e-value (Vovk & Wang 2021, arXiv 1912.06116), if the `M_i` are what they are
    taken for.

    Args:
        entries: The models.
        estimates: One for each.
        grid: The grid that is tested.
        held: Entries that the estimates do not depend on, `(out, in)`, bool.
    """
    from detune.lattice.kernels import log_ratios

    rows, columns = held.nonzero(as_tuple=True)
    every = max(1, len(rows) // TESTED)
    rows, columns = rows[::every], columns[::every]
    ends = [np.empty((entries.n, len(rows))) for _ in range(2)]
    for start in range(0, len(rows), TOGETHER):
        # One row of the matrix at a time would be read whole; some entries of some rows are.
        chosen = slice(start, start + TOGETHER)
        here, inverse = rows[chosen].unique(return_inverse=True)
        low, high = entries.part(here, None).block(slice(None))
        for whole, end in zip(ends, (low, high), strict=True):
            whole[:, chosen] = end[:, inverse, columns[chosen]]
    m = torch.stack([(e.left[rows] * e.right[columns]).sum(dim=1) for e in estimates]).double().numpy()
    v = torch.stack(
        [
            e.rows[rows] * e.right[columns].square().sum(dim=1)
            + e.left[rows].square().sum(dim=1) * e.columns[columns]
            + e.lack
            for e in estimates
        ]
    ).double()
    ratios = np.empty(len(rows))
    log_ratios(ends[0], ends[1], m, v.numpy(), grid, ratios)
    return float(ratios.sum()) / math.log(10)


def calibrated(
    entries: Entries, estimates: Sequence[Estimate], grid: np.ndarray, held: Tensor, sign: float = SIGN
) -> list[Estimate] | None:
    """The estimates with their variances multiplied by the factor under which the grid shows best.

    Args:
        entries: The models.
        estimates: One for each.
        grid: The grid that is tested.
        held: Entries that the estimates do not depend on, `(out, in)`, bool.
        sign: The least decimal logarithm of the likelihood ratio that counts.

    Returns:
        None where the grid shows under no factor.
    """
    tries = [[e.wider(factor) for e in estimates] for factor in WIDER]
    ratios = [log10_ratio(entries, tried, grid, held) for tried in tries]
    best = max(range(len(tries)), key=ratios.__getitem__)
    return tries[best] if ratios[best] > sign else None
