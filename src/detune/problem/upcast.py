"""Half-precision merges that were saved in a finer dtype beside merges that are finer.

Such a model has every entry on the coarser grid, and so has one that left a half-precision base as it was. The others
tell which: from the base they differ by their deltas, of low rank and rounded finely; from a merge by its rounding,
too, which has full rank.
"""

from dataclasses import replace

import torch
from torch import Tensor

from detune.numerics.float_grid import HALVES, lies_on
from detune.problem.rank_rule import SIGNAL, is_full_rank, rank_over
from detune.problem.stack import Stack
from detune.problem.storage_noise import noise_edge, sample_rows, storage_variance

# Rows and columns that show whether a difference has a low rank: few are quick, and many tell of higher ranks (any
# numbers do that are larger than adapters' ranks).
SIDES = (128, 1024)


def as_merged(stack: Stack) -> Stack:
    """The models in the dtypes that they were merged in.

    Args:
        stack: The models, as stored.

    Returns:
        The same models; those that were rounded to half precision before they were saved more finely in that dtype.
    """
    if stack.noise_override or stack.n < 2 or min(stack.shape) < 2:
        return stack
    coarser = {i: dtype for i in range(stack.n) if (dtype := _coarser(stack, i)) is not None}
    finer = [W_i for i, W_i in enumerate(stack.matrices) if i not in coarser]
    merged = {
        i: dtype
        for i, dtype in coarser.items()
        if finer and all(_differs_at_full_rank(stack.matrices[i], W_j) for W_j in finer)
    }
    if not merged:
        return stack
    return replace(stack, matrices=tuple(W_i.to(merged.get(i, W_i.dtype)) for i, W_i in enumerate(stack.matrices)))


def _coarser(stack: Stack, model: int) -> torch.dtype | None:
    """The dtype of half precision that a model lies on, coarser than the one it was rounded to by the stack."""
    W_i, eps = stack.matrices[model], torch.finfo(stack.rounded_dtypes[model]).eps
    sample = sample_rows(W_i)
    grids = (grid for grid in HALVES if torch.finfo(grid).eps > eps and lies_on(sample, grid) and lies_on(W_i, grid))
    return max(grids, key=lambda grid: torch.finfo(grid).eps, default=None)


def _differs_at_full_rank(W_i: Tensor, W_j: Tensor) -> bool:
    """Whether two models differ at full rank, by the noise of the second."""
    return all(_of_full_rank(_spread(W_j, side), _spread(W_i, side)) for side in SIDES)


def _of_full_rank(W_j: Tensor, W_i: Tensor) -> bool:
    floor = SIGNAL * float(noise_edge((W_j.shape[0], W_j.shape[1]), storage_variance(W_j)))
    return is_full_rank(rank_over(torch.linalg.svdvals(W_j.double() - W_i.double()), floor), min(W_j.shape))


def _spread(W: Tensor, side: int) -> Tensor:
    """Some rows and columns of a matrix, at regular distances."""
    return sample_rows(sample_rows(W, side).mT, side).mT
