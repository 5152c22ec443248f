"""The singular values of a difference: a low rank is a cliff in them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detune.audit.record import Spectrum
from detune.numerics.linalg import randomized_svd
from detune.numerics.random import seeded
from detune.problem import Stack
from detune.problem.stack import matricise

__all__ = ["spectrum"]

# The leading values of larger matrices are estimated.
EXACT_UP_TO = 1024
# Values shown: this multiple of the rank, within these bounds.
TIMES, LEAST, MOST = 2, 48, 256


def spectrum(tensors: Sequence[Tensor], ranks: Sequence[int]) -> Spectrum:
    """The largest singular values of `W_2 - W_1 = M_2 - M_1`.

    Args:
        tensors: Tensors of two releases, as stored.
        ranks: Found for them; empty where none were.
    """
    stack = Stack.of([matricise(tensor) for tensor in tensors[:2]])
    difference = stack.matrices[1].double() - stack.matrices[0].double()
    rank = sum(ranks[:2]) if ranks else None
    shown = min(*difference.shape, max(LEAST, MOST if rank is None else min(MOST, TIMES * rank)))
    if min(difference.shape) <= EXACT_UP_TO:
        values = torch.linalg.svdvals(difference)
    else:
        _, values, _ = randomized_svd(
            difference, min(*difference.shape, shown + shown // 2), seeded(0, difference.device)
        )
    noise = math.hypot(*(float(stack.noise_norm(i, stack.shape[0])) for i in range(2)))
    return Spectrum(values=tuple(values[:shown].tolist()), rank=rank, noise=noise)
