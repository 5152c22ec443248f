"""The prediction of a model's tensor from base and factors, in arithmetic that gives the same bits everywhere.

A product of floating-point factors depends on the order in which its terms are added, and with it on the number of
threads and the processor. Here the factors are integers times a power of two, so small that every partial sum of the
product is an integer below 2^53: float64 holds each of them exactly, in whatever order a library adds them up, fused or
not. The rest is one correctly rounded operation for each entry (IEEE 754): the sum with the base's entry, and the
rounding to the stored dtype.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from detune.checkpoints import round_to
from detune.numerics.float_grid import spacing
from detune.problem import LowRank

# The error that the integers may add to an entry, in units in the last place: small against the half unit that decides.
TOLERANCE = 1 / 32
# Integers up to this are exact in float64, and so are their sums.
EXACT = 2.0**53


@dataclass(frozen=True)
class IntegerFactors:
    """`M = 2^exponent left @ right.T` with integers.

    Attributes:
        left: `(out, r)`, int32.
        right: `(in, r)`, int32.
        exponent: Exponent of the product's unit.
    """

    left: Tensor
    right: Tensor
    exponent: int

    def __post_init__(self) -> None:
        largest = [float(factor.double().abs().max()) if factor.numel() else 0.0 for factor in (self.left, self.right)]
        if not self.left.shape[1] * largest[0] * largest[1] < EXACT:
            raise ValueError(f"sums of {self.left.shape[1]} products up to {largest} are not exact in float64")

    def dense(self) -> Tensor:
        """The matrix itself, `(out, in)`, float64, exact."""
        return (self.left.double() @ self.right.double().mT) * 2.0**self.exponent


@dataclass(frozen=True)
class Prediction:
    """A model's tensor as predicted from base and factors.

    Attributes:
        values: Rounded to the model's dtype.
        off_centre: How far the unrounded value lies from it, in units in the last place, -1/2 to 1/2, float64: near
            the ends its neighbour is about as likely.
    """

    values: Tensor
    off_centre: Tensor


def to_integers(M: LowRank, stored: Tensor) -> IntegerFactors:
    """Round factors to integers of one unit, as coarse as the stored values allow.

    With unit q for both factors an entry of the product errs by `q sqrt(r / 12) sqrt(mean(L^2) + mean(R^2))`, root mean
    square. q is the power of two that brings this to `TOLERANCE` of the stored values' spacing, or the smallest with
    exact sums.

    Args:
        M: Factors of equal column norms.
        stored: What `W + M` was rounded to, any shape.

    Returns:
        The factors.
    """
    left, right = M.left.double().cpu(), M.right.double().cpu()
    if not M.rank:
        return IntegerFactors(left.to(torch.int32), right.to(torch.int32), 0)
    allowed = TOLERANCE * float(spacing(stored, stored.dtype).square().mean().sqrt())
    error = math.sqrt(M.rank / 12 * float(left.square().mean() + right.square().mean()))
    exponent = math.floor(math.log2(allowed / error))
    # Half a unit more for the rounding; and each integer has to fit its int32.
    peaks = [float(factor.abs().max()) for factor in (left, right)]
    while True:
        largest = [peak * 2.0**-exponent + 0.5 for peak in peaks]
        if M.rank * largest[0] * largest[1] < EXACT and max(largest) < 2.0**31:
            break
        exponent += 1
    left, right = (torch.round(factor * 2.0**-exponent).to(torch.int32) for factor in (left, right))
    return IntegerFactors(left, right, 2 * exponent)


def predict(base: Tensor, factors: IntegerFactors | None, dtype: torch.dtype) -> Prediction:
    """Predict a model's tensor.

    Args:
        base: The base's, as stored, any shape, finite.
        factors: Factors of its change as a matrix; None for no change.
        dtype: The model's.

    Returns:
        The prediction, in the base's shape.
    """
    if factors is None and base.dtype == dtype:
        return Prediction(base, torch.zeros(base.shape, dtype=torch.float64))
    exact = base.double()
    if factors is not None:
        exact = exact + factors.dense().reshape(base.shape)
    values = round_to(exact, dtype)
    return Prediction(values, (exact - values.double()) / spacing(values, dtype))
