"""Stacks of mixed precision: models stored far more coarsely than others say next to nothing of W beside them.

Least squares weighs all models alike: one bf16 merge beside three in float32 leaves its own rounding in W, and rounds
away what it holds of a small delta. So W is found from the finely stored models where they are enough; the
differences of the others from it are their `M_i`. Where too few are fine, all are asked: on the base's grid each entry
says what its own dtype holds; off it, least squares takes them as coarse as the coarsest if that hides what the others
show.
"""

from dataclasses import replace

import torch

from detune.fitting.differences import find_differences
from detune.lattice import is_coarse
from detune.numerics.float_grid import finely_stored, name_of
from detune.problem.recovery import FEWEST_MODELS, NotRecoverable, Recovery
from detune.problem.stack import Stack
from detune.source_models.solve_from import Solve, solve_from

COARSELY = "the others are stored far more coarsely"


def solve_from_finest(stack: Stack, solve: Solve, rank: int | None) -> Recovery | None:
    """The answer of the finely stored models, with the deltas of all.

    Args:
        stack: The models.
        solve: What recovers from the finely stored ones.
        rank: The most that any `M_i` can have.

    Returns:
        The recovery; None where all models are stored about alike, where the fine ones are not enough, and where
        another model does not differ from their answer by a low rank.
    """
    fine = _fine_models(stack)
    if not FEWEST_MODELS <= len(fine) < stack.n:
        return None
    return solve_from(stack, fine, solve, rank, COARSELY)


def _fine_models(stack: Stack) -> tuple[int, ...]:
    if stack.noise_override:
        return _least_noisy(stack)
    return finely_stored(stack.rounded_dtypes)


def _least_noisy(stack: Stack) -> tuple[int, ...]:
    """The models whose mean has the least noise, `sum sigma_i^2 / m^2`: all, or the finest, as many as show ranks."""
    order = sorted(range(stack.n), key=lambda i: float(stack.noise[i]))
    sums = stack.noise[order].square().cumsum(0).tolist()
    count = min(range(FEWEST_MODELS, stack.n + 1), key=lambda m: (sums[m - 1] / m**2, -m), default=stack.n)
    return tuple(sorted(order[:count]))


def rounded_alike(stack: Stack) -> Stack:
    """The stack with all models in the coarsest of their dtypes: no difference shows more directions than another."""
    if len(set(stack.rounded_dtypes)) == 1:
        return stack
    coarsest = max(stack.rounded_dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return replace(stack, matrices=tuple(W_i.to(coarsest) for W_i in stack.matrices))


def solve_rounded_alike(stack: Stack, solve: Solve, rank: int | None) -> Recovery | None:
    """The answer of all models in the coarsest of their dtypes, where that hides a part of some delta.

    Pairs of neighbours on a ring are looked at: each difference has at most the ranks of all others. Where it has more,
    a coarse model hides directions that the fine ones show, and least squares would give them to the wrong models.
    Where it has as many, the model between the others may have no delta, but then they differ by both of theirs. None
    where nothing is hidden so, and where deltas are so small that only single entries tell of them.
    """
    dtypes = stack.rounded_dtypes
    if stack.n < FEWEST_MODELS or len(set(dtypes)) == 1 or stack.noise_override or is_coarse(stack):
        return None
    found = sorted(find_differences(stack, rank).by_pair.values(), key=lambda difference: difference.rank)
    ranks = [difference.rank for difference in found]
    energies = [float(difference.singular_values.square().sum()) for difference in found]
    adds_up = 2 * ranks[-1] < sum(ranks) or (2 * ranks[-1] == sum(ranks) and 2 * energies[-1] > sum(energies[:-1]))
    if adds_up:
        return None
    alike = rounded_alike(stack)
    try:
        answer = solve(alike, rank)
    except NotRecoverable:
        return None
    coarsest = name_of(alike.rounded_dtypes[0])
    return replace(answer, reason=f"{answer.reason}; all in {coarsest}, which hides directions of some adapters")
