"""Outliers: entries a thousand times as large as the others of their matrix, by damage or to stand for infinity.

The rounding of one is as much as that of a million others. It is left out of the fit: what the model would hold there,
as far as the others tell, is put in its place. The rows without outliers give the row spaces `R_i` of the
`M_i = L_i R_i^T`; a row with one has its part of the `L_i` from its other columns, by least squares on

    W_i - mean_j W_j = L_i R_i^T - mean_j L_j R_j^T ,

and its W from the models without an outlier there. Where all have one, their own numbers are the answer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress, islice, permutations

import torch
from torch import Tensor

from detune.numerics.float_grid import spacing
from detune.problem.low_rank import LowRank
from detune.problem.recovery import NotRecoverable, Recovery
from detune.problem.stack import Stack

# An entry is an outlier from a thousand times the typical size on, if it is as many times what another model holds
# there, or all hold such: its rounding is then as much as that of a million others (derived). The largest weights of
# language models are some hundreds of times the typical size, and adapters change an entry by far less.
APART = 1e3
# A larger share of a model's entries is another matrix: any number does that is well below a half.
MOST = 0.1
# If all models hold such entries in more of the places, in the same ones, it is a matrix of two scales: any number does
# that is far below a share that one model may have lost.
MOST_EVERYWHERE = 0.01
# Columns that tell what a row's deltas are: any number does that is well above the ranks.
TELLING = 4096
# Entries that are named: any number does that leaves a sentence readable.
NAMED = 3

Split = Callable[[Stack], Sequence[LowRank]]


@dataclass(frozen=True)
class Outliers:
    """The places of a matrix in which some models hold outliers.

    Attributes:
        rows: Rows of the places, `(p,)`, int64.
        columns: `(p,)`.
        stored: What the models hold there, `(p, n)`, float64.
        steps: Units in the last place of that, `(p, n)`, float64.
        is_outlier: Which of it is one, `(p, n)`, bool.
        typical: The typical size of each model's entries, `(n,)`, float64.
    """

    rows: Tensor
    columns: Tensor
    stored: Tensor
    steps: Tensor
    is_outlier: Tensor
    typical: Tensor

    @classmethod
    def of(cls, stack: Stack) -> "Outliers | None":
        """Look for them; None where there are none.

        Raises:
            NonFinite: A model holds NaN or Inf.
        """
        least = APART * stack.typical
        if not bool((stack.extremes.abs().amax(dim=1) > least).any()):
            return None
        # Rows first: a large matrix is not to be copied for one entry.
        ends = [torch.stack(torch.aminmax(W_i, dim=1)).double().cpu() for W_i in stack.matrices]
        rows = (torch.stack(ends).abs().amax(dim=1) > least[:, None]).any(dim=0).nonzero()[:, 0]
        sizes = torch.stack([W_i[rows.to(W_i.device)].cpu().double().abs() for W_i in stack.matrices])
        times = sizes / stack.typical[:, None, None]
        everywhere = times.gt(APART).all(dim=0)
        mask = times.gt(APART) & (sizes / APART).gt(sizes.amin(dim=0))
        entries = math.prod(stack.shape)
        mask &= mask.sum(dim=(1, 2), keepdim=True).le(MOST * entries)
        if int(everywhere.sum()) <= MOST_EVERYWHERE * entries:
            mask |= everywhere
        chosen, columns = mask.any(dim=0).nonzero(as_tuple=True)
        if not len(chosen):
            return None
        is_outlier, rows = mask[:, chosen, columns].mT, rows[chosen]
        there = [_at(W_i, rows, columns) for W_i in stack.matrices]
        steps = torch.stack([spacing(values, values.dtype) for values in there], dim=1)
        stored = torch.stack([values.double() for values in there], dim=1)
        return cls(rows, columns, stored, steps, is_outlier, stack.typical)

    @property
    def transposed(self) -> "Outliers":
        """The places in the transposed matrix."""
        return replace(self, rows=self.columns, columns=self.rows)

    @property
    def everywhere(self) -> Tensor:
        """The places in which all models have outliers, `(p,)`, bool."""
        return self.is_outlier.all(dim=1)

    def filled(self, stack: Stack, values: Tensor) -> Stack:
        """The stack with values in place of the outliers.

        Args:
            stack: The models.
            values: For each place and model, `(p, n)`, float64; other entries are left as they are.
        """
        matrices = []
        for W_i, is_outlier, own in zip(stack.matrices, self.is_outlier.mT, values.mT, strict=True):
            matrices.append(_put(W_i, self.rows[is_outlier], self.columns[is_outlier], own[is_outlier]))
        return replace(stack, matrices=tuple(matrices))

    def foretold(self, stack: Stack, split: Split) -> Tensor:
        """The values that the models would hold in these places, by the others.

        Args:
            stack: The models, with anything finite for the outliers.
            split: Finds the `M_i` of a part of the rows, or of the columns.

        Returns:
            The values, `(p, n)`, float64.
        """
        by_rows = len(self.rows.unique()) * stack.shape[1] <= len(self.columns.unique()) * stack.shape[0]
        turned, view = (self, stack) if by_rows else (self.transposed, stack.transposed)
        deltas = torch.zeros_like(self.stored)
        spaces = turned._row_spaces(view, split)
        for row in turned.rows.unique().tolist() if spaces else ():
            here = turned.rows == row
            tame = torch.ones(view.shape[1], dtype=torch.bool)
            tame[turned.columns[here]] = False
            lefts = _left_factors(view, spaces, row, tame.nonzero()[:, 0])
            entries = [R_i[turned.columns[here]] @ l_i for R_i, l_i in zip(spaces, lefts, strict=True)]
            deltas[here] = torch.stack(entries, dim=1)
        stored = torch.stack([_at(W_i, self.rows, self.columns).double() for W_i in stack.matrices], dim=1)
        weights = torch.where(self.is_outlier, 0.0, stored - deltas).sum(dim=1, keepdim=True)
        values = weights / (~self.is_outlier).sum(dim=1, keepdim=True).clamp(min=1) + deltas
        for i, j in self._twins(stack):
            values[:, i] = torch.where(self.is_outlier[:, j], values[:, i], stored[:, j])
        return values

    def _twins(self, stack: Stack) -> Iterator[tuple[int, int]]:
        """The pairs of models that agree in every bit elsewhere: one has what the other has lost."""
        emptied = replace(self, is_outlier=torch.ones_like(self.is_outlier)).filled(
            stack, torch.zeros_like(self.stored)
        )
        for group in emptied.versions:
            yield from permutations(group, 2)

    def _row_spaces(self, stack: Stack, split: Split) -> list[Tensor]:
        """The right factors of the `M_i`, `(in, r_i)`, float64; none where the other rows do not tell."""
        kept = torch.ones(stack.shape[0], dtype=torch.bool)
        kept[self.rows] = False
        if 2 * int(kept.count_nonzero()) < stack.shape[0] or min(stack.shape) == 1:
            return []
        try:
            deltas = split(replace(stack, matrices=tuple(W_i[kept.to(W_i.device)] for W_i in stack.matrices)))
        except NotRecoverable:
            return []
        return [M_i.right.cpu().double() for M_i in deltas] if all(type(M_i) is LowRank for M_i in deltas) else []

    def entries(self, recovery: Recovery) -> Tensor:
        """The values of an answer in these places for each model, `(p, n)`, float64."""
        weight = _at(recovery.weight, self.rows, self.columns).double()[:, None].expand_as(self.stored)
        deltas = [_at(M_i.dense(), self.rows, self.columns).double() for M_i in recovery.deltas]
        return weight + torch.stack(deltas, dim=1) if deltas else weight

    def emptied(self, recovery: Recovery) -> Recovery:
        """The answer with zeros where all models have outliers."""
        there = self.everywhere
        if not bool(there.any()):
            return recovery
        weight = _put(recovery.weight, self.rows[there], self.columns[there], torch.tensor(0.0))
        return replace(recovery, weight=weight)

    def restored(self, recovery: Recovery) -> Recovery:
        """The answer with the models' median where all have outliers; none of these places is certain."""
        there, weight, bits, agreed = self.everywhere, recovery.weight, recovery.bits, recovery.agreed
        if bool(there.any()):
            weight = _put(weight, self.rows[there], self.columns[there], self.stored[there].median(dim=1).values)
        if bits is not None:
            bits = replace(bits, certain=_put(bits.certain, self.rows, self.columns, torch.tensor(False)))
        if agreed is not None:
            agreed = _put(agreed, self.rows, self.columns, torch.tensor(False))
        reason = f"{recovery.reason}; {self.sentence()}"
        return replace(recovery, weight=weight, bits=bits, agreed=agreed, reason=reason)

    def sentence(self, names: Sequence[str] = ()) -> str:
        """The entries by their places, and what was done.

        Args:
            names: What the models are called; by default "model 0" and so on.
        """
        names = names or [f"model {i}" for i in range(len(self.typical))]
        places = zip(self.rows.tolist(), self.columns.tolist(), self.is_outlier, self.stored, strict=True)
        said = [
            f"entry ({row}, {column}) of {_whose(those, names)}, {_worst(values, those):.3g}, "
            f"is {_worst(values / self.typical, those, sign=False):.1g} times the typical size: left out of the fit, "
            f"and {'taken as it is' if bool(those.all()) else 'found from the others'}"
            for row, column, those, values in islice(places, NAMED)
        ]
        more = len(self.rows) - NAMED
        return "; ".join(said) + (f"; and in {more} more place{'s' * (more > 1)}" if more > 0 else "")

    @property
    def log10_unknown(self) -> float:
        """`log10` of what squares of the numbers that are taken as they are may be off by, in sum; -inf for none.

        Each is off by its rounding, and by how far the models differ.
        """
        there = self.stored[self.everywhere]
        if not len(there):
            return -math.inf
        # Quarters, because a difference of the largest numbers has no float.
        off = there.amax(dim=1) / 4 - there.amin(dim=1) / 4 + self.steps[self.everywhere].amax(dim=1) / 4
        return 2 * math.log10(float(off.max())) + math.log10(16 * len(there))


def _at(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Some entries, on the CPU."""
    return matrix[rows.to(matrix.device), columns.to(matrix.device)].cpu()


def _put(matrix: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """A copy with other values in some entries."""
    return matrix.index_put((rows.to(matrix.device), columns.to(matrix.device)), values.to(matrix))


def _whose(is_outlier: Tensor, names: Sequence[str]) -> str:
    """The models with an outlier in a place."""
    return "all models" if bool(is_outlier.all()) else " and ".join(compress(names, is_outlier.tolist()))


def _worst(values: Tensor, is_outlier: Tensor, sign: bool = True) -> float:
    """The outlier of the largest magnitude."""
    outliers = values[is_outlier]
    worst = float(outliers[outliers.abs().argmax()])
    return worst if sign else abs(worst)


def _left_factors(stack: Stack, spaces: Sequence[Tensor], row: int, columns: Tensor) -> Sequence[Tensor]:
    """A row's part of the `L_i`, `(r_i,)` each, float64, by least squares on some columns."""
    columns = columns[:: max(1, len(columns) // TELLING)]
    n, ranks = stack.n, [R_i.shape[1] for R_i in spaces]
    stored = torch.stack([W_i[row].cpu().double()[columns] for W_i in stack.matrices])
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    A = torch.cat([torch.einsum("i,cr->icr", centre[:, j], R_j[columns]) for j, R_j in enumerate(spaces)], dim=2)
    right = (stored - stored.mean(dim=0)).flatten()[:, None]
    solved = torch.linalg.lstsq(A.flatten(0, 1), right, driver="gelsd").solution[:, 0]
    return torch.split(solved, ranks)
