"""The original bits: a rank-limited fit that takes every rounded entry as an interval, and the base as grid points."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detune.solvers.base import LowRank
from detune.solvers.grid import interval
from detune.solvers.posterior import Posterior, posterior
from detune.solvers.stack import Stack

# Entries of all models that are worked on at a time.
BLOCK_ENTRIES = 1 << 19


@dataclass(frozen=True)
class Estimate:
    """`M_i` with how well its entries are known: `variance[a, b] = q_a |R_b|^2 + |L_b|^2 q_b` in normalised factors.

    Attributes:
        left: L, `(out, r)`, float64.
        right: R, `(in, r)`, float64; `M_i = L R^T`.
        of_left: `(2, out)`: the mean variance of a row's coordinates, and the row's own profile.
        of_right: `(2, in)`: the same for columns.
    """

    left: Tensor
    right: Tensor
    of_left: Tensor
    of_right: Tensor

    @classmethod
    def of(cls, M_i: LowRank, variance: float) -> "Estimate":
        """A start whose entries all have one variance."""
        left, right = M_i.left.double(), M_i.right.double()
        halves = [torch.stack([torch.full_like(t[:, 0], variance / 2), torch.ones_like(t[:, 0])]) for t in (left, right)]
        return cls(left, right, *halves)

    @property
    def transposed(self) -> "Estimate":
        return Estimate(self.right, self.left, self.of_right, self.of_left)

    def entries(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Mean and variance of some rows."""
        mean = self.left[rows] @ self.right.mT
        q_a, profile_a = self.of_left[:, rows]
        q_b, profile_b = self.of_right
        return mean, torch.outer(q_a, profile_b) + torch.outer(profile_a, q_b)


def look(
    matrices: Sequence[Tensor], estimates: Sequence[Estimate], rows: slice, grid: torch.dtype | None, least_reach: int = 0
):
    """The posterior of some rows."""
    intervals = [interval(W_i[rows]) for W_i in matrices]
    low = torch.stack([i.low for i in intervals])
    high = torch.stack([i.high for i in intervals])
    moments = [estimate.entries(rows) for estimate in estimates]
    m = torch.stack([mean for mean, _ in moments])
    v = torch.stack([variance for _, variance in moments])
    shape = low.shape
    found = posterior(*(t.reshape(shape[0], -1) for t in (low, high, m, v)), grid, least_reach)
    return Posterior(*(t.reshape(*t.shape[:-1], *shape[1:]) for t in found)), m, v


def half_sweep(matrices, estimates, grid, mask=None):
    """New left factors for given right ones."""
    d, k = matrices[0].shape
    n = len(matrices)
    normalised = []
    for e in estimates:
        Q, T = torch.linalg.qr(e.right)
        Q = Q * k**0.5
        normalised.append(replace(e, left=e.left @ (T.mT / k**0.5), right=Q, of_right=torch.stack([e.of_right[0], Q.square().sum(1)]) if False else e.of_right))
    lefts = [torch.empty_like(e.left) for e in normalised]
    q = [torch.empty(d, dtype=torch.float64) for _ in normalised]
    height = max(1, BLOCK_ENTRIES // (n * k))
    outer = [(e.right[:, :, None] * e.right[:, None, :]).reshape(k, -1) for e in normalised]
    for start in range(0, d, height):
        rows = slice(start, min(d, start + height))
        found, m, v = look(matrices, estimates, rows, grid)
        for i, e in enumerate(normalised):
            r = e.right.shape[1]
            shrunk = (1 - found.delta_variance[i] / v[i]).clamp(min=1e-9)
            information = shrunk / v[i]
            target = m[i] + (found.delta[i] - m[i]) / shrunk
            if mask is not None:
                information = information * mask[rows]
            gram = (information @ outer[i]).reshape(-1, r, r)
            ridge = 1e-10 * gram.diagonal(dim1=1, dim2=2).mean(1)
            gram = gram + ridge[:, None, None] * torch.eye(r, dtype=torch.float64)
            C = torch.linalg.cholesky(gram)
            lefts[i][rows] = torch.cholesky_solve(((information * target) @ e.right)[..., None], C)[..., 0]
            q[i][rows] = torch.cholesky_inverse(C).diagonal(dim1=1, dim2=2).mean(1)
    out = []
    for e, L, q_i in zip(normalised, lefts, q):
        # profile of columns for the rows' uncertainty: |R_b|^2
        out.append(Estimate(L, e.right, torch.stack([q_i, e.of_left[1]]), torch.stack([e.of_right[0], e.right.square().sum(1)])))
    return out
