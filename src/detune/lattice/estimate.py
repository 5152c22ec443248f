"""What the interval fit knows of one `M_i`: its factors, and how far off each entry may be."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detune.problem.low_rank import LowRank
from detune.problem.recovery import Recovery
from detune.problem.stack import Stack

# Mean square of factors that are zero, and variance of what they give: with none there would be nothing to divide by.
LEAST_SIZE = 1e-30
# A direction with less than this share of its uncertainty is none.
GONE = 0.01


@dataclass(frozen=True)
class Estimate:
    """`M_i` and how well its entries are known: `variance[a, b] = scale (q_a p_b + p'_a q'_b)`.

    Attributes:
        left: L, `(out, r)`, float64.
        right: R, `(in, r)`, float64; `M_i = L R^T`.
        rows: `(2, out)`: variance `q_a` of a row's coordinates, and its weight `p'_a` in the columns' variance.
        columns: `(2, in)`: the same for columns.
        scale: What the variance must be multiplied by to agree with entries that were held out.
        shared_rows: `(out,)`: in an entry all models have an error in common, whose variance is so many times that.
        shared_columns: `(in,)`; the two are added.
    """

    left: Tensor
    right: Tensor
    rows: Tensor
    columns: Tensor
    shared_rows: Tensor
    shared_columns: Tensor
    scale: float = 1.0

    @classmethod
    def of(cls, M_i: LowRank, variance: float) -> "Estimate":
        """A start whose entries all have one variance; a delta of rank 0 is one of rank 1 that is zero."""
        left, right = (f.double() if M_i.rank else f.new_zeros(len(f), 1).double() for f in (M_i.left, M_i.right))
        rows, columns = (
            torch.stack([torch.full_like(factor[:, 0], variance / 2), torch.ones_like(factor[:, 0])])
            for factor in (left, right)
        )
        return cls(left, right, rows, columns, torch.zeros_like(rows[0]), torch.zeros_like(columns[0]))

    @property
    def transposed(self) -> "Estimate":
        """Of the transposed matrix."""
        return Estimate(
            self.right, self.left, self.columns, self.rows, self.shared_columns, self.shared_rows, self.scale
        )

    @property
    def low_rank(self) -> LowRank:
        """The estimate itself."""
        return LowRank(self.left, self.right)

    @property
    def significant(self) -> LowRank:
        """The estimate without the directions that the fit has shrunk to nothing."""
        Q, T = torch.linalg.qr(self.left)
        P, B = torch.linalg.qr(self.right)
        U, S, Vh = torch.linalg.svd(T @ B.mT)
        rows, columns = self.rows.mean(dim=1), self.columns.mean(dim=1)
        energy = self.scale * (rows * columns.flip(0)).sum() * (len(Q) * len(P))
        kept = S.square() > GONE * energy / len(S)
        return LowRank(Q @ (U[:, kept] * S[kept]), P @ Vh[kept].mT)

    @property
    def nothing(self) -> LowRank:
        """A delta of rank 0 of the same shape."""
        return LowRank(self.left[:, :0], self.right[:, :0])

    def mean(self, rows: slice) -> Tensor:
        """Of some rows, `(rows, in)`."""
        return self.left[rows] @ self.right.mT

    def at(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of single entries, `(entries,)` each."""
        mean = (self.left[rows] * self.right[columns]).sum(dim=1)
        variance = self.rows[0, rows] * self.columns[1, columns] + self.rows[1, rows] * self.columns[0, columns]
        return mean, (self.scale * variance).clamp(min=LEAST_SIZE)

    def given_columns(self, columns: Tensor) -> "Estimate":
        """Of some of the columns."""
        return replace(
            self,
            right=self.right[columns],
            columns=self.columns[:, columns],
            shared_columns=self.shared_columns[columns],
        )


def from_recovery(stack: Stack, start: Recovery | None) -> tuple[Estimate, ...] | None:
    """Estimates from a least-squares fit, whose entries have about the variance `noise^2 r (d + k) / d k`.

    The noise is that of the model less the mean of the others: a fine model's `M_i` is no better known than their W.
    """
    if start is None or not any(M_i.rank for M_i in start.deltas):
        return None
    out, columns = stack.shape
    own = stack.noise.square()
    noise = own + (own.sum() - own) / max(1, stack.n - 1) ** 2
    return tuple(
        Estimate.of(M_i, float(variance) * max(1, M_i.rank) * (out + columns) / (out * columns))
        for M_i, variance in zip(start.deltas, noise, strict=True)
    )
