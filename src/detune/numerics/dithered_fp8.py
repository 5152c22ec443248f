"""Stochastic rounding to fp8, and what it says of the numbers that were rounded once its dither is known.

With the step s of fp8 at a number x, and a dither u that is uniform on [0, 1),

    round(x) = sign(x) floor(|x| / s + u) s ,

which is x on average over u. ComfyUI rounds so when it merges a LoRA into fp8 weights, and draws u from a generator
that the tensor's name seeds. Then u is no secret, and is the same in every model: the rounding is a known function, and
`|x|` lies in `[q - u s, q + (1 - u) s)` where q is stored.

Reference: `stochastic_rounding` in `comfy/float.py` and `string_to_seed` in `comfy/utils.py` of ComfyUI (the CRC-32 of
the name; float16 first; 8 bits of u in its faster version). On a GPU the same seed draws other numbers, as public.
"""

import zlib

import torch
from torch import Tensor

from detune.numerics.float_grid import Interval, lies_on, spacing

__all__ = ["fp8_grid_of", "fp8_interval", "fp8_stochastic", "named_dither"]

# The dither has eight random bits, by definition of the rounding that is reproduced.
_LEVELS = 256
# A coarser fraction first: within its range every number of e5m2 is one of e4m3, but for the smallest.
_GRIDS = (torch.float8_e5m2, torch.float8_e4m3fn)


def named_dither(name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The dither of a tensor: multiples of 1/256 in [0, 1), by its name alone, float64."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randint(_LEVELS, shape, generator=generator, dtype=torch.uint8).double() / _LEVELS


def fp8_stochastic(values: Tensor, dither: Tensor, dtype: torch.dtype) -> Tensor:
    """Round up with the probability of the place between two points of the grid.

    Args:
        values: Any shape, any float dtype.
        dither: The same shape, float64, in [0, 1).
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.

    Returns:
        Points of the grid, float64; beyond its largest number that one. Zero keeps the sign of what it was.
    """
    magnitude = values.half().double().abs().clamp(max=torch.finfo(dtype).max)
    step = spacing(magnitude, dtype)
    rounded = torch.floor(magnitude / step + dither) * step
    return torch.copysign(rounded.clamp(max=torch.finfo(dtype).max), values.double())


def fp8_interval(stored: Tensor, dither: Tensor, dtype: torch.dtype) -> Interval:
    """The reals that `fp8_stochastic` rounds to stored values with this dither.

    Args:
        stored: Any shape, any float dtype; points of the grid.
        dither: The same shape, float64.
        dtype: The grid.

    Returns:
        The ends, float64; what rounds to the largest number ends at float16's.
    """
    point, limits = stored.double().abs(), torch.finfo(dtype)
    step = spacing(point, dtype)
    # Below a power of two the step is half as long, and a number from there may have been rounded up to it.
    below = torch.where((torch.frexp(point).mantissa == 0.5) & (point > limits.tiny), step / 2, step)
    low = (point - dither * below).clamp(min=0)
    high = torch.where(point < limits.max, point + (1 - dither) * step, torch.finfo(torch.float16).max)
    # Before that, the number was rounded to float16.
    low = (low - spacing(low, torch.float16) / 2).clamp(min=0)
    high = high + spacing(high, torch.float16) / 2
    negative = torch.signbit(stored)
    return Interval(torch.where(negative, -high, low), torch.where(negative, -low, high))


def fp8_grid_of(values: Tensor) -> torch.dtype | None:
    """The fp8 dtype whose points all values are; None where they are none's."""
    return next((dtype for dtype in _GRIDS if lies_on(values.float(), dtype)), None)
