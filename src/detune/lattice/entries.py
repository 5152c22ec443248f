"""The models' entries as intervals of real numbers, some rows and columns at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from detune.numerics.float_grid import lies_on
from detune.problem.stack import Stack

# Entries of all models that are worked on at a time: products with them are large, and memory stays small (any number
# does).
TOGETHER = 1 << 21
LEAST_ROWS = 32


class Entries(Protocol):
    """Where each model's entries may lie.

    Attributes:
        n: Number of models.
        shape: `(out, in)`.
    """

    @property
    def n(self) -> int: ...  # noqa: D102

    @property
    def shape(self) -> tuple[int, int]: ...  # noqa: D102

    @property
    def transposed(self) -> "Entries":
        """The transposed matrices."""
        ...

    def part(self, rows: Tensor | None, columns: Tensor | None) -> "Entries":
        """Some rows and columns; None is all."""
        ...

    def block(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends in some rows, `(n, rows, in)`, float64."""
        ...


@dataclass(frozen=True)
class StoredEntries:
    """Entries that were rounded to a float dtype.

    Attributes:
        matrices: The models, `(out, in)` each, bf16, fp16 or float32, on the CPU.
    """

    matrices: tuple[Tensor, ...]

    @classmethod
    def of(cls, stack: Stack) -> "StoredEntries":
        """The models of a stack, in the dtypes that they were rounded to."""
        return cls(tuple(W_i.cpu() for W_i in stack.matrices))

    @property
    def n(self) -> int:
        """Number of models."""
        return len(self.matrices)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.matrices[0].shape[0], self.matrices[0].shape[1]

    @cached_property
    def transposed(self) -> "StoredEntries":
        """The transposed matrices; nothing is copied."""
        return StoredEntries(tuple(W_i.mT for W_i in self.matrices))

    def part(self, rows: Tensor | None, columns: Tensor | None) -> "StoredEntries":
        """Some rows and columns, copied."""
        matrices = self.matrices
        if rows is not None:
            matrices = tuple(W_i.index_select(0, rows) for W_i in matrices)
        if columns is not None:
            matrices = tuple(W_i.index_select(1, columns) for W_i in matrices)
        return replace(self, matrices=matrices)

    def block(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends in some rows; those of small matrices are kept for the next sweep."""
        if self.n * self.shape[0] * self.shape[1] > TOGETHER:
            return self._ends(rows)
        low, high = self._all_ends
        return low[:, rows], high[:, rows]

    @cached_property
    def _all_ends(self) -> tuple[np.ndarray, np.ndarray]:
        return self._ends(slice(None))

    def _ends(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        # numba takes a second to import, which commands that solve nothing need not wait for.
        from detune.lattice.kernels import intervals

        stored = torch.stack([W_i[rows].to(torch.float32) for W_i in self.matrices]).numpy()
        models = np.stack([grid_of(W_i.dtype) for W_i in self.matrices])
        low, high = np.empty(stored.shape), np.empty(stored.shape)
        intervals(stored, models, low, high)
        return low, high


def in_rounded_dtypes(stack: Stack) -> Stack:
    """The stack in the dtypes that its models were rounded to: float32 files may hold what was bf16 or fp16 before."""
    rounded = tuple(
        W_i.to(dtype) if W_i.dtype != dtype and lies_on(W_i, dtype) else W_i
        for W_i, dtype in zip(stack.matrices, stack.rounded_dtypes, strict=True)
    )
    as_stored = all(W_i is given for W_i, given in zip(rounded, stack.matrices, strict=True))
    # One model alone may have left a half-precision base as it was.
    return stack if as_stored or stack.n == 1 else replace(stack, matrices=rounded)


def grid_of(dtype: torch.dtype | None) -> np.ndarray:
    """Relative spacing and smallest normal number of a dtype; zeros for no grid."""
    return np.zeros(2) if dtype is None else np.array([torch.finfo(dtype).eps, torch.finfo(dtype).tiny])


def row_blocks(entries: Entries) -> Iterator[slice]:
    """All rows, as many at a time as fit in memory."""
    out, columns = entries.shape
    height = max(LEAST_ROWS, TOGETHER // (entries.n * columns))
    for start in range(0, out, height):
        yield slice(start, min(start + height, out))
