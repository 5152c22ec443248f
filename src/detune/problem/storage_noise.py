"""The model of storage noise: every weight was rounded once to its dtype. Where it ends, and what is more than it.

Rounding is to the nearest, so an error is uniform within half a step to either side. `detune.numerics.float_grid` has
the other side of it, the reals that round to a stored number.
"""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from detune.numerics.float_grid import HALVES, lies_on, spacing

# Goodness of fit is the root mean square of a residual over that of the storage noise, at three levels. Up to this one
# the residual is the noise: the ratio scatters by less than a hundredth, from two matrices of 64x64 on (derived).
AT_NOISE = 1.05
# Above this one there is an excess, of a fifth in the variance: twice the scatter of its estimate, a few per cent, and
# of the rounding that a merge adds on its way (definition of a doubt).
EXCESS_VARIANCE = 1.2
# Above this one the fit does not explain the models: the closed form alone leaves 1.05 to 1.86 times the noise for
# LoRA, rsLoRA, AdaLoRA and VB-LoRA, and 180 times and more for HRA (measured on `tiny_set` of benchmarks/peft_sets.py,
# three and five models).
FLOOR_RATIO = 2.0
# Factors are computed to 32 units of float64's precision: the square root of a thousand products (derived).
COMPUTED = 32 * torch.finfo(torch.float64).eps


def storage_variance(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Variance of the rounding error of stored values: `ulp(x)^2 / 12`, uniform within half a unit in the last place.

    Args:
        values: Any shape, a float dtype.
        dtype: That they were rounded to; None is their own.

    Returns:
        The same shape, float64.
    """
    return step_variance(spacing(values, dtype or values.dtype).square())


def step_variance(square: Tensor) -> Tensor:
    """Variance of the error of rounding to numbers that are a step apart, `step^2 / 12`, from the step's square."""
    return square / 12


def draw_rounding(deviation: Tensor, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Draw errors as rounding makes them: independent and uniform.

    Args:
        deviation: The standard deviation of each, any shape, float64.
        generator: On the same device.
        scale: A factor of all of them.

    Returns:
        The same shape, float64.
    """
    drawn = torch.rand(deviation.shape, generator=generator, dtype=torch.float64, device=deviation.device) - 0.5
    return drawn * deviation * (12**0.5 * scale)


def storage_energy(matrix: Tensor) -> float:
    """Expected energy of the rounding error of a stored matrix, judged by some rows as the noise of the models is."""
    return float(storage_variance(sample_rows(matrix)).mean()) * matrix.numel()


@overload
def noise_edge(shape: tuple[int, int], variance: float) -> float: ...
@overload
def noise_edge(shape: tuple[int, int], variance: Tensor) -> Tensor: ...
def noise_edge(shape: tuple[int, int], variance: float | Tensor) -> float | Tensor:
    """The edge of the spectrum of independent noise: the largest singular value that it has, to some per cent.

        max_row sqrt(sum variance) + max_column sqrt(sum variance)

    (Bandeira & van Handel 2016, arXiv 1408.6185, Theorem 1.1, without its lower-order term). On equal variances it is
    `sigma (sqrt d + sqrt k)` (Davidson & Szarek 2001, Theorem II.13); on unequal ones it is a bound, up to a third too
    high.

    Args:
        shape: `(rows, columns)` of the noise.
        variance: One for all entries, or those of some rows, which stand for all: `(some, columns)`, float64.

    Returns:
        A float for one variance, a float64 scalar on the variances' device for several.
    """
    rows, columns = shape
    if not isinstance(variance, Tensor):
        return float(variance**0.5 * (rows**0.5 + columns**0.5))
    column, row = variance.mean(dim=0).max() * rows, variance.mean(dim=1).max() * columns
    return column.sqrt() + row.sqrt()


def as_rounded(samples: Sequence[Tensor]) -> list[Tensor]:
    """Convert values to the dtype that they were rounded to: files may hold what was in a coarser dtype before.

    All must lie on its grid. One alone is a model that left a half-precision base as it was: exact, not coarse.
    """
    samples = list(samples)
    for dtype in HALVES:
        if all(sample.dtype.itemsize <= 2 or lies_on(sample, dtype) for sample in samples):
            samples = [sample if sample.dtype.itemsize <= 2 else sample.to(dtype) for sample in samples]
            break
    # fp16 has three bits more, and holds all but the smallest numbers of bf16.
    if all(sample.dtype.itemsize == 2 and lies_on(sample, torch.bfloat16) for sample in samples):
        return [sample.bfloat16() for sample in samples]
    return samples


def sample_rows(matrix: Tensor, rows: int = 64) -> Tensor:
    """Pick evenly spaced rows: their noise stands for that of the matrix."""
    return matrix[:: max(1, matrix.shape[0] // rows)]
