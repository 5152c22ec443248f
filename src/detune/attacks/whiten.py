"""Noise that is louder in some input directions than in others: made alike in all, before it is taken off.

`W_i L` with an invertible L of the inputs has the same adapters' ranks, and noise of covariance `L^T S L` in its rows.
With `L = S^(-1/2)` that is white, and directions that the defence left quiet come out as clear as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from detune.attacks.measured_noise import best_split, denoised, with_measured_noise
from detune.attacks.rebuild import rebuild
from detune.problem import Stack

__all__ = ["Whiten", "whitened"]

# Below this share of the loudest direction, noise counts as none.
LEAST = 1e-12


@dataclass(frozen=True)
class Whiten:
    """Measure the noise's covariance over the inputs, whiten, split the adapters off, and turn back.

    The covariance is that of what `denoise` leaves unexplained. It is measured again after whitening, because adapters
    that were hidden under the loud directions were in it.

    Attributes:
        rounds: How often it is measured.
    """

    name: ClassVar[str] = "whiten"
    about: ClassVar[str] = "denoise, after the noise was made alike in all input directions"
    min_models: ClassVar[int] = 3

    rounds: int = 3

    def run(self, models: Sequence[Path], out: Path) -> None:
        """Recover; see `Attack.run`."""
        rebuild(models, out, self.min_models, lambda name, stack: whitened(stack, self.rounds))


def whitened(stack: Stack, rounds: int = 3) -> Tensor:
    """Whiten the noise of one matrix over its inputs, then recover it.

    Args:
        stack: At least three models.
        rounds: How often the noise's covariance is measured.
    """
    stack = with_measured_noise(stack)
    if not stack.noise_override:
        return denoised(stack)
    split = best_split(stack)
    rest, weight = split.rest(stack), split.weight
    for _ in range(rounds):
        variances, directions = _covariance(rest)
        scale = variances.clamp(min=LEAST * float(variances.max())).sqrt()
        matrices = tuple(W_i.double() @ directions / scale for W_i in stack.matrices)
        white = replace(stack, matrices=matrices, dtype=torch.float64, noise_override=(1.0,) * stack.n)
        split = best_split(white)
        weight, rest = (split.weight * scale) @ directions.mT, (split.rest(white) * scale) @ directions.mT
    return weight


def _covariance(rest: Tensor) -> tuple[Tensor, Tensor]:
    """Variances of the noise of one model along its principal input directions, and these."""
    n, out, width = rest.shape
    rows = rest.reshape(n * out, width)
    # The mean took one n-th of it.
    variances, directions = torch.linalg.eigh(rows.mT @ rows / ((n - 1) * out))
    return variances.clamp(min=0), directions
