"""Quantised releases: each entry of each lay in the cell of its level, and W where the cells of all of them meet.

To `denoise` quantisation is Gaussian noise. But deltas smaller than a cell leave most entries of all releases in the
same one, so the errors are no noise that averages out, and what an entry says of the deltas is whether it crossed into
another cell. Here that is what is fitted: `low_i < W + M_i < high_i` for every entry, `M_i` of low rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from detune.attacks.measured_noise import best_split, with_measured_noise
from detune.attacks.rebuild import rebuild
from detune.compatibility.quantisation_levels import levels_of
from detune.lattice.decode import decoded
from detune.lattice.entries import grid_of, row_blocks
from detune.lattice.estimate import Estimate, means
from detune.lattice.holdout import held_out
from detune.lattice.message_passing import sweep
from detune.problem import Stack
from detune.problem.storage_noise import step_variance

__all__ = ["CellEntries", "Cells", "between_cells", "between_levels", "within_cells"]

# The cell that stands for what is known of W before: thin against the spread of a row's weights.
THIN = 1e-4


@dataclass(frozen=True)
class Cells:
    """Read format and scales off the releases, start from `denoise`, and fit deltas and base to the cells.

    Known are int8 with a scale for each channel, and NF4 with a float32 scale for each block; anything else is refused.

    Attributes:
        sweeps: How often the rows and the columns of the deltas are fitted.

    Reference:
        Rangan, "Generalized approximate message passing", 2011 (arXiv 1010.5141), as `detune.lattice.message_passing`
        does for the rounding to a dtype.
    """

    name: ClassVar[str] = "cells"
    about: ClassVar[str] = "reads a quantisation's levels, and fits base and adapters to the cells of int8 or NF4"
    min_models: ClassVar[int] = 3

    sweeps: int = 4

    def run(self, models: Sequence[Path], out: Path) -> None:
        """Recover; see `Attack.run`."""
        rebuild(models, out, self.min_models, lambda name, stack: between_levels(stack, self.sweeps))


def between_levels(stack: Stack, sweeps: int = 4) -> Tensor:
    """Fit one matrix to the cells of its quantisation.

    Args:
        stack: At least three models, quantised.
        sweeps: How often rows and columns are fitted.

    Raises:
        InputError: They are not quantised.
    """
    cells = [levels_of(W_i) for W_i in stack.matrices]
    low, high = torch.stack([cell.low for cell in cells]), torch.stack([cell.high for cell in cells])
    return between_cells(stack, CellEntries(low.cpu(), high.cpu()), sweeps)


def between_cells(stack: Stack, entries: "CellEntries", sweeps: int = 4) -> Tensor:
    """One matrix, of which the cells are known.

    Args:
        stack: The middle of each cell, or what else is near: where the fit starts.
        entries: The cells.
        sweeps: How often rows and columns are fitted.

    Returns:
        W, `(out, in)`, float64.
    """
    measured = with_measured_noise(stack)
    if not measured.noise_override:
        # Releases that hardly differ: as far as anybody knows, by no more than their cells.
        size = float(step_variance((entries.high - entries.low).square().mean())) ** 0.5
        measured = replace(stack, noise_override=(size,) * stack.n)
    variance = float(measured.noise[0]) ** 2
    estimates = tuple(Estimate.of(M_i, variance) for M_i in best_split(measured).deltas)
    # Entries that the fit has not seen tell what of the deltas no direction holds. Of NF4 that is a half, and a fit
    # that takes its directions for all there is runs away.
    held = held_out(entries.shape, seed=0)
    for _ in range(sweeps):
        estimates = sweep(entries, estimates, grid_of(None), held)
    weight = torch.empty(stack.shape, dtype=torch.float64)
    for rows in row_blocks(entries):
        block = CellEntries(entries.low[:, rows], entries.high[:, rows])
        weight[rows] = within_cells(block, [e.part(rows, slice(None)) for e in estimates])
    return weight


@dataclass(frozen=True)
class CellEntries:
    """Entries that were quantised; see `detune.lattice.entries.Entries`.

    Attributes:
        low: Lower ends of every model's cells, `(n, out, in)`, float64, on the CPU.
        high: Upper ends.
    """

    low: Tensor
    high: Tensor

    @property
    def n(self) -> int:
        """Number of models."""
        return len(self.low)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.low.shape[1], self.low.shape[2]

    @property
    def transposed(self) -> "CellEntries":
        """The transposed matrices; nothing is copied."""
        return CellEntries(self.low.mT, self.high.mT)

    def part(self, rows: Tensor | None, columns: Tensor | None) -> "CellEntries":
        """Some rows and columns, copied."""
        low, high = self.low, self.high
        if rows is not None:
            low, high = low.index_select(1, rows), high.index_select(1, rows)
        if columns is not None:
            low, high = low.index_select(2, columns), high.index_select(2, columns)
        return CellEntries(low, high)

    def block(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends in some rows."""
        return self.low[:, rows].contiguous().numpy(), self.high[:, rows].contiguous().numpy()


def within_cells(entries: CellEntries, estimates: Sequence[Estimate]) -> Tensor:
    """The mean of W in every entry, where its row's weights are normal.

    Args:
        entries: The cells of every model.
        estimates: Their deltas.

    Returns:
        `(out, in)`, float64.
    """
    low, high = entries.low, entries.high
    middle = ((low + high) / 2 - torch.from_numpy(means(estimates))).mean(dim=0)
    mean, std = middle.mean(dim=1), middle.std(dim=1, correction=0)
    # One model more, of a thin cell and with a delta of the spread of W, is a normal prior on W.
    ends = (
        torch.cat([end, (mean + side * THIN * std)[None, :, None].expand(1, *entries.shape)])
        for end, side in ((low, -1), (high, 1))
    )
    nothing = Estimate.nothing(entries.shape, 0.0)
    prior = replace(nothing, left=torch.zeros(len(std), 1), right=torch.ones(entries.shape[1], 1), rows=std.square())
    return decoded(CellEntries(*ends), [*estimates, prior], grid_of(None)).weight
