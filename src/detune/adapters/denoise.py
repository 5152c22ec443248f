"""The part of a full fine-tune's change that stands over its own noise, at low rank.

Training every weight moves each by what the task asks for and by chance. In `D = W_ft - W` the one is few large
directions and the other a bulk, and a hard threshold on the singular values keeps the first.

Reference: the threshold is that of Gavish & Donoho 2014 (arXiv 1305.5870). To use it on fine-tunes was proposed as
DG-Hard (arXiv 2605.20296), which could not be read: what is here follows from a description in one line.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detune.numerics.device import full_precision
from detune.numerics.noise_spectrum import hard_threshold
from detune.problem import LowRank, Stack
from detune.problem.solving import Prepared

__all__ = ["Denoised", "denoise_change"]


@dataclass(frozen=True)
class Denoised:
    """A change without its noise.

    Attributes:
        change: The factors, with columns of equal norm on either side; of rank 0 where nothing stands over the noise.
        kept: Share of the change's energy that they hold.
    """

    change: LowRank
    kept: float


@full_precision()
def denoise_change(
    W: Tensor, W_ft: Tensor, rank: int | None = None, device: torch.device | str | None = None
) -> Denoised:
    """Cut the singular values of `W_ft - W` at the optimal hard threshold, the noise's size told by their median.

    Args:
        W: The base's matrix as stored, `(out, in)`, a float dtype.
        W_ft: The fine-tune's, same shape.
        rank: The most that is kept; None keeps all that stand over the threshold.
        device: Where to compute; None is where the matrices lie.

    Raises:
        NonFinite: One holds NaN or Inf.
    """
    prepared = Prepared.of(Stack.of([W, W_ft], device=device))

    def split(part: Stack) -> tuple[LowRank, LowRank]:
        return LowRank(part.zeros(part.shape[0], 0), part.zeros(part.shape[1], 0)), _denoise(part, rank).change

    found = _denoise(prepared.foretold(split).stack, rank)
    return replace(found, change=found.change.times_power_of_two(prepared.scale.exponent))


def _denoise(stack: Stack, rank: int | None) -> Denoised:
    """Denoise the change of a stack of `W` and `W_ft` on its unit scale."""
    W, W_ft = (matrix.to(stack.device, stack.dtype) for matrix in stack.matrices)
    U, S, Vh = torch.linalg.svd(W_ft - W, full_matrices=False)
    r = int(S.gt(hard_threshold(*sorted(stack.shape)) * S.median()).sum())
    r = r if rank is None else min(rank, r)
    root = S[:r].sqrt()
    energy = float(S.square().sum())
    kept = float(S[:r].square().sum()) / energy if energy else 0.0
    return Denoised(LowRank(U[:, :r] * root, Vh[:r].mT * root), kept)
