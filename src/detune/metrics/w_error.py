"""W-Error and the share of identical bits."""

import math

import torch
from torch import Tensor


def squared_error(recovered: Tensor, truth: Tensor) -> float:
    """Mean squared error per entry, summed in float64.

    Args:
        recovered: Any shape, any float dtype.
        truth: The same shape.
    """
    if truth.numel() == 0:
        return 0.0
    return float((recovered.double() - truth.double()).square().mean())


def w_error(recovered: Tensor, truth: Tensor) -> float:
    """`log10` of the mean squared error of one matrix; `-inf` where the two are equal.

    Over several layers the paper averages these logarithms, because outlier layers dominate a plain mean.

    Args:
        recovered: Any shape, any float dtype.
        truth: The same shape.

    Reference:
        Horwitz, Kahana & Hoshen 2024 (arXiv 2402.10208), Section 5.1.
    """
    error = squared_error(recovered, truth)
    if 0 < error < math.inf:
        return math.log10(error)
    # The squares of very small and very large numbers have no float.
    difference = recovered.double() - truth.double()
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    if not largest:
        return -math.inf
    return 2 * math.log10(largest) + math.log10(squared_error(difference / largest, torch.zeros_like(difference)))


def bit_identical(recovered: Tensor, truth: Tensor) -> float:
    """Share of entries that are equal bit for bit, in [0, 1]; values are compared in the truth's dtype.

    Args:
        recovered: Any shape, any dtype.
        truth: The same shape.
    """
    if truth.numel() == 0:
        return 1.0
    ours, theirs = recovered.to(truth.dtype).contiguous(), truth.contiguous()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[truth.element_size()]
    return float((ours.view(integer) == theirs.view(integer)).double().mean())
