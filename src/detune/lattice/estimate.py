"""The estimate of one `M_i` by the interval fit: its factors, and how far off each entry may be."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from detune.problem.low_rank import LowRank

if TYPE_CHECKING:
    from detune.lattice.kernels import Known


@dataclass(frozen=True)
class Estimate:
    """`M_i = left right^T`, and the variance of its entries.

    That of entry `(a, b)` is `rows[a] |right[b]|^2 + |left[a]|^2 columns[b] + lack`.

    Attributes:
        left: `(out, r)`, float32.
        right: `(in, r)`, float32.
        rows: Variance of each coordinate of a row of `left`, `(out,)`.
        columns: Variance of each coordinate of a row of `right`, `(in,)`.
        lack: Mean square of what no direction holds yet.
    """

    left: Tensor
    right: Tensor
    rows: Tensor
    columns: Tensor
    lack: float = 0.0

    @classmethod
    def nothing(cls, shape: tuple[int, int], lack: float) -> "Estimate":
        """An estimate without directions, of a delta with entries of mean square `lack`."""
        out, columns = shape
        return cls(torch.zeros(out, 0), torch.zeros(columns, 0), torch.zeros(out), torch.zeros(columns), lack)

    @classmethod
    def of(cls, M_i: LowRank, variance: float) -> "Estimate":
        """An estimate from a least-squares fit to entries whose noise has a variance.

        Each of the `r (out + in)` numbers takes its share of the noise.
        """
        left, right = (factor.to("cpu", torch.float32) for factor in (M_i.left, M_i.right))
        found = cls(left, right, torch.zeros(len(left)), torch.zeros(len(right))).normalised()
        size = float(found.left.square().sum(dim=1).mean()) if M_i.rank else 1.0
        rows = torch.full((len(left),), variance / len(right))
        columns = torch.full((len(right),), variance * M_i.rank / len(left) / max(size, 1e-30))
        return replace(found, rows=rows, columns=columns)

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.left.shape[1]

    @property
    def variance(self) -> float:
        """The mean over all entries."""
        rows = self.rows.mean() * self.right.square().sum(dim=1).mean()
        return float(rows + self.left.square().sum(dim=1).mean() * self.columns.mean()) + self.lack

    @property
    def low_rank(self) -> LowRank:
        """The estimate itself, float64."""
        return LowRank(self.left.double(), self.right.double())

    @property
    def transposed(self) -> "Estimate":
        """The estimate for the transposed matrix."""
        return Estimate(self.right, self.left, self.columns, self.rows, self.lack)

    def scaled(self, rows: Tensor, columns: Tensor) -> "Estimate":
        """The estimate with rows and columns multiplied by these numbers; what it lacks is dropped."""
        found = LowRank(self.left, self.right).scaled(rows, columns)
        up, along = rows.to(self.left), columns.to(self.right)
        return Estimate(found.left, found.right, self.rows * up.square(), self.columns * along.square())

    def wider(self, factor: float) -> "Estimate":
        """The estimate with all variances multiplied."""
        return replace(self, rows=factor * self.rows, columns=factor * self.columns, lack=factor * self.lack)

    def normalised(self) -> "Estimate":
        """The product with orthogonal columns of `left` and `right^T right = in * I`: coordinates are alike."""
        if not self.rank:
            return self
        Q, T = torch.linalg.qr(self.right)
        U, S, Vh = torch.linalg.svd(self.left @ T.mT, full_matrices=False)
        root = len(Q) ** 0.5
        left, right = U * (S / root), (Q @ Vh.mT) * root
        # The variances of entries stay what they are.
        return Estimate(
            left,
            right,
            self.rows * (self.right.square().sum() / right.square().sum()),
            self.columns * (self.left.square().sum() / left.square().sum().clamp(min=1e-38)),
            self.lack,
        )

    def within(self, spaces: tuple[Tensor, Tensor] | None) -> "Estimate":
        """The estimate with its factors projected onto orthonormal bases that hold the true ones; None holds all."""
        if spaces is None:
            return self
        left, right = spaces
        return replace(self, left=left @ (left.mT @ self.left), right=right @ (right.mT @ self.right))

    def significant(self) -> "Estimate":
        """The estimate without the directions that are no larger than what its rows are uncertain by."""
        kept = self.left.square().mean(dim=0) > self.rows.mean()
        return replace(self, left=self.left[:, kept], right=self.right[:, kept], rows=self.rows * bool(kept.any()))

    def part(self, rows: Tensor | slice, columns: Tensor | slice) -> "Estimate":
        """The estimate for some of the rows and columns."""
        return Estimate(self.left[rows], self.right[columns], self.rows[rows], self.columns[columns], self.lack)


def means(estimates: Sequence[Estimate]) -> np.ndarray:
    """All `M_i`, `(n, out, in)`, float32."""
    return torch.stack([e.left @ e.right.mT for e in estimates]).numpy()


def known(estimates: Sequence[Estimate], grid: np.ndarray) -> "Known":
    """The rest of what the estimates say, as the compiled loops take it."""
    from detune.lattice.kernels import Known

    def stacked(parts: Sequence[Tensor]) -> np.ndarray:
        return torch.stack([part.double() for part in parts]).numpy()

    return Known(
        stacked([e.rows for e in estimates]),
        stacked([e.left.square().sum(dim=1) for e in estimates]),
        stacked([e.columns for e in estimates]),
        stacked([e.right.square().sum(dim=1) for e in estimates]),
        np.array([e.lack for e in estimates]),
        grid,
    )
