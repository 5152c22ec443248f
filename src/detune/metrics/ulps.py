"""Distances in units in the last place."""

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def ordered_bits(values: Tensor) -> Tensor:
    """Number the values of a dtype in their order: neighbours differ by 1, and every bit pattern has its own number.

    Of a float the magnitude bits of negative numbers are flipped, so that -0 comes just below 0 and NaNs lie outside.

    Args:
        values: Any shape; a real float dtype, or anything else of 1, 2, 4 or 8 bytes, which keeps its bits.

    Returns:
        The same shape, an integer dtype of the same width. `from_ordered_bits` turns it back.
    """
    bits = values.contiguous().view(_INTEGERS[values.element_size()])
    return _flip(bits) if values.is_floating_point() else bits


def from_ordered_bits(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of a dtype with these numbers: the inverse of `ordered_bits`."""
    return (_flip(numbers) if dtype.is_floating_point else numbers).contiguous().view(dtype)


def ulps(got: Tensor, expected: Tensor) -> Tensor:
    """The number of steps of the dtype between two values, entry by entry.

    Args:
        got: Any shape, a float dtype; compared in that of `expected`.
        expected: The same shape.

    Returns:
        The same shape, int64, not negative. Between float64 of opposite signs there can be more than it holds; then
        it is the most that it holds.
    """
    ours, theirs = (ordered_bits(values.to(expected.dtype)).long() for values in (got, expected))
    distance = ours - theirs
    if expected.element_size() < ours.element_size():
        return distance.abs()
    overflowed = ((ours ^ theirs) & (ours ^ distance)) < 0
    return torch.where(overflowed, torch.iinfo(torch.int64).max, distance.abs())


def _flip(bits: Tensor) -> Tensor:
    # The shift spreads the sign over all bits.
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) & torch.iinfo(bits.dtype).max)
