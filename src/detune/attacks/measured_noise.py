"""Noise that is more than storage's: measured in the differences, and then known to the recovery.

`detune recover` takes rounding to the dtype for the only noise. Where a defence has added some, or has rounded to fewer
values, every difference of two releases has full rank to it. But noise of independent entries is known by its
spectrum: the bulk of a difference's singular values lies as the law of Marchenko & Pastur says, and its median tells
the size. What stands over the bulk's edge are the adapters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import ClassVar

import torch
from torch import Tensor

from detune.attacks.rebuild import rebuild
from detune.fitting.ard import ARDFit, fit_ard
from detune.fitting.differences import ring
from detune.methods import Auto, Intersect, Mean
from detune.numerics.linalg import orthonormal
from detune.numerics.noise_spectrum import noise_singular_value
from detune.problem import NotRecoverable, Stack

# Differences whose noise is measured; one would do, were all noise alike.
PAIRS = 3
# The upper quartile of noise lies within this share of where it should, beside the median. What quantisation leaves,
# some rows of which are louder, is off by 7 %; weights in other units are by 60 %.
UNEVEN = 0.15

__all__ = ["Denoise", "best_split", "denoised", "is_white", "noise_size", "with_measured_noise"]


@dataclass(frozen=True)
class Denoise:
    """Measure the noise, cut the differences at its edge, split the adapters off, average over the releases.

    What cannot be told from noise stays in the mean. The best that can be had is the noise over the root of the number
    of releases.

    Reference:
        Gavish & Donoho, "The optimal hard threshold for singular values is 4/√3", 2014 (arXiv 1305.5870): the size of
        the noise by the median singular value.
    """

    name: ClassVar[str] = "denoise"
    about: ClassVar[str] = "measures noise by the bulk of the differences' spectra, and recovers above it"
    min_models: ClassVar[int] = 3

    def run(self, models: Sequence[Path], out: Path) -> None:
        """Recover; see `Attack.run`."""
        rebuild(models, out, self.min_models, lambda name, stack: denoised(stack))


def denoised(stack: Stack) -> Tensor:
    """One matrix, recovered with its noise measured."""
    stack = with_measured_noise(stack)
    return best_split(stack).weight if stack.noise_override else _recovered(stack)


def best_split(stack: Stack) -> ARDFit:
    """The more credible of two splits: from what each model has of its own, and from the closed form.

    Where the noise is small beside the adapters, spaces that nearly coincide are told apart by the closed form alone:
    taking turns would take for ever.

    Args:
        stack: The models, their noise told.
    """
    splits = [fit_ard(stack)]
    try:
        deltas = Intersect().solve(stack).deltas
    except NotRecoverable:
        return splits[0]
    if any(M_i.rank for M_i in deltas):
        splits.append(fit_ard(stack, [orthonormal(M_i.right.double()) for M_i in deltas]))
    return min(splits, key=lambda split: split.cost)


def _recovered(stack: Stack) -> Tensor:
    try:
        return Auto(lattice=None).solve(stack).weight
    except NotRecoverable:
        return Mean().solve(stack).weight


def with_measured_noise(stack: Stack) -> Stack:
    """The stack with the noise that its differences show, where it is more than storage's.

    Args:
        stack: At least two models, whose noise is of one size.
    """
    noise = median(
        noise_size(stack.matrices[i].double() - stack.matrices[j].double()) for i, j in ring(stack.n)[:PAIRS]
    )
    # A few percent more than storage's are the error of the measurement, or adapters of high rank.
    if noise <= 2 * float(stack.noise.max()):
        return stack
    return replace(stack, noise_override=(noise,) * stack.n)


def noise_size(difference: Tensor) -> float:
    """Root mean square of the noise in each of two models, by the median singular value of their difference.

    Args:
        difference: `(out, in)`, adapters of low rank and all.
    """
    values = torch.linalg.svdvals(difference)
    return float(values.median()) / (noise_singular_value(0.5, *sorted(difference.shape)) * 2**0.5)


def is_white(difference: Tensor) -> bool:
    """Whether the bulk of a difference is noise of independent entries, by the shape of its spectrum.

    Adapters stand over the bulk. What turned or scaled weights leave has their own spectrum, which falls far more
    steeply, but for weights that are as random as noise.

    Args:
        difference: Difference of two models, `(out, in)`.
    """
    values = torch.linalg.svdvals(difference)
    middle, upper = (float(values.quantile(share)) for share in (0.5, 0.75))
    expected = noise_singular_value(0.75, *sorted(difference.shape)) / noise_singular_value(
        0.5, *sorted(difference.shape)
    )
    return middle > 0 and abs(upper / middle / expected - 1) < UNEVEN
