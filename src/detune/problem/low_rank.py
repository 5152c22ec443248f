"""Low-rank matrices: by two factors, and by their singular value decomposition."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detune.numerics.float_grid import times_power_of_two
from detune.numerics.linalg import gram, product, qr

__all__ = ["LowRank", "SVDFactors"]

# Singular values below this share of a delta's largest are rounding: some hundred times float64's precision (derived).
ROUNDING = 1e-13


@dataclass(frozen=True)
class LowRank:
    """A matrix `left @ right.T` of rank at most r.

    Attributes:
        left: `(out, r)`.
        right: `(in, r)`.
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Number of columns of the factors."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """The matrix itself, `(out, in)`."""
        return self.left @ self.right.mT

    @property
    def transposed(self) -> "LowRank":
        """The transposed matrix, by its factors."""
        return LowRank(self.right, self.left)

    def to(self, device: torch.device) -> "LowRank":
        """Move the factors to another device."""
        return LowRank(self.left.to(device), self.right.to(device))

    def times_power_of_two(self, exponent: int) -> "LowRank":
        """The matrix times `2^exponent`, which both factors share."""
        half = exponent // 2
        left, right = times_power_of_two(self.left, exponent - half), times_power_of_two(self.right, half)
        return replace(self, left=left, right=right)

    def scaled(self, rows: Tensor, columns: Tensor) -> "LowRank":
        """The matrix with rows and columns multiplied by these numbers, `(out,)` and `(in,)`."""
        return LowRank(self.left * rows.to(self.left)[:, None], self.right * columns.to(self.right)[:, None])

    def correlation(self, other: "LowRank") -> float:
        """Inner product with another matrix over the norms of both; 0 where one is zero."""
        size = self.energy * other.energy
        inner = float(((self.left.mT @ other.left) * (self.right.mT @ other.right)).sum())
        return inner / size**0.5 if size else 0.0

    @property
    def energy(self) -> float:
        """`|M_i|_F^2`, from the factors."""
        return float((gram(self.left) * gram(self.right)).sum())


@dataclass(frozen=True)
class SVDFactors:
    """A recovered delta as `U diag(S) V^T`.

    Attributes:
        U: `(out, r)`, orthonormal.
        S: Descending, `(r,)`, float64.
        V: `(in, r)`, orthonormal, in U's dtype.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @classmethod
    def of(cls, M_i: LowRank, dtype: torch.dtype = torch.float64) -> "SVDFactors":
        """Decompose a delta; directions that rounding alone gave are dropped.

        Args:
            M_i: The delta.
            dtype: Dtype of the bases, which are as exact as it is.
        """
        left, right = qr(M_i.left.to(dtype)), qr(M_i.right.to(dtype))
        U, S, Vh = torch.linalg.svd(left.R @ right.R.mT)
        kept = S.gt(ROUNDING * S[:1])
        return cls(product(left.Q, U[:, kept].to(dtype)), S[kept], product(right.Q, Vh.mT[:, kept].to(dtype)))
