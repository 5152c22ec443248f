"""A stack scaled by a power of two to numbers of the order of one, which is how every method sees it.

Squares of weights, and what is left of them where the grid shows bits, have a float over a part of the dtype's range
only. Scaling by a power of two changes no digit, so the answer is that of the models as they are, scaled back.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detune.numerics.float_grid import spacing, times_power_of_two
from detune.problem.stack import Stack
from detune.problem.storage_noise import sample_rows, step_variance

# Stacks whose entries are around 2^-20 to 2^20 are taken as they are, and nothing is copied: everything down to the
# squares of a float32 rounding error, 2^-88, is far above what the methods take for zero, 2^-100 (derived).
ORDINARY = 20


@dataclass(frozen=True)
class UnitScale:
    """A stack on its unit scale.

    Attributes:
        stack: The models, divided by `2^exponent`.
        exponent: 0 where they are of that order as they are.
        fixed_step: Whether some entries are too small to be normal numbers of their dtype, so that their step is the
            same however small they are: the noise of the scaled stack is then told, and it lies on no grid.
    """

    stack: Stack
    exponent: int = 0
    fixed_step: bool = False

    @classmethod
    def of(cls, stack: Stack) -> "UnitScale":
        """Scale a stack.

        Raises:
            NonFinite: A model holds NaN or Inf.
        """
        exponent = math.frexp(float(stack.typical.max()))[1]
        if abs(exponent) <= ORDINARY:
            return cls(stack)
        fixed_step = any(map(_has_subnormal, stack.matrices))
        noise: tuple[float, ...] = ()
        if stack.noise_override:
            noise = tuple(_scaled(told, -exponent) for told in stack.noise_override)
        elif fixed_step:
            noise = tuple(_noise(W_i, -exponent) for W_i in stack.matrices)
        matrices = tuple(times_power_of_two(W_i, -exponent) for W_i in stack.matrices)
        return cls(replace(stack, matrices=matrices, noise_override=noise), exponent, fixed_step)


def _has_subnormal(matrix: Tensor) -> bool:
    return bool((matrix.abs().lt(torch.finfo(matrix.dtype).tiny) & matrix.ne(0)).any())


def _noise(matrix: Tensor, exponent: int) -> float:
    """Root mean square of a matrix's rounding to its dtype, scaled before it is squared."""
    steps = times_power_of_two(spacing(sample_rows(matrix), matrix.dtype), exponent)
    return float(step_variance(steps.square().mean()).sqrt())


def _scaled(value: float, exponent: int) -> float:
    return float(times_power_of_two(torch.tensor(value, dtype=torch.float64), exponent))
