"""The answer once the `M_i` are known on a grid: the base's bits, and which of them are certain."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detune.lattice.entries import Entries, row_blocks
from detune.lattice.estimate import Estimate, known, means
from detune.numerics.float_grid import COARSE
from detune.numerics.random import seeded
from detune.problem.recovery import PredictedError

# An entry is certain if the probability of another grid point is below DOUBT with all variances SAFETY times as large
# (measured: `benchmarks/constants.py`).
DOUBT = 1e-9
SAFETY = 4.0
# None is in a row or column where the M_i lie outside their intervals by 3 squared deviations in sum, and by 4 standard
# deviations more than in others (measured: `benchmarks/constants.py`).
MOST_STRAIN = 3.0
DEVIATIONS, SCATTER = 4.0, 2.4
# The residual of an entry that is off the grid has more than 3 standard deviations: rounding errors are bounded, and
# 2.5 is the most in 400 matrices that are on it (measured: `benchmarks/exact.py`).
MOST_AWAY = 3.0
# From the mean of the absolute values of a normal number to its standard deviation (derived).
FROM_MEAN = math.sqrt(math.pi / 2)
# The exponent of float32's 1 (derived).
BIAS = 127
# Draws of the number of wrong entries (any number does: `benchmarks/constants.py`).
DRAWS = 4000
# The share of them that is below the range of the error, and the share above it (a definition).
OUTSIDE = 0.01


@dataclass(frozen=True)
class Decoded:
    """The most likely value of every entry.

    Attributes:
        weight: `(out, in)`, float64.
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


def decoded(entries: Entries, estimates: Sequence[Estimate], grid: np.ndarray) -> Decoded:
    """One pass over all entries.

    Args:
        entries: The models.
        estimates: One for each.
        grid: That W lies on, as in `Known`; zeros take the mean of what the intervals leave.
    """
    from detune.lattice.kernels import decode

    weight, certain = np.empty(entries.shape), np.empty(entries.shape, dtype=np.bool_)
    wrong, sums = np.zeros(256), np.zeros(3)
    strain = tuple(np.zeros((entries.n, size)) for size in entries.shape)
    fine = _finely_stored(entries, grid)
    away = np.empty(entries.shape if len(fine) else (0, 0), dtype=np.float32)
    for rows in row_blocks(entries):
        here = [e.part(rows, slice(None)) for e in estimates]
        m = means(here)
        low, high = entries.block(rows)
        of_rows = np.zeros((entries.n, len(m[0])))
        sums += decode(
            low, high, m, known(here, grid), SAFETY, DOUBT, weight[rows], certain[rows], wrong, of_rows, strain[1]
        )
        strain[0][:, rows] = of_rows
        if len(fine):
            away[rows] = ((low[fine] + high[fine]) / 2 - weight[rows] - m[fine]).mean(axis=0)
    # A row of L, or of R, that has locked onto wrong points strains its line of the matrix.
    certain[_off(strain[0])] = False
    certain[:, _off(strain[1])] = False
    if len(fine):
        certain[_off_grid(entries, fine, away)] = False
    squares, rounding, spread = (float(value) for value in sums)
    if grid[0]:
        expected, foreseeable = _outlook(torch.from_numpy(wrong), weight.size)
    else:
        expected, foreseeable = (
            PredictedError(wrong[0] / weight.size, wrong[0] / weight.size, wrong[0] / weight.size),
            1.0,
        )
    return Decoded(
        torch.from_numpy(weight),
        torch.from_numpy(certain),
        expected,
        foreseeable,
        math.sqrt(squares / spread) if spread else 0.0,
        math.sqrt(squares / rounding) if rounding else 0.0,
    )


def _off(strain: np.ndarray) -> np.ndarray:
    """Which lines are strained more than the others, in any model, `(lines,)`.

    Chance strains a line a little: a sum of rare contributions, whose variance is some `SCATTER` times its mean.
    """
    usual = np.median(strain, axis=1, keepdims=True)
    off: np.ndarray = (strain > MOST_STRAIN + usual + DEVIATIONS * np.sqrt(SCATTER * usual)).any(axis=0)
    return off


def _finely_stored(entries: Entries, grid: np.ndarray) -> np.ndarray:
    """The models that are stored far more finely than the grid."""
    low, high = entries.block(slice(0, 1))
    steps = grid[0] * np.abs(low).mean(axis=(1, 2))
    return np.flatnonzero(COARSE * (high - low).mean(axis=(1, 2)) < steps)


def _off_grid(entries: Entries, fine: np.ndarray, away: np.ndarray) -> np.ndarray:
    """Where the base does not lie on the grid, by residuals that rounding and the adapters' errors do not explain.

    Args:
        entries: The models.
        fine: Which of them are finely stored.
        away: The mean of their `W_i - M_i - W`, `(out, in)`; replaced by its absolute values.
    """
    np.abs(away, out=away)
    of_rows, of_columns = ((FROM_MEAN * away.mean(axis=axis, keepdims=True)) ** 2 for axis in (1, 0))
    off = np.empty(away.shape, dtype=np.bool_)
    for rows in row_blocks(entries):
        low, high = entries.block(rows)
        rounding = ((high[fine] - low[fine]) ** 2).sum(axis=0) / (12 * len(fine) ** 2)
        off[rows] = away[rows] > MOST_AWAY * np.sqrt(rounding + of_rows[rows] + of_columns)
    return off


def _outlook(wrong: Tensor, entries: int) -> tuple[PredictedError, float]:
    """The mean squared error, and the probability to be within a factor of two of its median.

    Wrong entries come one by one, and those with the longest steps weigh most: their numbers are Poisson numbers.

    Args:
        wrong: How many of each step to expect, by its exponent.
        entries: Number of entries of the matrix.
    """
    exponents = torch.arange(256, dtype=torch.float64) - BIAS
    draws = torch.poisson(wrong.expand(DRAWS, -1), generator=seeded(0))
    sums = (draws * torch.exp2(2 * exponents)).sum(dim=1)
    median = float(sums.median())
    near = (sums >= median / 2) & (sums <= 2 * median)
    least, most = (float(sums.quantile(share)) for share in (OUTSIDE, 1 - OUTSIDE))
    return PredictedError(median / entries, least / entries, most / entries), float(near.double().mean())
