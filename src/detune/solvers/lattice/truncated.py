"""Moments of a normal number that is known to lie in an interval: what one rounded entry says of the number it was."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Beyond so many standard deviations the tail is taken from its asymptote.
FAR = 6.0
# Intervals narrower than this many standard deviations are points.
THIN = 1e-3


class Moments(NamedTuple):
    """Of `x ~ N(mean, std^2)` given `low < x < high`.

    Attributes:
        log_probability: Of the interval.
        mean: `E[x]`.
        variance: `Var[x]`.
    """

    log_probability: Tensor
    mean: Tensor
    variance: Tensor


def truncated_normal(low: Tensor, high: Tensor, mean: Tensor, std: Tensor) -> Moments:
    """Probability, mean and variance; all arguments broadcast, float64.

    In units of the standard deviation and mirrored so that the interval's middle is negative, `Z = Phi(b) - Phi(a)`,
    the mean is `(phi(a) - phi(b)) / Z` and the variance `1 + (a phi(a) - b phi(b)) / Z - mean^2` (Johnson, Kotz &
    Balakrishnan 1994, Section 13.10.1). A point has the density's value. Far out the density falls from the near end as
    `exp(-|b| t)` does, and the moments are those of an exponential variable cut off at the interval's width.
    """
    a, b = (low - mean) / std, (high - mean) / std
    mirrored = a + b > 0
    a, b = torch.where(mirrored, -b, a), torch.where(mirrored, -a, b)
    density_a, density_b = _density(a), _density(b)
    Z = (_below(b) - _below(a)).clamp(min=1e-300)
    shift = (density_a - density_b) / Z
    variance = 1 + (a * density_a - b * density_b) / Z - shift.square()
    log_Z = Z.log()

    width, middle = b - a, (a + b) / 2
    thin = width < THIN
    shift = torch.where(thin, middle, shift)
    variance = torch.where(thin, width.square() / 12, variance)
    log_Z = torch.where(thin, width.log() - middle.square() / 2 - 0.5 * math.log(2 * math.pi), log_Z)

    far = ~thin & (b < -FAR)
    rate = (-b).clamp(min=1)
    kept = -torch.expm1(-rate * width)
    cut = width / kept
    shift = torch.where(far, b - 1 / rate + cut * (1 - kept), shift)
    variance = torch.where(far, 1 / rate.square() - cut.square() * (1 - kept), variance)
    log_Z = torch.where(far, (kept / rate).log() - b.square() / 2 - 0.5 * math.log(2 * math.pi), log_Z)

    shift = torch.where(mirrored, -shift, shift)
    return Moments(log_Z, mean + std * shift, std.square() * variance.clamp(min=0))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _below(x: Tensor) -> Tensor:
    """Phi(x); torch.special.ndtr has no digits left in the lower tail."""
    return torch.erfc(x / -math.sqrt(2)) / 2
