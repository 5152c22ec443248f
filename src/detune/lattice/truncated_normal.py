"""Moments of a normal number that is known to lie in an interval: what one rounded entry says of the number it was."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG_ROOT_2_PI = math.log(2 * math.pi) / 2
# Beyond so many standard deviations the tail is taken from its asymptote.
FAR = 6.0
# Below -LEAST nothing is left of the tail.
LEAST = 35.0
# Where the density and the tail are next to nothing in a dtype: computing what underflows takes ten times as long.
NO_DENSITY = {torch.float64: -708.0, torch.float32: -87.0}
NO_TAIL = {torch.float64: 26.0, torch.float32: 9.0}
# Over intervals narrower than this the density is a parabola: differences of Phi would have no digits left.
THIN = {torch.float64: 1e-3, torch.float32: 0.1}


class Moments(NamedTuple):
    """Of `x ~ N(0, 1)` given that it lies in an interval.

    Attributes:
        log_probability: Of the interval.
        mean: `E[x]`.
        variance: `Var[x]`.
    """

    log_probability: Tensor
    mean: Tensor
    variance: Tensor


def truncated_normal(a: Tensor, width: Tensor) -> Moments:
    """Probability, mean and variance of `x ~ N(0, 1)` given `a < x < b = a + width`.

    Mirrored so that the interval's middle is negative, `Z = Phi(b) - Phi(a)`, the mean is `(phi(a) - phi(b)) / Z` and
    the variance `1 + (a phi(a) - b phi(b)) / Z - mean^2` (Johnson, Kotz & Balakrishnan 1994, Section 13.10.1). Far out
    the density falls from the near end as `exp(-|b| t)` does, and the moments are those of an exponential variable cut
    off at the interval's width.

    Args:
        a: Lower ends, in standard deviations from the mean, float64 or float32.
        width: Of the intervals; given apart, because `b - a` would have no digits left where they are thin. Broadcasts
            to the shape of `a`.
    """
    # Arithmetic: it is many times faster than to choose with `torch.where`.
    middle = a + width / 2
    b = width / 2 - middle.abs()
    a = b - width
    density_a, density_b = _density(a), _density(b)
    Z = (_below(b) - _below(a)).clamp_(min=torch.finfo(a.dtype).tiny)
    mean = (density_a - density_b) / Z
    variance = 1 + (a * density_a - b * density_b) / Z - mean.square()
    log_Z = Z.log_()

    # Far out the density falls so fast that an interval must be narrower to count as thin.
    thin = width * (b / -FAR).clamp_(min=1) < THIN[a.dtype]
    far = ~thin & (b < -FAR)
    special = (thin | far).flatten().nonzero().squeeze(1)
    if len(special):
        b, width = (t.flatten()[special] for t in (b, width.expand_as(b)))
        chosen = thin.flatten()[special]
        narrow, tail = _thin(b - width / 2, width), _far(b, width)
        for whole, one, other in zip((log_Z, mean, variance), narrow, tail, strict=True):
            whole.view(-1)[special] = torch.where(chosen, one, other)
    return Moments(log_Z, torch.copysign(mean, middle), variance.clamp_(min=0))


def _thin(middle: Tensor, width: Tensor) -> Moments:
    second = width.square() / 12
    log_density = -middle.square() / 2 - LOG_ROOT_2_PI + torch.log1p((middle.square() - 1) * second / 2)
    return Moments(width.log() + log_density, middle - middle * second, second)


def _far(b: Tensor, width: Tensor) -> Moments:
    rate = (-b).clamp(min=1)
    kept = -torch.expm1(-rate * width)
    cut = width / kept
    return Moments(
        (kept / rate).log() - b.square() / 2 - LOG_ROOT_2_PI,
        b - 1 / rate + cut * (1 - kept),
        1 / rate.square() - cut.square() * (1 - kept),
    )


def one_sided(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of `z ~ N(0, 1)` given `z < x`: how far its mean is below zero, and by how much its variance below 1.

    `h = phi(x) / Phi(x)` and `h (h + x)` (Johnson, Kotz & Balakrishnan 1994, Section 13.10.1).
    """
    x = x.clamp(min=-LEAST)
    h = _density(x) / _below(x)
    return h, h * (h + x)


def _density(x: Tensor) -> Tensor:
    return (x * x).mul_(-0.5).sub_(LOG_ROOT_2_PI).clamp_(min=NO_DENSITY[x.dtype]).exp_()


def _below(x: Tensor) -> Tensor:
    """Phi(x); torch.special.ndtr has no digits left in the lower tail."""
    return (x * -math.sqrt(0.5)).clamp_(max=NO_TAIL[x.dtype]).erfc_().mul_(0.5)
