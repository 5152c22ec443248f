"""The grid of a float dtype: its spacing, its nearest points, and what a stored value says of the number it was.

A value stored in bf16, fp16 or float32 was some real number between the midpoints to its neighbours; a base that was
stored in such a dtype has its entries on these points. The spacing (the unit in the last place, ulp) doubles at every
power of two, so a row of small and large weights is a row of exact and coarse measurements.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """The reals that round to stored values.

    Attributes:
        low: Lower ends, float64.
        high: Upper ends, float64.
    """

    low: Tensor
    high: Tensor


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring points of the dtype's grid at these values.

    Args:
        values: Any shape, any float dtype.
        dtype: The grid.

    Returns:
        The same shape, float64.
    """
    info = torch.finfo(dtype)
    magnitude = values.to(torch.float64).abs().clamp(min=info.tiny)
    _, exponent = torch.frexp(magnitude)
    return torch.ldexp(torch.full_like(magnitude, info.eps), exponent - 1)


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The grid's point next to each value, float64."""
    step = spacing(values, dtype)
    return torch.round(values.to(torch.float64) / step) * step


def interval(stored: Tensor) -> Interval:
    """The reals that round to stored values.

    Args:
        stored: Any shape, a float dtype: the grid.

    Returns:
        Half a step to either side; at a power of two the step towards zero is half as wide.
    """
    values = stored.to(torch.float64)
    outward = spacing(stored, stored.dtype) / 2
    mantissa, _ = torch.frexp(values.abs())
    inward = torch.where(mantissa.eq(0.5) & values.abs().gt(torch.finfo(stored.dtype).tiny), outward / 2, outward)
    low = torch.where(values > 0, values - inward, values - outward)
    high = torch.where(values < 0, values + inward, values + outward)
    return Interval(low, high)


def lies_on(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether every value is a point of the grid."""
    return torch.equal(values.to(dtype).to(values.dtype), values)
