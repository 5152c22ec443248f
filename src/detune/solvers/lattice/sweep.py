"""Sweeps of the interval fit: every `M_i = L R^T` given the posterior of its entries, rows by rows, then columns.

The posterior of an entry sees each `M_i` through its estimate `N(m, v)`; what it adds to that is a measurement with
precision `h = (1 - v_new / v) / v` at `m + (m_new - m) / (h v)`, the score's. A half sweep solves one weighted
least-squares problem for each row of L given R. That is generalised approximate message passing (Rangan 2011, arXiv
1010.5141) with the low-rank factors as its linear part.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detune.solvers.base import LowRank
from detune.solvers.grid import interval
from detune.solvers.lattice.posterior import Posterior, posterior
from detune.solvers.stack import Stack

# Entries of all models that are worked on at a time.
BLOCK_ENTRIES = 1 << 18
# A measurement that says nothing still has a precision: a line without any would leave its factors free.
LEAST_SHARE = 1e-9
# Mean square of factors that are zero, and variance of what they give: with none there would be nothing to divide by.
LEAST_SIZE = 1e-30


@dataclass(frozen=True)
class Estimate:
    """`M_i` and how well its entries are known: `variance[a, b] = scale (q_a p_b + p'_a q'_b)`.

    Attributes:
        left: L, `(out, r)`, float64.
        right: R, `(in, r)`, float64; `M_i = L R^T`.
        rows: `(2, out)`: variance `q_a` of a row's coordinates, and its weight `p'_a` in the columns' variance.
        columns: `(2, in)`: the same for columns.
        scale: What the variance must be multiplied by to agree with entries that were held out.
    """

    left: Tensor
    right: Tensor
    rows: Tensor
    columns: Tensor
    scale: float = 1.0

    @classmethod
    def of(cls, M_i: LowRank, variance: float) -> "Estimate":
        """A start whose entries all have one variance; a delta of rank 0 is one of rank 1 that is zero."""
        left, right = (f.double() if M_i.rank else f.new_zeros(len(f), 1).double() for f in (M_i.left, M_i.right))
        rows, columns = (
            torch.stack([torch.full_like(factor[:, 0], variance / 2), torch.ones_like(factor[:, 0])])
            for factor in (left, right)
        )
        return cls(left, right, rows, columns)

    @property
    def transposed(self) -> "Estimate":
        """Of the transposed matrix."""
        return Estimate(self.right, self.left, self.columns, self.rows, self.scale)

    @property
    def low_rank(self) -> LowRank:
        """The estimate itself."""
        return LowRank(self.left, self.right)

    @property
    def nothing(self) -> LowRank:
        """A delta of rank 0 of the same shape."""
        return LowRank(self.left[:, :0], self.right[:, :0])

    def entries(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Mean and variance of some rows, `(rows, in)` each."""
        mean = self.left[rows] @ self.right.mT
        variance = torch.outer(self.rows[0, rows], self.columns[1]) + torch.outer(self.rows[1, rows], self.columns[0])
        return mean, (self.scale * variance).clamp(min=LEAST_SIZE)

    def at(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of single entries, `(entries,)` each."""
        mean = (self.left[rows] * self.right[columns]).sum(dim=1)
        variance = self.rows[0, rows] * self.columns[1, columns] + self.rows[1, rows] * self.columns[0, columns]
        return mean, (self.scale * variance).clamp(min=LEAST_SIZE)


@dataclass(frozen=True)
class View:
    """Some rows of the stack as intervals, with what the estimates say of them; all `(n, rows, in)`, float64.

    Attributes:
        rows: Which rows.
        low: Lower ends of the intervals.
        high: Upper ends.
        m: Means of the `M_i`.
        v: Their variances.
    """

    rows: slice
    low: Tensor
    high: Tensor
    m: Tensor
    v: Tensor

    @classmethod
    def of(cls, stack: Stack, estimates: Sequence[Estimate], rows: slice) -> "View":
        """Read some rows."""
        intervals = [interval(W_i[rows].to(stack.device)) for W_i in stack.matrices]
        entries = [estimate.entries(rows) for estimate in estimates]
        return cls(
            rows,
            torch.stack([low for low, _ in intervals]),
            torch.stack([high for _, high in intervals]),
            torch.stack([m for m, _ in entries]),
            torch.stack([v for _, v in entries]),
        )

    def posterior(self, grid: torch.dtype | None, least_reach: int = 0) -> Posterior:
        """See `detune.solvers.lattice.posterior.posterior`; its fields are `(rows, in)` and `(n, rows, in)`."""
        low, high, m, v = (t.flatten(start_dim=1) for t in (self.low, self.high, self.m, self.v))
        found = posterior(low, high, m, v, grid, least_reach)
        return Posterior(*(t.unflatten(-1, self.low.shape[1:]) for t in found))


def views(stack: Stack, estimates: Sequence[Estimate]) -> Iterator[View]:
    """The whole stack, some rows at a time."""
    out, columns = stack.shape
    height = max(1, BLOCK_ENTRIES // (stack.n * columns))
    for start in range(0, out, height):
        yield View.of(stack, estimates, slice(start, min(start + height, out)))


def sweep(
    stack: Stack, estimates: Sequence[Estimate], grid: torch.dtype | None, used: Tensor | None = None
) -> tuple[Estimate, ...]:
    """New left factors for the right ones, then new right factors for the left ones.

    Args:
        stack: The models.
        estimates: One for each.
        grid: The dtype that W lies on; None is no grid.
        used: Which entries to use, `(out, in)`, bool; None is all.
    """
    estimates = half_sweep(stack, estimates, grid, used)
    turned = half_sweep(stack.transposed, [e.transposed for e in estimates], grid, None if used is None else used.mT)
    return tuple(e.transposed for e in turned)


def half_sweep(
    stack: Stack, estimates: Sequence[Estimate], grid: torch.dtype | None, used: Tensor | None = None
) -> tuple[Estimate, ...]:
    """New left factors for the right ones, row by row."""
    estimates = tuple(map(_normalised, estimates))
    outer = [(e.right[:, :, None] * e.right[:, None, :]).flatten(start_dim=1) for e in estimates]
    # Rows of L are as large as they have been: what the data leave open stays near zero.
    prior = [1 / e.left.square().mean(dim=0).clamp(min=LEAST_SIZE) for e in estimates]
    left = [torch.empty_like(e.left) for e in estimates]
    spread = [torch.empty_like(e.rows[0]) for e in estimates]
    for view in views(stack, estimates):
        found = view.posterior(grid)
        share = (1 - found.delta_variance / view.v).clamp(min=LEAST_SHARE)
        target = view.m + (found.delta - view.m) / share
        precision = share / view.v
        if used is not None:
            precision = precision * used[view.rows]
        for i, estimate in enumerate(estimates):
            left[i][view.rows], spread[i][view.rows] = _solve_rows(
                precision[i], target[i], estimate.right, outer[i], prior[i]
            )
    return tuple(
        replace(e, left=L, rows=torch.stack([q, e.rows[1]]), columns=torch.stack([e.columns[0], _profile(e.right)]))
        for e, L, q in zip(estimates, left, spread, strict=True)
    )


def _normalised(estimate: Estimate) -> Estimate:
    """The same product with orthogonal columns of L, and `R^T R = in * I`: R's coordinates are then all alike."""
    Q, T = torch.linalg.qr(estimate.right)
    U, S, Vh = torch.linalg.svd(estimate.left @ T.mT, full_matrices=False)
    root = Q.shape[0] ** 0.5
    return replace(estimate, left=U * (S / root), right=(Q @ Vh.mT) * root)


def _profile(right: Tensor) -> Tensor:
    return right.square().sum(dim=1)


def _solve_rows(
    precision: Tensor, target: Tensor, right: Tensor, outer: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of L that minimise `sum_b precision[a, b] (target[a, b] - L_a . R_b)^2`, and their mean variance.

    Args:
        precision: `(rows, in)`.
        target: `(rows, in)`.
        right: R, `(in, r)`.
        outer: `R_b R_b^T` for every b, `(in, r r)`.
        prior: Precision of each coordinate of a row of L before anything is seen, `(r,)`.
    """
    r = right.shape[1]
    gram = (precision @ outer).unflatten(1, (r, r)) + prior.diag()
    factor = torch.linalg.cholesky(gram)
    rows = torch.cholesky_solve(((precision * target) @ right)[..., None], factor)[..., 0]
    return rows, torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2).mean(dim=1)
