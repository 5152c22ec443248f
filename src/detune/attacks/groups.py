"""The groups of matrices that may stand between two releases' hidden bases, each with its least squares.

Two releases of one layer have `Y = A X + L` on one side of a hidden basis and `W = A^T Z + K` on the other, block by
block, with L and K of low rank: X and W are the second release's, Y and Z the first's. Both are linear in A. With
weights M and N, and residuals R and S of an A at hand, least squares needs no more than

    primal = (X M X^T, R M X^T),    dual = (Z N Z^T, S N Z^T) :

| group | its matrices | the correction D |
| --- | --- | --- |
| `Invertible` | any | `D (X M X^T) + (Z N Z^T) D = R M X^T + (S N Z^T)^T` |
| `Complex` | a complex number for channels i and `i + width / 2` | two divisions |
| `Orthogonal` | `A^T A = I` | `D A` with D skew: `D G + G D = H - H^T` |

with `G = A (X M X^T) A^T + Z N Z^T` and `H = R M X^T A^T - A (S N Z^T)`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from detune.symmetries import complex_blocks

__all__ = ["Complex", "Group", "Invertible", "Normal", "Orthogonal"]


@dataclass(frozen=True)
class Normal:
    """One side's part of the normal equations, for each block, `(blocks, width, width)`.

    Attributes:
        gram: `X M X^T`.
        moment: `R M X^T`.
    """

    gram: Tensor
    moment: Tensor

    def __add__(self, other: "Normal") -> "Normal":
        return Normal(self.gram + other.gram, self.moment + other.moment)


class Group(Protocol):
    """A group of block-diagonal matrices."""

    def start(self, primal: Normal, dual: Normal) -> Tensor:
        """The A of least squares; Y and W are the residuals of none."""
        ...

    def improve(self, A: Tensor, primal: Normal, dual: Normal) -> Tensor:
        """A better A, from the residuals of the one at hand."""
        ...


class Invertible:
    """Every invertible matrix; of width 1, every scale."""

    def start(self, primal: Normal, dual: Normal) -> Tensor:
        """A Sylvester equation."""
        return _sylvester(primal.gram, dual.gram, primal.moment + dual.moment.mT)

    def improve(self, A: Tensor, primal: Normal, dual: Normal) -> Tensor:
        """Add the answer for what is left: the problem is linear."""
        return A + self.start(primal, dual)


class Complex:
    """One complex number for each pair of channels that rotary positions turn: all that commutes with them."""

    def start(self, primal: Normal, dual: Normal) -> Tensor:
        """Two divisions; the transpose of a complex number's matrix is its conjugate's."""
        (real, imaginary), (other_real, other_imaginary) = _parts(primal.moment), _parts(dual.moment)
        size = _positive(_parts(primal.gram)[0] + _parts(dual.gram)[0])
        return complex_blocks(torch.complex(real + other_real, imaginary - other_imaginary) / size)

    def improve(self, A: Tensor, primal: Normal, dual: Normal) -> Tensor:
        """Add the answer for what is left: the problem is linear."""
        return A + self.start(primal, dual)


class Orthogonal:
    """Rotations and reflections."""

    def start(self, primal: Normal, dual: Normal) -> Tensor:
        """Procrustes on both sides."""
        return _polar(primal.moment + dual.moment.mT)

    def improve(self, A: Tensor, primal: Normal, dual: Normal) -> Tensor:
        """A Lyapunov equation, then the nearest orthogonal matrix: exact for residuals however small."""
        gram = A @ primal.gram @ A.mT + dual.gram
        moment = primal.moment @ A.mT - A @ dual.moment
        return _polar(A + _sylvester(gram, gram, moment - moment.mT) @ A)


def _parts(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products with `1` and `i` of each pair of channels."""
    half = matrices.shape[1] // 2
    corners = [(i, j) for i in (0, half) for j in (0, half)]
    a, b, c, d = (matrices[:, i : i + half, j : j + half].diagonal(dim1=1, dim2=2) for i, j in corners)
    return a + d, c - b


def _sylvester(right: Tensor, left: Tensor, constant: Tensor) -> Tensor:
    """`D right + left D = constant`, for symmetric left and right."""
    right_values, right_vectors = torch.linalg.eigh(right)
    left_values, left_vectors = torch.linalg.eigh(left)
    sums = _positive(left_values.unsqueeze(-1) + right_values.unsqueeze(-2))
    D: Tensor = left_vectors @ ((left_vectors.mT @ constant @ right_vectors) / sums) @ right_vectors.mT
    return D


def _polar(matrices: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(matrices)
    rotations: Tensor = U @ Vh
    return rotations


def _positive(values: Tensor) -> Tensor:
    """The divisor of each block: blocks without a weight in them stay where they are."""
    return values.clamp(min=max(1e-14 * float(values.max()), torch.finfo(values.dtype).tiny))
