"""Reasons why a matrix differs from the others at full rank.

A full fine-tune stays close to its base; another base is unrelated. Between them is the same base put another way:
transposed, or with its neurons or attention heads in another order, which changes nothing that the network computes.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from detune.compatibility.low_rank_test import LAST_SAMPLE, sample
from detune.compatibility.quantisation_levels import to_nf4
from detune.problem.solving import told_by_others
from detune.problem.stack import Stack

# Above this cosine two matrices are versions of one: matrices of two bases have one of about `1 / sqrt(out in)`
# (derived), and any number does far from both.
CLOSE = 0.5
# Above this cosine a difference holds what NF4 rounds off the member: by chance it is `1 / sqrt(out in)`, and some 0.4
# with deltas as large as the rounding (derived: half of that).
ROUNDED = 0.2
# Rows that are looked up among those of the other matrix: any number does that a share can be told from.
LOOKED_UP = 64
# A row is found where the nearest is this much nearer than the second (Lowe 2004, doi
# 10.1023/B:VISI.0000029664.99615.94, section 7.1); among unrelated rows the two are about as far.
NEARER = 0.75
# This share of the rows must be found, each in another place: any number does between none and all.
FOUND = 0.75
# Sorting the rows of a larger matrix takes too long: any number does that is a bearable time.
MOST_SORTED = 1 << 26


class Cause(StrEnum):
    """A reason why a matrix is not one of the family."""

    FULL = "fine-tuned in full"
    """Close to the others: trained in every direction."""
    UNRELATED = "unrelated"
    """Another base, or trained from a new start."""
    ROWS = "rows permuted"
    COLUMNS = "columns permuted"
    BOTH = "rows and columns permuted"
    TRANSPOSED = "transposed"
    FOUR_BITS = "rounded to 4 bits"
    """Close to the others, and off by what NF4 rounds off them: QLoRA's, merged onto the base in 4 bits."""


@dataclass(frozen=True)
class Mismatch:
    """The likeness of a matrix to one of the family.

    Attributes:
        cause: What happened to it.
        cosine: Cosine of the two as vectors: 1 where they are equal up to a factor.
        relative_difference: `|A - B| / |B|` in the Frobenius norm; about `sqrt(2)` for unrelated matrices.
    """

    cause: Cause
    cosine: float
    relative_difference: float


def find_mismatch(stranger: Tensor, member: Tensor) -> Mismatch:
    """Say what became of a matrix that differs from one of the family at full rank.

    Args:
        stranger: `(out, in)`, any float dtype.
        member: The same matrix in a model of the family.

    Returns:
        The resemblance. Permutations are told from 64 rows or columns.

    Raises:
        NonFinite: One holds NaN or Inf.
    """
    seen = told_by_others(Stack((stranger, member), torch.float64, member.device))
    stranger, member = seen.matrices
    one, other = (sample(matrix, LAST_SAMPLE).double() for matrix in (stranger, member))
    cosine = _cosine(one, other)
    relative = float((one - other).norm() / other.norm().clamp(min=torch.finfo(other.dtype).tiny))
    return Mismatch(_cause(stranger, member, cosine), cosine, relative)


def _cause(stranger: Tensor, member: Tensor, cosine: float) -> Cause:
    if cosine > CLOSE:
        # Where deltas are no larger than the levels are apart, member and base lose much the same by rounding.
        lost = to_nf4(member) - member.double()
        return Cause.FOUR_BITS if _cosine(stranger.double() - member.double(), lost) > ROUNDED else Cause.FULL
    if stranger.shape[0] == stranger.shape[1]:
        turned = (sample(matrix, LAST_SAMPLE).double() for matrix in (stranger, member.mT))
        if _cosine(*turned) > CLOSE:
            return Cause.TRANSPOSED
    if _found(stranger[:, :: _step(stranger.mT, LAST_SAMPLE)], member[:, :: _step(member.mT, LAST_SAMPLE)]):
        return Cause.ROWS
    if _found(stranger[:: _step(stranger, LAST_SAMPLE)].mT, member[:: _step(member, LAST_SAMPLE)].mT):
        return Cause.COLUMNS
    # Sorted, a row keeps its values in whatever order its columns are.
    if member.numel() <= MOST_SORTED:
        rows = stranger[:: _step(stranger)].float().sort(dim=1).values
        if _found(rows, member.float().sort(dim=1).values):
            return Cause.BOTH
    return Cause.UNRELATED


def _found(rows: Tensor, among: Tensor) -> bool:
    """Whether rows of one matrix are those of the other in another order."""
    among = among.float()
    centre = among.mean(dim=0)
    rows, among = rows[:: _step(rows)].float() - centre, among - centre
    squares = (among.square().sum(dim=1) - 2 * rows @ among.mT + rows.square().sum(dim=1, keepdim=True)).clamp(min=0)
    if squares.shape[1] < 2:
        return False
    nearest, places = squares.topk(2, dim=1, largest=False)
    found = nearest[:, 0] < NEARER**2 * nearest[:, 1]
    return len(places[found, 0].unique()) >= FOUND * len(rows)


def _step(rows: Tensor, most: int = LOOKED_UP) -> int:
    return math.ceil(rows.shape[0] / most)


def _cosine(one: Tensor, other: Tensor) -> float:
    norms = one.norm() * other.norm()
    return float((one * other).sum() / norms) if norms > 0 else 0.0
