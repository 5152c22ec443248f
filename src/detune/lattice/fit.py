"""The fit on one grid: sweeps until nothing new comes, in a part of a large matrix first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detune.lattice.entries import StoredEntries, grid_of
from detune.lattice.estimate import Estimate
from detune.lattice.growth import grown
from detune.lattice.holdout import calibrated, held_out, log10_ratio
from detune.lattice.message_passing import sweep
from detune.lattice.submatrix import Submatrix, all_or, extended
from detune.numerics.float_grid import spacing
from detune.problem.recovery import FEWEST_MODELS

# Larger matrices are fitted in this many rows and columns, or this many for each direction; the others follow from
# those (measured: `benchmarks/constants.py`).
BLOCK, BLOCK_PER_RANK = 512, 16
# Estimates that are known to this share of a step leave one entry in a thousand open: the grid's finest steps (any
# number does: `benchmarks/constants.py`).
SETTLED = 1e-3
# A score that has shown nothing new this many times is not asked again (any number does: `benchmarks/constants.py`).
BARREN = 2


@dataclass(frozen=True)
class Fit:
    """The outcome of the sweeps on one grid.

    Attributes:
        entries: The models.
        estimates: One for each model.
        grid: The dtype tried; None is no grid.
        log10_false_positive: Bound for the chance that a base off the grid looks as much as if it were on it.
        sweeps: How many were made.
    """

    entries: StoredEntries
    estimates: tuple[Estimate, ...]
    grid: torch.dtype | None
    log10_false_positive: float
    sweeps: int


@dataclass(frozen=True)
class Sweeps:
    """How long to sweep.

    Attributes:
        most: The most sweeps.
        least_gain: Share of the variance of the `M_i` above which what a sweep leaves counts as nothing gained.
        patience: How many such sweeps in a row are followed by another.
        seed: Seed of the held-out entries, and of the rows and columns of large matrices.
    """

    most: int
    least_gain: float
    patience: int
    seed: int

    def fit(
        self,
        entries: StoredEntries,
        estimates: Sequence[Estimate],
        grid: torch.dtype,
        rank: int | None,
        spaces: tuple[Tensor, Tensor] | None,
    ) -> Fit | None:
        """Fit the models on one grid.

        Args:
            entries: The models.
            estimates: The start.
            grid: The dtype to try.
            rank: The most directions of any model.
            spaces: Orthonormal bases that hold the left and the right factors of every model.

        Returns:
            None where the start has deltas and the grid does not show.
        """
        widest = max(e.rank for e in estimates)
        block = Submatrix.draw(entries.shape, max(BLOCK, BLOCK_PER_RANK * widest), self.seed)
        part, chosen = block.entries(entries), block.estimates(estimates)
        held = held_out(part.shape, self.seed)
        if widest:
            wider = calibrated(part, chosen, grid_of(grid), held)
            if wider is None:
                return None
            # Errors that all models share, where adapters nearly coincide, are larger than least squares promises.
            as_promised = wider[0].variance <= chosen[0].variance
            chosen = wider
            if as_promised and _is_fine(chosen, part, grid):
                # Nothing is gained by sweeps.
                ratio = log10_ratio(part, chosen, grid_of(grid), held)
                return Fit(entries, tuple(estimates), grid, -ratio, 0)
        if not block.is_whole:
            spaces = None
        fitted, sweeps = self.until_settled(part, chosen, grid, held, rank, spaces)
        ratio = log10_ratio(part, fitted, grid_of(grid), held)
        fitted = self._of_all(entries, estimates, fitted, block, grid_of(grid), rank, spaces)
        return Fit(entries, fitted, grid, -ratio, sweeps)

    def until_settled(
        self,
        entries: StoredEntries,
        estimates: Sequence[Estimate],
        grid: torch.dtype | None,
        held: Tensor,
        rank: int | None,
        spaces: tuple[Tensor, Tensor] | None = None,
        *,
        growing: bool = True,
    ) -> tuple[tuple[Estimate, ...], int]:
        """Sweep until nothing new comes.

        Args:
            entries: The models.
            estimates: The start.
            grid: The grid of W; None is no grid.
            held: Entries that are kept from the fit.
            rank: The most directions of any model.
            spaces: Orthonormal bases that hold the left and the right factors of every model.
            growing: Whether directions are taken in that stand over the noise.

        Returns:
            The estimates, and how many sweeps were made.
        """
        found, before, points = tuple(estimates), math.inf, grid_of(grid)
        # Least squares is at its best before directions are taken from what it leaves.
        barren, stalls = 0 if growing else BARREN, 0
        first = int(any(e.rank for e in found))
        careful = not first
        for turn in range(self.most):
            came = 0
            if turn >= first and barren < BARREN:
                found, came = grown(entries, found, points, held, rank, self.seed)
                found = tuple(e.within(spaces) for e in found)
                barren = 0 if came else barren + 1
            if not any(e.rank for e in found):
                return found, turn
            found = tuple(e.within(spaces) for e in sweep(entries, found, points, held, careful=careful))
            uncertain = sum(e.variance for e in found)
            stalls = 0 if came or uncertain < self.least_gain * before else stalls + 1
            if stalls > self.patience:
                return found, turn + 1
            before = uncertain
        return found, self.most

    def _of_all(
        self,
        entries: StoredEntries,
        begun: Sequence[Estimate],
        fitted: tuple[Estimate, ...],
        block: Submatrix,
        grid: np.ndarray,
        rank: int | None,
        spaces: tuple[Tensor, Tensor] | None,
    ) -> tuple[Estimate, ...]:
        """The estimates of all rows and columns, from those that were fitted in a block."""
        rows, columns = block.rows, block.columns
        many = entries.n >= FEWEST_MODELS
        if rows is not None:
            strip = entries.part(None, columns)
            fitted = extended(strip, [e.part(slice(None), all_or(columns)) for e in begun], fitted, rows, grid)
            if many:
                # More directions stand over the noise in more entries.
                fitted, came = grown(strip, fitted, grid, None, rank, self.seed)
                fitted = sweep(strip, fitted, grid, held_out(strip.shape, self.seed)) if came else fitted
        if columns is not None:
            seen = entries if rows is None else entries.part(rows, None)
            turned, start = ([e.transposed for e in each] for each in (fitted, begun))
            found = extended(seen.transposed, start, turned, columns, grid, all_or(rows))
            fitted = tuple(e.transposed for e in found)
        if many:
            # One or two models lock onto wrong points unseen but by what is held out, so there it stays held out.
            fitted = tuple(e.within(spaces) for e in sweep(entries, fitted, grid))
            if not block.is_whole and self.patience:
                fitted, came = grown(entries, fitted, grid, None, rank, self.seed)
                fitted = sweep(entries, fitted, grid) if came else fitted
        return tuple(fitted)


def _is_fine(estimates: Sequence[Estimate], entries: StoredEntries, grid: torch.dtype) -> bool:
    """Whether the `M_i` are known so well that next to all entries have one grid point."""
    step = float(spacing(entries.matrices[0][::16], grid).median())
    return bool(max(e.variance for e in estimates) ** 0.5 < SETTLED * step)
