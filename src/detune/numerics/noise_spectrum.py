"""The singular values of noise: where they lie, and from which size on one is more than noise.

References: Marchenko & Pastur 1967; Gavish & Donoho, "The optimal hard threshold for singular values is 4/√3", 2014
(arXiv 1305.5870).
"""

from functools import cache

import torch

__all__ = ["hard_threshold", "noise_singular_value"]


def hard_threshold(short: int, long: int) -> float:
    """The threshold that leaves the least mean square error of a low rank under noise, over the median singular value.

        lambda(b) / median,    lambda(b)^2 = 2 (b + 1) + 8 b / (b + 1 + sqrt(b^2 + 14 b + 1)),    b = short / long

    with lambda in units of `sqrt(long)` times the noise (Gavish & Donoho, equation 11, the size of the noise unknown).

    Args:
        short: The smaller side.
        long: The larger one.
    """
    b = short / long
    squared = 2 * (b + 1) + 8 * b / (b + 1 + (b * b + 14 * b + 1) ** 0.5)
    return float((squared * long) ** 0.5 / noise_singular_value(0.5, short, long))


@cache
def noise_singular_value(share: float, short: int, long: int) -> float:
    """The singular value below which a share of them lies, for independent entries of variance one.

    By the law of Marchenko & Pastur, with `b = short / long`, the density of the squares over `long` is
    `sqrt((x_+ - x)(x - x_-)) / (2 pi b x)` between `x_± = (1 ± sqrt b)^2`.
    """
    b = short / long
    low, high = (1 - b**0.5) ** 2, (1 + b**0.5) ** 2
    # Evenly spaced angles: their density has no pole where the law's has one.
    angle = torch.linspace(0, torch.pi, 20001, dtype=torch.float64)
    x = (low + high) / 2 - (high - low) / 2 * angle.cos()
    density = angle.sin().square() / x.clamp(min=1e-12)
    mass = density.cumsum(dim=0)
    return float((x[int(torch.searchsorted(mass, share * mass[-1]))] * long).sqrt())
