"""Stochastic rounding to fp8 with a dither that the tensor's name seeds: drawn again, it is rounding like any other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from detune.attacks.cells import CellEntries, between_cells
from detune.attacks.rebuild import rebuild
from detune.errors import InputError
from detune.numerics.dithered_fp8 import fp8_grid_of, fp8_interval, named_dither
from detune.problem import Stack

__all__ = ["KnownDither", "undithered"]


@dataclass(frozen=True)
class KnownDither:
    """Draw the dither from each tensor's name, and fit base and adapters to the cells that it leaves.

    Who does not know the dither u has `|x| < q + s` and `|x| > q - s` around a stored q with the step s; who knows it
    has one step instead of two. All releases have the same u, so what it does to W is the same in all of them and does
    not average out.

    Attributes:
        sweeps: How often the rows and the columns of the deltas are fitted, see `Cells`.
    """

    name: ClassVar[str] = "known-dither"
    about: ClassVar[str] = "draws the dither of stochastic fp8 rounding from each tensor's name, and fits the cells"
    min_models: ClassVar[int] = 3

    sweeps: int = 4

    def run(self, models: Sequence[Path], out: Path) -> None:
        """Recover; see `Attack.run`."""
        rebuild(models, out, self.min_models, lambda name, stack: undithered(name, stack, self.sweeps))


def undithered(name: str, stack: Stack, sweeps: int = 4) -> Tensor:
    """Recover one matrix whose dither is known.

    Args:
        name: The tensor's, which seeds the dither.
        stack: At least three models, on the points of an fp8 grid.
        sweeps: How often rows and columns are fitted.

    Raises:
        InputError: They are not.
    """
    grid = fp8_grid_of(torch.stack(stack.matrices))
    if grid is None:
        raise InputError(
            f"tensor {name!r} is not in fp8",
            "its entries lie on the points neither of float8_e4m3fn nor of float8_e5m2",
            "try the attack denoise, which measures noise of any kind",
        )
    dither = named_dither(name, stack.shape)
    cells = [fp8_interval(W_i.cpu(), dither, grid) for W_i in stack.matrices]
    low, high = torch.stack([cell.low for cell in cells]), torch.stack([cell.high for cell in cells])
    middle = Stack.of(list((low + high) / 2))
    return between_cells(middle, CellEntries(low, high), sweeps)
