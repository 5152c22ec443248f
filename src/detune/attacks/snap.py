"""A base on a grid under noise: once the average is close enough to the grid, the rest is rounding."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from detune.attacks.measured_noise import denoised
from detune.attacks.rebuild import rebuild
from detune.numerics.float_grid import nearest, spacing
from detune.problem import Stack

__all__ = ["Snap", "snapped"]

# The mean cosine of the places between two grid points, one turn from one to the next. Normal errors of `e` steps give
# exp(-2 pi^2 e^2): above this, 0.19 steps, fewer than one in a hundred is rounded to the wrong point.
CLOSE = 0.5
# Fewer entries of one step show a mean cosine of 0.5 by chance.
ENOUGH = 100


@dataclass(frozen=True)
class Snap:
    """Denoise, then round to bf16 where the entries of one step lie close enough to its grid.

    Large weights have long steps. So it may be that they snap and small ones do not.
    """

    name: ClassVar[str] = "snap"
    about: ClassVar[str] = "denoise, then round to the base's grid (bf16) where the answer lies close to it"
    min_models: ClassVar[int] = 3

    def run(self, models: Sequence[Path], out: Path) -> None:
        """Recover; see `Attack.run`."""

        def solve(name: str, stack: Stack) -> Tensor:
            return snapped(denoised(stack), torch.bfloat16)

        rebuild(models, out, self.min_models, solve)


def snapped(weight: Tensor, grid: torch.dtype) -> Tensor:
    """A matrix with the entries rounded that lie close to the grid, step by step.

    Args:
        weight: An estimate.
        grid: What the base may have been stored in.
    """
    exact = weight.double()
    steps = spacing(exact, grid)
    points = nearest(exact, grid)
    answer = exact.clone()
    for step in steps.unique():
        of_step = steps == step
        turns = torch.cos(2 * torch.pi * (exact[of_step] - points[of_step]) / step)
        if len(turns) >= ENOUGH and float(turns.mean()) > CLOSE:
            answer[of_step] = points[of_step]
    return answer
