"""Rows and columns of a stack scaled until rounding is about as large everywhere.

Least squares takes rounding for noise of one size. In a language model's first layers some rows are eight times as
large as others, and so is their rounding, which then hides the deltas of all the rest. With D and E diagonal, `D M_i E`
has the rank of `M_i`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detune.problem.low_rank import LowRank
from detune.problem.recovery import Recovery
from detune.problem.stack import Stack
from detune.problem.storage_noise import storage_variance

# Rows and columns are weighed by this many entries of each, which tell a row's noise to a tenth (derived).
SAMPLED = 256
# Scaling settles at once where noise is a product of rows and columns (Sinkhorn & Knopp 1967; derived).
ROUNDS = 3
# Rounding that is less than this share of the usual one, in mean squares, is none that matters: that of rows of zeros
# is not multiplied beyond what float32 holds (any small number does).
NEGLIGIBLE = 2.0**-20


@dataclass(frozen=True)
class Balance:
    """Positive numbers that the rows and columns are multiplied by.

    Attributes:
        rows: `(out,)`, float64, at least 1.
        columns: `(in,)`, likewise.
        noise: Root mean square of each model's rounding then, `(n,)`, float64.
    """

    rows: Tensor
    columns: Tensor
    noise: Tensor

    @classmethod
    def of(cls, stack: Stack) -> "Balance":
        """Weigh the rows and columns of a stack by the rounding of some of their entries."""
        some_rows, some_columns = (torch.arange(0, size, max(1, size // SAMPLED)) for size in stack.shape)
        of_rows, of_columns = _rounding(stack, some_columns, 1).mean(dim=0), _rounding(stack, some_rows, 0)
        rows, columns = (torch.ones(size, dtype=torch.float64) for size in stack.shape)
        for _ in range(ROUNDS):
            rows = 1 / (of_rows * columns[some_columns]).mean(dim=1)
            columns = 1 / (of_columns.mean(dim=0) * rows[some_rows, None]).mean(dim=0)
        rows, columns = rows / rows.min(), columns / columns.min()
        weights = rows[some_rows, None] * columns
        return cls(rows.sqrt(), columns.sqrt(), (of_columns * weights).mean(dim=(1, 2)).sqrt())

    def applied(self, stack: Stack) -> Stack:
        """The stack, scaled, in float32 or finer: the noise is told."""
        matrices = tuple(
            W_i.to(torch.promote_types(W_i.dtype, torch.float32)) * self.rows[:, None].to(W_i.device, torch.float32)
            for W_i in stack.matrices
        )
        for W_i in matrices:
            W_i.mul_(self.columns.to(W_i.device, torch.float32))
        return replace(stack, matrices=matrices, noise_override=tuple(self.noise.tolist()))

    def delta(self, M_i: LowRank) -> LowRank:
        """The delta of the scaled stack for one of the stack."""
        return LowRank(M_i.left * self.rows.to(M_i.left)[:, None], M_i.right * self.columns.to(M_i.right)[:, None])

    def restored(self, found: Recovery) -> Recovery:
        """The least-squares answer for the stack, from that for the scaled one."""
        up, along = self.rows.to(found.weight), self.columns.to(found.weight)
        deltas = tuple(
            LowRank(M_i.left / self.rows.to(M_i.left)[:, None], M_i.right / self.columns.to(M_i.right)[:, None])
            for M_i in found.deltas
        )
        return replace(found, weight=found.weight / up[:, None] / along, deltas=deltas, residuals=None)


def _rounding(stack: Stack, some: Tensor, dim: int) -> Tensor:
    """Mean square of each entry's rounding in some rows or columns, `(n, rows, columns)`; zeros have some, too."""
    found = torch.stack(
        [
            storage_variance(W_i.index_select(dim, some.to(W_i.device)).cpu(), dtype)
            for W_i, dtype in zip(stack.matrices, stack.rounded_dtypes, strict=True)
        ]
    )
    return found.clamp(min=NEGLIGIBLE * float(found.flatten().median()))
