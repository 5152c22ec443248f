"""W-Error and the share of identical bits."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Entries in float64 at a time: a few megabytes, which stay in the processor's caches (any number does that they hold).
BLOCK_ENTRIES = 1 << 18


def squared_error(recovered: Tensor, truth: Tensor) -> float:
    """Mean squared error per entry, summed in float64.

    Args:
        recovered: Any shape, any float dtype.
        truth: The same shape.
    """
    return _mean_square(recovered, truth)


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
    largest = max((float(block.abs().max()) for block in _differences(recovered, truth)), default=0.0)
    if not largest:
        return -math.inf
    return 2 * math.log10(largest) + math.log10(_mean_square(recovered, truth, largest))


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
    return int(ours.view(integer).eq(theirs.view(integer)).count_nonzero()) / truth.numel()


def _mean_square(recovered: Tensor, truth: Tensor, unit: float = 1.0) -> float:
    """Mean square of the difference over a unit."""
    sums = [(block / unit).square().sum() for block in _differences(recovered, truth)]
    return float(torch.stack(sums).sum()) / truth.numel() if sums else 0.0


def _differences(recovered: Tensor, truth: Tensor) -> Iterator[Tensor]:
    """The entries of the difference, some after others, float64."""
    if truth.numel():
        pairs = zip(recovered.flatten().split(BLOCK_ENTRIES), truth.flatten().split(BLOCK_ENTRIES), strict=True)
        yield from (ours.double() - theirs.double() for ours, theirs in pairs)
