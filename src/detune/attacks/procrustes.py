"""What turned one release's hidden basis into another's, to the rounding of the weights.

Releases differ by more than their frames: `Y = A X + L` with `L = M_1 - A M_2` (A has a block for each head), a matrix
of rank `r_1 + r_2` over all heads together. Procrustes takes L for noise and misses A by as much as the adapters weigh.
But A is where the residual has the lowest rank, and that can be had to the last bit: minimise

    sum_sides log det (E^T E + eps^2 I),    E = Y - A X ,

a smooth stand-in for the rank, by reweighted least squares. With `P = (E^T E + eps^2 I)^-1` the next A minimises
`tr(E P E^T)`: directions where E is large, the adapters', hardly count, and all others do in full. eps falls with what
E leaves outside its large directions, until that is rounding noise. About ten steps do.

Reference: Mohan & Fazel, "Iterative Reweighted Algorithms for Matrix Rank Minimization", JMLR 2012.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detune.attacks.groups import Group, Normal
from detune.solvers.stack import storage_variance

__all__ = ["Fit", "Side", "fit"]

_STEPS = 60
# A step that changes A by less, relative to it and in units of the noise, changes nothing.
_ENOUGH = 1e-3
# eps falls to this share of what is left outside the large directions.
_FALL = 0.5
# Two stored matrices, one of them turned, have twice the storage variance of one; a merge that was stored before it was
# turned had been rounded once before, and both were.
_ROUNDINGS = 4
# Left outside the large directions by no more than this many times that variance: rounding.
_AT_NOISE = 4.0


@dataclass(frozen=True)
class Side:
    """One weight matrix on one side of a hidden basis, in both releases.

    Attributes:
        target: As the first release has it, `(blocks, shared, width, other)`, float64: each block of A acts on `shared`
            pieces of `width` rows.
        source: As the other one has it.
        is_dual: Whether `A^-T` acts here instead of A.
        variance: Of the storage noise of an entry of the target.
    """

    target: Tensor
    source: Tensor
    is_dual: bool
    variance: float

    @classmethod
    def of(cls, target: Tensor, source: Tensor, blocks: int, width: int, *, is_dual: bool = False) -> "Side":
        """From two matrices as stored, `(rows, other)`; the source may be float64 already."""
        shape = blocks, -1, width, target.shape[1]
        variance = float(storage_variance(target).mean())
        return cls(target.double().reshape(shape), source.double().reshape(shape), is_dual, variance)

    def turned(self, A: Tensor) -> Tensor:
        """The source as A, or `A^-T`, leaves it."""
        return (torch.linalg.inv(A).mT if self.is_dual else A).unsqueeze(1) @ self.source


@dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        A: `(blocks, width, width)`, float64.
        excess: Variance that is left outside the low-rank part, over that of rounding: about 1 where A is right.
    """

    A: Tensor
    excess: float

    @property
    def at_noise(self) -> bool:
        """Whether A explains the releases."""
        return self.excess <= _AT_NOISE


def fit(sides: Sequence[Side], group: Group) -> Fit:
    """The A of a group that leaves the residual of lowest rank.

    Args:
        sides: Matrices on both sides of the basis, or on one.
        group: Where A is looked for.

    Returns:
        A, and how much of the rest is more than rounding.
    """
    A = group.start(*_normals(sides, *_ends(sides)))
    noise = [_ROUNDINGS * side.variance * _rows(side.target) for side in sides]
    eps2: list[float] = []
    for _ in range(_STEPS):
        turned = [side.turned(A) for side in sides]
        residuals = [side.target - U for side, U in zip(sides, turned, strict=True)]
        grams = [_gram(R) for R in residuals]
        eps2 = eps2 or [float(gram.trace()) / len(gram) for gram in grams]
        weights = [_weight(gram, e) for gram, e in zip(grams, eps2, strict=True)]
        left = [len(P) / float(P.trace()) - e for P, e in zip(weights, eps2, strict=True)]
        D = group.step(*_normals(sides, turned, residuals, weights))
        A = group.move(A, D)
        lowest = [max(min(e, _FALL * rest), least) for e, rest, least in zip(eps2, left, noise, strict=True)]
        settled = lowest == eps2
        eps2 = lowest
        smallest = min(side.variance for side in sides) ** 0.5 / _size(sides)
        if settled and float(D.square().mean().sqrt()) <= _ENOUGH * smallest:
            break
    return Fit(A, max(rest / max(least, _TINY) for rest, least in zip(left, noise, strict=True)))


_TINY = torch.finfo(torch.float64).tiny


def _normals(
    sides: Sequence[Side], bases: Sequence[Tensor], values: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> tuple[Normal, Normal]:
    """The normal equations of the first and of the other side."""
    blocks, _, width, _ = sides[0].source.shape
    zero = torch.zeros(blocks, width, width, dtype=torch.float64)
    sums = {False: Normal(zero, zero), True: Normal(zero, zero)}
    for i, (side, U, R) in enumerate(zip(sides, bases, values, strict=True)):
        weighted = U if weights is None else U @ weights[i]
        sums[side.is_dual] += Normal((weighted @ U.mT).sum(dim=1), (R @ weighted.mT).sum(dim=1))
    return sums[False], sums[True]


def _ends(sides: Sequence[Side]) -> tuple[list[Tensor], list[Tensor]]:
    """What A acts on and what it gives; on the other side `A^T` acts on the target."""
    return (
        [side.target if side.is_dual else side.source for side in sides],
        [side.source if side.is_dual else side.target for side in sides],
    )


def _rows(matrix: Tensor) -> int:
    return matrix.shape[0] * matrix.shape[1] * matrix.shape[2]


def _gram(residual: Tensor) -> Tensor:
    rows = residual.flatten(0, 2)
    return rows.mT @ rows


def _weight(gram: Tensor, eps2: float) -> Tensor:
    return torch.linalg.inv(gram + max(eps2, _TINY) * torch.eye(len(gram), dtype=gram.dtype))


def _size(sides: Sequence[Side]) -> float:
    """Root mean square of the sources, the largest of the sides."""
    return max(float(side.source.square().mean().sqrt()) for side in sides)
