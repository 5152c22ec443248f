"""Orthogonal Procrustes: the turn of one release's hidden basis into another's, to the rounding of the weights.

Releases differ by more than their frames: `Y = A X + L` with `L = M_1 - A M_2` (A has a block for each head), a matrix
of rank `r_1 + r_2` over all heads together. Procrustes takes L for noise and misses A by as much as the adapters weigh.
But A is where the residual has the lowest rank, and that can be had to the last bit: minimise

    sum_sides log det (E^T E + eps^2 I),    E = Y - A X ,

a smooth stand-in for the rank, by reweighted least squares. With `P = (E^T E + eps^2 I)^-1` the next A minimises
`tr(E P E^T)`: directions where E is large, the adapters', hardly count, and all others do in full. eps falls until a
step moves A by less than rounding does: for float32 weights about thirty.

Reference: Mohan & Fazel, "Iterative Reweighted Algorithms for Matrix Rank Minimization", JMLR 2012.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detune.attacks.groups import Group, Normal
from detune.problem.storage_noise import FLOOR_RATIO, storage_variance

__all__ = ["FALLS", "Fit", "Side", "fit", "stay"]

# Falls of eps^2 from step to step, the second where the first ends in a wrong minimum: eps that falls faster than A
# gets better takes A's error for more low rank. At 0.3 a quarter of general invertible matrices go wrong in float64, at
# 0.1 all; adapters of as high a rank as heads are wide need the slower one.
FALLS = (0.5, 0.85)
# Steps in all, and steps in which what is left halves or the group is the wrong one, times `1 - fall`.
_STEPS = 60
_PATIENCE = 10
# A step that changes A by less, relative to it and to the precision of the stored numbers, changes nothing.
_ENOUGH = 0.1
# The precision that A is computed to.
_COMPUTED = 16 * torch.finfo(torch.float64).eps
# Two stored matrices, one of them turned, have twice the storage variance of one; a merge that was stored before it was
# turned had been rounded once before, and both were.
_ROUNDINGS = 4


@dataclass(frozen=True)
class Side:
    """One weight matrix on one side of a hidden basis, in both releases: `to = A from`, or `to = A^T from`.

    Attributes:
        begin: What A acts on, `(blocks, shared, width, other)`, float64: each block acts on `shared` pieces of `width`
            rows. The second release's; on the dual side the first's.
        end: What it should give: the first release's; on the dual side the second's.
        is_dual: Whether `A^T` acts here instead of A.
        variance: Variance of the storage noise of an entry of `end`.
    """

    begin: Tensor
    end: Tensor
    is_dual: bool
    variance: float

    @classmethod
    def of(cls, target: Tensor, source: Tensor, blocks: int, width: int, *, is_dual: bool = False) -> "Side":
        """Gather matrices of the first and of the second release, `(rows, other)`; the second may be float64."""
        shape = blocks, -1, width, target.shape[1]
        begin, end = (target, source) if is_dual else (source, target)
        variance = float(storage_variance(end.to(target.dtype)).mean())
        return cls(begin.double().reshape(shape), end.double().reshape(shape), is_dual, variance)

    @property
    def noise(self) -> float:
        """Energy that rounding leaves in each direction of the residual, if A is right."""
        computed = _COMPUTED**2 * float(self.end.square().mean())
        return self.end.shape[:3].numel() * max(_ROUNDINGS * self.variance, computed)

    def residual(self, A: Tensor) -> Tensor:
        """The residual of A."""
        return self.end - (A.mT if self.is_dual else A).unsqueeze(1) @ self.begin


@dataclass(frozen=True)
class Fit:
    """A fit of one side to the other.

    Attributes:
        A: `(blocks, width, width)`, float64.
        excess: Variance that is left outside the low-rank part, over that of rounding: about 1 where A is right.
        settled: Whether another step would change nothing.
    """

    A: Tensor
    excess: float
    settled: bool

    @property
    def at_noise(self) -> bool:
        """Whether A explains the releases."""
        return self.settled and self.excess <= FLOOR_RATIO**2


def fit(sides: Sequence[Side], group: Group, start: Tensor | None = None, fall: float = FALLS[0]) -> Fit:
    """The A of a group that leaves the residual of lowest rank.

    Args:
        sides: Matrices on both sides of the basis, or on one.
        group: Where A is looked for.
        start: An A that is nearly right; None starts from least squares.
        fall: Fall of eps^2 from step to step.

    Returns:
        A, and how much of the rest is more than rounding.
    """
    A = group.start(*_normals(sides, [side.end for side in sides])) if start is None else start
    noise = [side.noise for side in sides]
    eps2: list[float] = []
    history: list[float] = []
    settled = False
    patience = round(_PATIENCE / (1 - fall))
    for _ in range(round(_STEPS / (1 - fall))):
        residuals = [side.residual(A) for side in sides]
        spectra = [_Spectrum.of(R) for R in residuals]
        left = [spectrum.left for spectrum in spectra]
        eps2 = eps2 or left
        roots = [spectrum.root(e) for spectrum, e in zip(spectra, eps2, strict=True)]
        improved = group.improve(A, *_normals(sides, residuals, roots))
        moved, A = float((improved - A).norm() / A.norm()), improved
        eps2 = [max(fall * e, least) for e, least in zip(eps2, noise, strict=True)]
        history.append(max(rest / least for rest, least in zip(left, noise, strict=True)))
        settled = moved <= max(_ENOUGH * _precision(sides), _COMPUTED)
        hopeless = len(history) > patience and history[-1] > max(FLOOR_RATIO**2, history[-1 - patience] / 2)
        if hopeless or settled:
            break
    return Fit(A, history[-1], settled)


_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class _Spectrum:
    """Eigenvalues and eigenvectors of `E^T E`: an inverse would have lost all digits when eps is rounding noise."""

    values: Tensor
    vectors: Tensor
    rank: int

    @classmethod
    def of(cls, residual: Tensor) -> "_Spectrum":
        rows = residual.flatten(0, 2)
        _, vectors = torch.linalg.eigh(rows.mT @ rows)
        # The eigenvalues that eigh gives are as good as the largest; these are as good as each.
        values = (rows @ vectors).square().sum(dim=0)
        return cls(values, vectors, min(rows.shape))

    def root(self, eps2: float) -> Tensor:
        """B with `B B^T = P`."""
        return self.vectors * (self.values + max(eps2, _TINY)).rsqrt()

    @property
    def left(self) -> float:
        """The median eigenvalue of those that need not be zero: the adapters' are fewer than half."""
        return float(self.values.sort(descending=True).values[: self.rank].median())


def stay(sides: Sequence[Side]) -> Fit:
    """Nothing was turned."""
    blocks, _, width, _ = sides[0].begin.shape
    A = torch.eye(width, dtype=torch.float64).expand(blocks, width, width)
    return Fit(A, max(_Spectrum.of(side.residual(A)).left / side.noise for side in sides), True)


def _normals(
    sides: Sequence[Side], residuals: Sequence[Tensor], roots: Sequence[Tensor] | None = None
) -> tuple[Normal, Normal]:
    """The normal equations of the first and of the other side."""
    blocks, _, width, _ = sides[0].begin.shape
    zero = torch.zeros(blocks, width, width, dtype=torch.float64)
    sums = {False: Normal(zero, zero), True: Normal(zero, zero)}
    for i, (side, residual) in enumerate(zip(sides, residuals, strict=True)):
        X, R = (side.begin, residual) if roots is None else (side.begin @ roots[i], residual @ roots[i])
        sums[side.is_dual] += Normal((X @ X.mT).sum(dim=1), (R @ X.mT).sum(dim=1))
    return sums[False], sums[True]


def _precision(sides: Sequence[Side]) -> float:
    """Root mean square of the rounding of the stored numbers, relative to their own."""
    return min(float((side.variance / side.end.square().mean()) ** 0.5) for side in sides)
