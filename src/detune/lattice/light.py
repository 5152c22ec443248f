"""Light fine-tunes: deltas that half precision rounds away in most entries, or that a model does not have at all."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch

from detune.lattice.entries import StoredEntries, in_rounded_dtypes
from detune.lattice.estimate import Estimate
from detune.lattice.fit import Sweeps
from detune.lattice.holdout import held_out
from detune.lattice.submatrix import Submatrix
from detune.numerics.float_grid import HALVES, spacing
from detune.problem.delta_sizes import MOST_ALIKE, DeltaScale, delta_scales
from detune.problem.low_rank import LowRank
from detune.problem.recovery import FEWEST_MODELS, Recovery, left_alone
from detune.problem.stack import Stack

# Deltas below this share of the models' step do not show in least squares, which takes rounding for noise. Measured on
# random matrices and a language model's: the two starts are as good at 0.6 (`benchmarks/llm.py`).
FINE = 0.6
# A delta that seems to be below this share of the others' may be what these have in common, as MOST_ALIKE allows (any
# number does: `benchmarks/constants.py`).
COMMON = 0.4
# What a model may have changed that shows no change of its own, in the size of the others' deltas: 1.7 where small
# models' fine-tunes had most of their deltas in common (measured: `benchmarks/corpus.py`, five of nine such cases), and
# 3.1 where a language model of four layers was trained on one text (measured once).
HIDDEN = 3.5
# What is left of a delta's size, as a share of the others', where it is none (any number does:
# `benchmarks/constants.py`).
NOTHING = 0.15
# Sweeps of the fit that looks at it (any number does: `benchmarks/constants.py`).
FEW_SWEEPS = 4


def all_half(stack: Stack) -> bool:
    """Whether all models were rounded to half precision."""
    return set(stack.rounded_dtypes) <= set(HALVES)


def is_coarse(stack: Stack, scales: Sequence[DeltaScale] | None = None) -> bool:
    """Whether the models are stored so coarsely that their deltas are rounded away in most entries.

    Args:
        stack: The models.
        scales: How large each delta is; None measures it.
    """
    if stack.n < 2 or not set(stack.rounded_dtypes) & set(HALVES):
        return False
    step = max(
        float(spacing(W_i[::16], dtype).median())
        for W_i, dtype in zip(stack.matrices, stack.rounded_dtypes, strict=True)
    )
    return bool(max(scale.rms for scale in scales or delta_scales(stack)) < FINE * step)


def left_alone_by_sizes(stack: Stack, sweeps: Sweeps, scales: Sequence[DeltaScale]) -> Recovery | None:
    """The matrix of a model that seems to have no delta of its own, by a fit to a few rows and columns.

    The products that show its size show what the others' deltas have in common, too; so where it is small by them, a
    fit decides: no direction of that model's, and nothing of size that is not in one. None where no model is so.

    Args:
        stack: The models.
        sweeps: How to fit.
        scales: How large each delta is.
    """
    least = min(range(stack.n), key=lambda i: scales[i].at_most)
    if stack.n < FEWEST_MODELS or scales[least].at_most > COMMON * _typical(scales):
        return None
    entries = StoredEntries.of(in_rounded_dtypes(stack))
    grid = max(stack.rounded_dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    part = Submatrix.small(entries.shape, sweeps.seed).entries(entries)
    estimates = [Estimate.nothing(part.shape, scale.rms**2) for scale in scales]
    quick = replace(sweeps, most=FEW_SWEEPS)
    found, _ = quick.until_settled(part, estimates, grid, held_out(part.shape, sweeps.seed), None)
    return left_alone_by_fit(stack, found, scales)


def left_alone_by_fit(stack: Stack, estimates: Sequence[Estimate], scales: Sequence[DeltaScale]) -> Recovery | None:
    """The matrix of the model of which a fit has found no direction, and next to nothing that is not in one.

    Args:
        stack: The models.
        estimates: What the fit has found of each.
        scales: How large each delta is.
    """
    least = min(range(stack.n), key=lambda i: (estimates[i].rank, estimates[i].lack))
    others = [e for i, e in enumerate(estimates) if i != least]
    nothing = not estimates[least].rank and estimates[least].lack <= (NOTHING * _typical(scales)) ** 2
    if stack.n < FEWEST_MODELS or not nothing or not all(e.rank for e in others):
        return None
    if are_alike([e.low_rank for e in others]):
        return None
    sign = f"model {least} shows no change of its own"
    return left_alone(stack, least, sign, (HIDDEN * _typical(scales)) ** 2)


def are_alike(deltas: Sequence[LowRank]) -> bool:
    """Whether deltas are more alike than those of independent fine-tunes.

    Beside a copy of itself at another strength a model may pass for the base: all others then miss its delta.
    """
    return any(abs(a.correlation(b)) > MOST_ALIKE for a, b in combinations(deltas, 2))


def _typical(scales: Sequence[DeltaScale]) -> float:
    return sorted(scale.rms for scale in scales)[len(scales) // 2]
