"""A prior against one frozen A: a guess from what a weight matrix usually looks like.

With `W_i = W + B_i A` the part of W outside A's row space is any single release's. Inside, the releases show
`w + B_i`, w = W A^+, and every w explains them. Only a prior can choose:

- the smallest adapters, `min sum_i |B_i|^2`: w is the mean of what they show, which is what averaging gives;
- the rest of W: were its columns alike, w could be told from them. A ridge regression of the mean's inside on W's
  outside says how far, by cross-validation over the rows, and the two guesses are weighed by their variances.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from detune.attacks.measured_noise import denoised
from detune.attacks.rebuild import rebuild
from detune.problem import Stack

__all__ = ["Prior", "guessed"]

FOLDS = 8
# Ridges that are tried, as shares of the largest eigenvalue of the outside's covariance.
RIDGES = tuple(10.0**power for power in range(-4, 3))
# Singular values of what differs count from this multiple of the storage noise's norm.
OVER_NOISE = 4.0
# A frozen A gives all releases together no more dimensions than two of them, but for directions below the noise.
SHARED = 1.25


@dataclass(frozen=True)
class Prior:
    """Guess W where all releases differ in one common row space; elsewhere recover as `denoise` does."""

    name: ClassVar[str] = "prior"
    about: ClassVar[str] = "guesses what a frozen A hides, from the rest of the matrix"
    min_models: ClassVar[int] = 3

    def run(self, models: Sequence[Path], out: Path) -> None:
        """Recover; see `Attack.run`."""
        rebuild(models, out, self.min_models, lambda name, stack: guessed(stack))


def guessed(stack: Stack) -> Tensor:
    """Guess one matrix where all releases share a row space; recover the rest.

    Args:
        stack: At least three models.
    """
    models = torch.stack([W_i.double() for W_i in stack.matrices])
    mean = models.mean(dim=0)
    centred = models - mean
    floor = OVER_NOISE * float(stack.noise_norm(0, stack.shape[0]))
    together = _row_space(centred.flatten(0, 1), floor)
    two = _row_space(models[0] - models[1], floor).shape[1]
    if not two or together.shape[1] > SHARED * two:
        return denoised(stack)
    outside = mean - (mean @ together) @ together.mT
    inside = mean @ together
    # The adapters' part of the mean's inside, if these are independent between models and zero on average.
    adapters = float((centred @ together).square().sum()) / ((stack.n - 1) * inside.numel()) / stack.n
    predicted, squared_error = _from_the_rest(outside, inside)
    spread = max(0.0, squared_error - adapters)
    trust = spread / (spread + adapters)
    return outside + (predicted + trust * (inside - predicted)) @ together.mT


def _row_space(matrix: Tensor, floor: float) -> Tensor:
    """Right singular vectors over the noise, `(in, r)`."""
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    space: Tensor = vectors[:, values.clamp(min=0).sqrt() > floor]
    return space


def _from_the_rest(outside: Tensor, inside: Tensor) -> tuple[Tensor, float]:
    """Each row's inside as its outside predicts it, from the other rows; and the mean squared error of that."""
    folds = torch.arange(len(outside)) % FOLDS
    best, least = torch.zeros_like(inside), float(inside.square().mean())
    for ridge in RIDGES:
        predicted = torch.empty_like(inside)
        for fold in range(FOLDS):
            learn, tell = folds != fold, folds == fold
            Z = outside[learn]
            gram = Z.mT @ Z
            strength = ridge * float(gram.diagonal().mean())
            T = torch.linalg.solve(gram + strength * torch.eye(len(gram), dtype=gram.dtype), Z.mT @ inside[learn])
            predicted[tell] = outside[tell] @ T
        error = float((predicted - inside).square().mean())
        if error < least:
            best, least = predicted, error
    return best, least
