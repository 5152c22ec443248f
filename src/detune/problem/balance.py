"""Rows and columns of a stack scaled until rounding is about as large everywhere.

Least squares takes rounding for noise of one size. In a language model's first layers some rows are eight times as
large as others, and so is their rounding, which then hides the deltas of all the rest. With D and E diagonal, `D M_i E`
has the rank of `M_i`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detune.problem.storage_noise import storage_variance

# Entries of each row and column that it is weighed by: 256 tell a row's noise to a tenth (derived).
SAMPLED = 256
# Scaling settles at once where noise is a product of rows and columns (Sinkhorn & Knopp 1967; derived).
ROUNDS = 3
# Rounding below a millionth of the usual one, in mean squares, does not matter: that of rows of zeros is not multiplied
# beyond what float32 holds (any small number does).
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
    def of(cls, matrices: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> "Balance":
        """Weigh the rows and columns of a stack by the rounding of some of their entries.

        Args:
            matrices: The models, `(out, in)` each.
            dtypes: The dtypes that they were rounded to.
        """
        shape = matrices[0].shape
        some_rows, some_columns = (torch.arange(0, size, max(1, size // SAMPLED)) for size in shape)
        of_rows = _rounding(matrices, dtypes, some_columns, 1).mean(dim=0)
        of_columns = _rounding(matrices, dtypes, some_rows, 0)
        rows, columns = (torch.ones(size, dtype=torch.float64) for size in shape)
        for _ in range(ROUNDS):
            rows = 1 / (of_rows * columns[some_columns]).mean(dim=1)
            columns = 1 / (of_columns.mean(dim=0) * rows[some_rows, None]).mean(dim=0)
        rows, columns = rows / rows.min(), columns / columns.min()
        weights = rows[some_rows, None] * columns
        return cls(rows.sqrt(), columns.sqrt(), (of_columns * weights).mean(dim=(1, 2)).sqrt())


def _rounding(matrices: Sequence[Tensor], dtypes: Sequence[torch.dtype], some: Tensor, dim: int) -> Tensor:
    """Mean square of each entry's rounding in some rows or columns, `(n, rows, columns)`; zeros have some, too."""
    found = torch.stack(
        [
            storage_variance(W_i.index_select(dim, some.to(W_i.device)).cpu(), dtype)
            for W_i, dtype in zip(matrices, dtypes, strict=True)
        ]
    )
    return found.clamp(min=NEGLIGIBLE * float(found.flatten().median()))
