"""The groups of matrices that may stand between two releases' hidden bases, each with its Newton step.

Two releases of one layer have `Y = A X + L` on one side of a hidden basis and `Z = A^-T W + K` on the other, block by
block, with L and K of low rank. Near A, `(I + D) A` changes the first by `D A X` and the second by `-D^T A^-T W`. With
the residuals R and S, U = A X, V = A^-T W and weights M, N, the least squares in D need no more than

    primal = (U M U^T, R M U^T),    dual = (V N V^T, S N V^T):

all groups below are small problems in these.

| group | what D may be | equation |
| --- | --- | --- |
| `Invertible` | anything | `D (U M U^T) + (V N V^T) D = R M U^T - (S N V^T)^T` |
| `Orthogonal` | skew: `A^-T = A` | `D G + G D = H - H^T`, G and H the sums of both sides |
| `Complex` | `a + b i` on channels i and `i + width / 2` | two divisions |
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
        gram: `U M U^T`.
        moment: `R M U^T`.
    """

    gram: Tensor
    moment: Tensor

    def __add__(self, other: "Normal") -> "Normal":
        return Normal(self.gram + other.gram, self.moment + other.moment)


class Group(Protocol):
    """A group of block-diagonal matrices."""

    def start(self, primal: Normal, dual: Normal) -> Tensor:
        """A first A, by least squares on `Y = A X` and `W = A^T Z`: both are linear in it.

        Args:
            primal: `(X X^T, Y X^T)`.
            dual: `(Z Z^T, W Z^T)`.
        """
        ...

    def step(self, primal: Normal, dual: Normal) -> Tensor:
        """The D of least squares."""
        ...

    def move(self, A: Tensor, D: Tensor) -> Tensor:
        """`(I + D) A`, brought back to the group."""
        ...


class Invertible:
    """Every invertible matrix; of width 1, every scale."""

    def start(self, primal: Normal, dual: Normal) -> Tensor:
        """A Sylvester equation."""
        return _sylvester(primal.gram, dual.gram, primal.moment + dual.moment.mT)

    def step(self, primal: Normal, dual: Normal) -> Tensor:
        """A Sylvester equation."""
        return _sylvester(primal.gram, dual.gram, primal.moment - dual.moment.mT)

    def move(self, A: Tensor, D: Tensor) -> Tensor:
        """A product."""
        return A + D @ A


class Orthogonal:
    """Rotations and reflections."""

    def start(self, primal: Normal, dual: Normal) -> Tensor:
        """Procrustes on both sides."""
        return _polar(primal.moment + dual.moment.mT)

    def step(self, primal: Normal, dual: Normal) -> Tensor:
        """A Lyapunov equation."""
        both = primal + dual
        return _sylvester(both.gram, both.gram, both.moment - both.moment.mT)

    def move(self, A: Tensor, D: Tensor) -> Tensor:
        """The nearest orthogonal matrix to the product."""
        return _polar(A + D @ A)


class Complex:
    """One complex number for each pair of channels that rotary positions turn: all that commutes with them."""

    def start(self, primal: Normal, dual: Normal) -> Tensor:
        """Two divisions."""
        (real, imaginary), (other_real, other_imaginary) = _parts(primal.moment), _parts(dual.moment)
        size = _positive(_parts(primal.gram)[0] + _parts(dual.gram)[0])
        return complex_blocks(torch.complex(real + other_real, imaginary - other_imaginary) / size)

    def step(self, primal: Normal, dual: Normal) -> Tensor:
        """The scale goes to the other side inverted, the angle as it is."""
        (real, imaginary), (other_real, other_imaginary) = _parts(primal.moment), _parts(dual.moment)
        size = _positive(_parts(primal.gram)[0] + _parts(dual.gram)[0])
        return complex_blocks(torch.complex(real - other_real, imaginary + other_imaginary) / size)

    def move(self, A: Tensor, D: Tensor) -> Tensor:
        """A product of complex numbers."""
        return A + D @ A


def _parts(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products with `1` and `i` of each pair of channels."""
    half = matrices.shape[1] // 2
    a, b, c, d = (
        matrices[:, i : i + half, j : j + half].diagonal(dim1=1, dim2=2) for i in (0, half) for j in (0, half)
    )
    return a + d, c - b


def _sylvester(right: Tensor, left: Tensor, constant: Tensor) -> Tensor:
    """`D right + left D = constant`, for symmetric left and right."""
    right_values, right_vectors = torch.linalg.eigh(right)
    left_values, left_vectors = torch.linalg.eigh(left)
    sums = _positive(left_values.unsqueeze(-1) + right_values.unsqueeze(-2))
    return left_vectors @ ((left_vectors.mT @ constant @ right_vectors) / sums) @ right_vectors.mT


def _polar(matrices: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(matrices)
    return U @ Vh


def _positive(values: Tensor) -> Tensor:
    """What is divided by: blocks without a weight in them stay where they are."""
    return values.clamp(min=max(1e-14 * float(values.max()), torch.finfo(values.dtype).tiny))
