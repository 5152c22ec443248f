"""The grid of a float dtype: its spacing, its nearest points, and what a stored value says of the number it was.

A value stored in bf16, fp16 or float32 was some real number between the midpoints to its neighbours; a base that was
stored in such a dtype has its entries on these points. The spacing (the unit in the last place, ulp) doubles at every
power of two, so a row of small and large weights is a row of exact and coarse measurements.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
# Steps that are more than 64 times others are coarse beside these: float32 and fp16 are 2^13 apart, fp16 and bf16 2^3,
# and 64 is between (derived).
COARSE = 64.0
# The exponent's bits of a positive float64, by definition of the format.
EXPONENT = 0x7FF0000000000000


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype as people write it.

    Example:
        >>> name_of(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def finely_stored(dtypes: Sequence[torch.dtype]) -> tuple[int, ...]:
    """The places of the dtypes that are about as fine as the finest.

    Example:
        >>> finely_stored([torch.bfloat16, torch.float32, torch.float16])
        (1,)
    """
    steps = [torch.finfo(dtype).eps for dtype in dtypes]
    return tuple(i for i, step in enumerate(steps) if step <= COARSE * min(steps))


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
    return _binade(values.to(torch.float64), dtype) * torch.finfo(dtype).eps


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
    binade = _binade(values, stored.dtype)
    outward = binade * (torch.finfo(stored.dtype).eps / 2)
    magnitude, sign = values.abs(), values.sign()
    power = magnitude.eq(binade) & magnitude.gt(torch.finfo(stored.dtype).tiny)
    # On one of the two sides; sums of what differs in its last bits only, and exact.
    less = power * outward / 4
    return Interval(values - outward + less * (1 + sign), values + outward - less * (1 - sign))


def lies_on(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether every value is a point of the grid."""
    return torch.equal(values.to(dtype).to(values.dtype), values)


def _binade(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest power of two up to each magnitude, of those that are normal numbers of the dtype; float64."""
    magnitude = values.abs().clamp_(min=torch.finfo(dtype).tiny)
    # A float64 whose fraction is cut off; `frexp` does the same in ten times the time.
    return magnitude.view(torch.int64).bitwise_and_(EXPONENT).view(torch.float64)


def times_power_of_two(values: Tensor, exponent: int) -> Tensor:
    """`2^exponent x` in the dtype of x: exact for numbers that stay in its normal range, copied.

    Args:
        values: Any shape, a float dtype.
        exponent: Any size: it is applied in two steps, because the power itself may have no float.
    """
    half = exponent // 2
    return values.mul(2.0**half).mul_(2.0 ** (exponent - half))
