"""Large matrices are fitted in some of their rows and columns; the other factors follow from those."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from detune.lattice.entries import StoredEntries
from detune.lattice.estimate import Estimate
from detune.lattice.message_passing import stepped
from detune.numerics.random import seeded

# Rows and columns that show a grid, or a model without a delta (any number does: `benchmarks/constants.py`).
SMALL_BLOCK = 256
# Least squares promises variances that are too small where it lacks directions (any number does:
# `benchmarks/constants.py`).
WIDE = 4.0
# Newton steps for the other rows: each looks at every second entry, or at all, and brings down what a row is uncertain
# by, to a fifth at most. In random 2048x2048 matrices half of the entries in the first steps cost 0.02 % of the bits
# and save a tenth of the time; a quarter of them left columns wrong in small matrices (measured:
# `benchmarks/constants.py`).
STEPS_OUT, MOST_FALL = (2, 2, 1), 0.2


@dataclass(frozen=True)
class Submatrix:
    """Some rows and columns of a matrix, in order.

    Attributes:
        rows: Which rows; None is all.
        columns: Which columns; None is all.
    """

    rows: Tensor | None
    columns: Tensor | None

    @classmethod
    def draw(cls, shape: tuple[int, int], most: int, seed: int) -> "Submatrix":
        """Draw rows and columns of a matrix, all of those that are not many more than `most`."""
        rows, columns = (
            None if size <= most + most // 2 else torch.randperm(size, generator=seeded(seed))[:most].sort().values
            for size in shape
        )
        return cls(rows, columns)

    @classmethod
    def small(cls, shape: tuple[int, int], seed: int) -> "Submatrix":
        """Draw a few rows and columns, which show whether there is a grid, and which models have deltas."""
        return cls.draw(shape, SMALL_BLOCK, seed)

    @property
    def is_whole(self) -> bool:
        """Whether all rows and columns are taken."""
        return self.rows is None and self.columns is None

    def entries(self, entries: StoredEntries) -> StoredEntries:
        """These rows and columns of the models."""
        return entries if self.is_whole else entries.part(self.rows, self.columns)

    def estimates(self, estimates: Sequence[Estimate]) -> list[Estimate]:
        """These rows and columns of the estimates."""
        return [e.part(all_or(self.rows), all_or(self.columns)) for e in estimates]


def all_or(some: Tensor | None) -> Tensor | slice:
    """An index of some rows or columns; None takes all."""
    return slice(None) if some is None else some


def extended(
    entries: StoredEntries,
    begun: Sequence[Estimate],
    estimates: Sequence[Estimate],
    rows: Tensor,
    grid: np.ndarray,
    columns: Tensor | slice = slice(None),
) -> tuple[Estimate, ...]:
    """Left factors for all rows, from those of some.

    The others start from what the fit has begun with, or from nothing, as uncertain as rows are large.

    Args:
        entries: The models, all rows and the columns that are looked at.
        begun: The estimates that the fit has begun with, all rows and columns.
        estimates: The estimates of some rows and all columns.
        rows: Which rows.
        grid: The grid of W.
        columns: The columns that are looked at, of the estimates'.
    """
    whole = []
    for start, e in zip(begun, (e.normalised() for e in estimates), strict=True):
        left = start.left @ (start.right.mT @ e.right) / len(e.right)
        variance = torch.full((len(left),), float(e.left.square().mean()) if e.rank else 0.0)
        if start.rank:
            variance = torch.minimum(variance, WIDE * start.rows * (start.right.square().mean()))
        left[rows], variance[rows] = e.left, e.rows
        whole.append(replace(e, left=left, rows=variance))
    seen = [e.part(slice(None), columns) for e in whole]
    for every in STEPS_OUT:
        # The first steps are taken far from the answer, and promise too much: a part of the entries is enough for them.
        some = None if every == 1 else torch.arange(0, entries.shape[1], every)
        here = entries if some is None else entries.part(None, some)
        found = stepped(here, [e.part(slice(None), all_or(some)) for e in seen], grid)
        least = [torch.maximum(new.rows, MOST_FALL * e.rows) for new, e in zip(found, seen, strict=True)]
        seen = [replace(e, left=new.left, rows=v) for e, new, v in zip(seen, found, least, strict=True)]
    return tuple(replace(e, left=new.left, rows=new.rows) for e, new in zip(whole, seen, strict=True))
