"""A recovered delta by its spaces and singular values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from detune.solvers.base import LowRank
from detune.solvers.linalg import qr

__all__ = ["Space"]

# Singular values below this share of a delta's largest are rounding.
ROUNDING = 1e-13


@dataclass(frozen=True)
class Space:
    """A recovered delta as `U diag(S) V^T`, float64.

    Attributes:
        U: `(out, r)`.
        S: Descending, `(r,)`.
        V: `(in, r)`.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @classmethod
    def of(cls, M_i: LowRank) -> "Space":
        """Directions that rounding alone gave are dropped."""
        left, right = qr(M_i.left), qr(M_i.right)
        U, S, V = torch.linalg.svd(left.R @ right.R.mT)
        kept = S.gt(ROUNDING * S[:1])
        return cls(left.Q @ U[:, kept], S[kept], right.Q @ V.mT[:, kept])
