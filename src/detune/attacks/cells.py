"""Quantised releases: each entry of each lay in the cell of its level, and W where the cells of all of them meet.

To `denoise` quantisation is Gaussian noise. But deltas smaller than a cell leave most entries of all releases in the
same one, so the errors are no noise that averages out, and what an entry says of the deltas is whether it crossed into
another cell. Here that is what is fitted: `low_i < W + M_i < high_i` for every entry, `M_i` of low rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from detune.attacks.denoise import best_split, with_measured_noise
from detune.attacks.rebuild import rebuild
from detune.compatibility.levels import Levels, levels_of
from detune.lattice.estimate import LEAST_SIZE, Estimate
from detune.lattice.joint_rows import Measurements, fit_rows, normalised
from detune.lattice.posterior import Posterior, posterior
from detune.problem import Stack

__all__ = ["Cells", "between_levels", "within_cells"]

# Entries of all models that are worked on at a time: what is computed of them stays in the processor's cache.
BLOCK_ENTRIES = 1 << 17
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
        rebuild(models, out, self.min_models, lambda stack: between_levels(stack, self.sweeps))


def between_levels(stack: Stack, sweeps: int = 4) -> Tensor:
    """One matrix.

    Args:
        stack: At least three models, quantised.
        sweeps: How often rows and columns are fitted.

    Raises:
        InputError: They are not quantised.
    """
    cells = [levels_of(W_i) for W_i in stack.matrices]
    levels = Levels(torch.stack([cell.low for cell in cells]), torch.stack([cell.high for cell in cells]))
    measured = with_measured_noise(stack)
    if not measured.noise_override:
        # Releases that hardly differ: as far as anybody knows, by no more than their cells.
        size = float((levels.high - levels.low).square().mean() / 12) ** 0.5
        measured = replace(stack, noise_override=(size,) * stack.n)
    noise = float(measured.noise[0])
    share = sum(stack.shape) / (stack.shape[0] * stack.shape[1])
    estimates: Sequence[Estimate] = [
        Estimate.of(M_i, noise**2 * max(1, M_i.rank) * share) for M_i in best_split(measured).deltas
    ]
    turned = Levels(levels.low.mT.contiguous(), levels.high.mT.contiguous())
    for _ in range(sweeps):
        estimates = _fit_rows(levels, estimates)
        estimates = [e.transposed for e in _fit_rows(turned, [e.transposed for e in estimates])]
    weight = torch.empty_like(levels.low[0])
    for block in _blocks(levels, estimates):
        weight[block.rows] = within_cells(block.low, block.high, block.m, block.v)
    return weight


def within_cells(low: Tensor, high: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """The posterior mean of W, entry by entry, where its row's weights are normal.

    Args:
        low: Lower ends of every model's cells, `(n, rows, in)`, float64.
        high: Upper ends.
        m: Deltas, `(n, rows, in)`.
        v: Their variances.

    Returns:
        `(rows, in)`.
    """
    middle = ((low + high) / 2 - m).mean(dim=0)
    mean, std = middle.mean(dim=1, keepdim=True), middle.std(dim=1, keepdim=True).clamp(min=LEAST_SIZE**0.5)
    # One model more, of a thin cell and with a delta of the spread of W, is a normal prior on W.
    prior = mean.expand_as(middle)[None]
    low, high = (torch.cat([end, prior + side * THIN * std]) for end, side in ((low, -1), (high, 1)))
    m, v = torch.cat([m, torch.zeros_like(prior)]), torch.cat([v, std.square().expand_as(middle)[None]])
    found = _posterior(low, high, m, v)
    return found.weight.view_as(middle)


@dataclass(frozen=True)
class _Block:
    """Some rows of all models.

    Attributes:
        rows: Which.
        low: Lower ends of the cells, `(n, rows, in)`.
        high: Upper ends.
        m: Deltas.
        v: Their variances.
    """

    rows: slice
    low: Tensor
    high: Tensor
    m: Tensor
    v: Tensor


def _blocks(levels: Levels, estimates: Sequence[Estimate]) -> Iterator[_Block]:
    n, out, columns = levels.low.shape
    height = max(1, BLOCK_ENTRIES // (n * columns))
    for start in range(0, out, height):
        rows = slice(start, min(start + height, out))
        variances = [e.rows[0, rows, None] * e.columns[1] + e.rows[1, rows, None] * e.columns[0] for e in estimates]
        yield _Block(
            rows,
            levels.low[:, rows],
            levels.high[:, rows],
            torch.stack([e.mean(rows) for e in estimates]),
            torch.stack(variances).clamp(min=LEAST_SIZE),
        )


def _fit_rows(levels: Levels, estimates: Sequence[Estimate]) -> tuple[Estimate, ...]:
    """A Newton step for every row of the left factors of all models together, given the right ones."""
    estimates = [normalised(e) for e in estimates]
    (fitted,) = fit_rows(estimates, None, ((block.rows, _measured(block)) for block in _blocks(levels, estimates)))
    return fitted


def _measured(block: _Block) -> Measurements:
    """Measure the deltas by the cells: score and precision of a normal number in an interval."""
    found = _posterior(block.low, block.high, block.m, block.v)
    delta, variance, pull = (part.view_as(block.v) for part in (found.delta, found.delta_variance, found.pull))
    return Measurements.of(found._replace(delta=delta, delta_variance=variance, pull=pull), block.m, block.v)


def _posterior(low: Tensor, high: Tensor, m: Tensor, v: Tensor) -> Posterior:
    """The posterior of every entry by itself, W between all grids; entries in one row."""
    low, high, m, v = (each.flatten(start_dim=1) for each in (low, high, m, v))
    return posterior(low, high, m, v, None)
