"""The error of an answer once it is stored.

Rounding to a dtype adds `ulp^2 / 12` where the base lies anywhere between the dtype's numbers. But a base was mostly
stored in that dtype itself: then an answer closer than half a unit in the last place becomes the base's own number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from detune.fitting.normal_operator import NormalOperator
from detune.numerics.float_grid import interval, spacing
from detune.numerics.linalg import product
from detune.numerics.random import seeded
from detune.problem.low_rank import LowRank
from detune.problem.recovery import Recovery
from detune.problem.storage_noise import storage_energy

# The mean of 2^14 entries is known to a per cent (derived).
SAMPLED = 1 << 14
# Standard errors by which the answer must be closer to the dtype's numbers than by chance: once in 10^9 (derived).
SURE = 6.0
# The slope is that between an error and one less by this, as a logarithm, which the simulation resolves (derived).
STEP = 0.2


@dataclass(frozen=True)
class StoredError:
    """The mean squared error per entry of the stored weight.

    Attributes:
        mse: What it is.
        slope: `d log(mse) / d log(error before storing)`: 1 where storing changes nothing, large where it undoes most.
    """

    mse: float
    slope: float = 1.0


def stored_error(
    recovery: Recovery,
    operator: NormalOperator,
    dtypes: Sequence[torch.dtype],
    stored: torch.dtype,
    mse: float,
    averaged: float,
    seed: int = 0,
) -> StoredError:
    """The error that an answer has once its weight is stored.

    Simulated on some entries: a base is rounded with every delta, the mean of the n rounding errors is taken, and the
    rest of the error is added.

    Args:
        recovery: The answer, with a delta for each model.
        operator: The operator at its spaces.
        dtypes: Dtypes of the models.
        stored: The dtype to round to.
        mse: Mean squared error per entry of the weight as it is.
        averaged: The part of it that is the mean of the n models' rounding errors in that very entry; the rest comes
            from everywhere, is normal, and larger where the spaces have large entries.
        seed: Seed of the sampled entries and of the draws.
    """
    if torch.finfo(stored).eps < min(torch.finfo(dtype).eps for dtype in dtypes):
        # Nothing is lost, and nothing undone.
        return StoredError(mse)
    generator = seeded(seed, recovery.weight.device)
    sample = _Sample.of(recovery, operator, dtypes, stored, generator)
    if not sample.is_on_grid(mse, averaged, recovery.weight.dtype):
        return sample.error(mse, averaged)
    return sample.rounded().error(mse, averaged)


def quantised_error(recovery: Recovery, stored: torch.dtype, mse: float) -> StoredError:
    """The error once stored where models were rounded to levels of their own, which no dtype's grid undoes."""
    return StoredError(mse + storage_energy(recovery.weight.to(stored)) / recovery.weight.numel())


@dataclass(frozen=True)
class _Sample:
    """Some entries of an answer, and of a base that it may be the answer for.

    Attributes:
        weight: The answer's entries, `(entries,)`, float64.
        base: A base within the models' rounding of it.
        deltas: The deltas there, `(n, entries)`.
        dtypes: Dtypes of the models.
        stored: The dtype to round to.
        between: Whether the answer is the middle between the models' intervals, not their mean.
        normal: Normal numbers, with the variance that the entries have of the error that comes from everywhere.
        uniform: Uniform numbers from -1/2 to 1/2, `(n, entries)`.
    """

    weight: Tensor
    base: Tensor
    deltas: Tensor
    dtypes: tuple[torch.dtype, ...]
    stored: torch.dtype
    between: bool
    normal: Tensor
    uniform: Tensor

    @classmethod
    def of(
        cls,
        recovery: Recovery,
        operator: NormalOperator,
        dtypes: Sequence[torch.dtype],
        stored: torch.dtype,
        generator: torch.Generator,
    ) -> "_Sample":
        """Sample an answer."""
        rows, columns = _entries(recovery.weight, generator)
        weight = recovery.weight[rows, columns].double()
        deltas = torch.stack([_entries_of(M_i, rows, columns) for M_i in recovery.deltas])
        like: dict[str, Any] = {"generator": generator, "dtype": weight.dtype, "device": weight.device}
        within = torch.rand(weight.shape, **like) - 0.5
        normal = torch.randn(weight.shape, **like) * _leverage(operator, rows, columns).sqrt()
        uniform = torch.rand(deltas.shape, **like) - 0.5
        # Where a base may be as far as anybody knows: within the rounding of the models.
        reach = _steps(weight, deltas, dtypes).amax(dim=0)
        between = recovery.mse_reduction > 0
        return cls(weight, weight + reach * within, deltas, tuple(dtypes), stored, between, normal, uniform)

    def rounded(self) -> "_Sample":
        """The sample with a base that is a number of the stored dtype."""
        return replace(self, base=self.base.to(self.stored).double())

    def error(self, mse: float, averaged: float) -> StoredError:
        """The error once stored, and its slope."""
        after, if_less = (self._mse(error, averaged) for error in (mse, mse * 10**-STEP))
        slope = math.log10(after / if_less) / STEP if after > 0 and if_less > 0 else math.inf if after > 0 else 1.0
        return StoredError(after, slope)

    def is_on_grid(self, mse: float, averaged: float, computed: torch.dtype) -> bool:
        """Whether the base was a number of the dtype that its estimate will be stored in.

        Then, where its error is below half a unit, the estimate is closer to such a number than one of a base that was
        not: by six standard errors of the mean square distance. An estimate in the dtype itself says nothing; then the
        base is taken to have been stored in it too.
        """
        if torch.finfo(computed).eps >= torch.finfo(self.stored).eps:
            return True
        off = _distances(self._answer(mse, averaged), self.stored)
        found = _distances(self.weight, self.stored)
        error = ((found.var() + off.var()) / len(found)).sqrt()
        return bool(off.mean() - found.mean() > SURE * error)

    def _mse(self, mse: float, averaged: float) -> float:
        if self.stored == torch.float64:
            # A base in the dtype of the computation: rounding cannot be simulated by doing it.
            error = (self.uniform * _steps(self.weight, self.deltas, self.dtypes)).mean(dim=0)
            error = error + self._rest(mse, averaged)
            ulp = spacing(self.weight, torch.float64)
            return float((torch.round(error / ulp) * ulp).square().mean())
        return float((self._answer(mse, averaged).to(self.stored).double() - self.base).square().mean())

    def _answer(self, mse: float, averaged: float) -> Tensor:
        """An answer with such an error."""
        return self._of_known_deltas() + self._rest(mse, averaged)

    def _rest(self, mse: float, averaged: float) -> Tensor:
        """The part of the error that is not the answer's own rounding."""
        if self.between:
            averaged = float((self._of_known_deltas() - self.base).square().mean())
        return self.normal * math.sqrt(max(0.0, mse - averaged))

    def _of_known_deltas(self) -> Tensor:
        """The weight for known deltas: the mean of the models, or the middle of what their intervals have in common."""
        models = [(self.base + M_i).to(dtype) for M_i, dtype in zip(self.deltas, self.dtypes, strict=True)]
        if not self.between:
            return (torch.stack([W_i.double() for W_i in models]) - self.deltas).mean(dim=0)
        ends = [interval(W_i) for W_i in models]
        low = (torch.stack([low for low, _ in ends]) - self.deltas).amax(dim=0)
        return (low + (torch.stack([high for _, high in ends]) - self.deltas).amin(dim=0)) / 2


def _steps(weight: Tensor, deltas: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """Each model's unit in the last place, `(n, entries)`."""
    return torch.stack([spacing(weight + M_i, dtype) for M_i, dtype in zip(deltas, dtypes, strict=True)])


def _distances(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared distances to the dtype's numbers, in units in the last place."""
    return ((values.to(dtype).double() - values) / spacing(values, dtype)).square()


def _entries_of(M_i: LowRank, rows: Tensor, columns: Tensor) -> Tensor:
    """Some entries of a delta, float64.

    By float32 they are near enough: what is simulated takes off the very deltas that it has put on.
    """
    # Rows that lie in one piece are picked several times faster.
    left, right = (
        factor.float().contiguous().index_select(0, places)
        for factor, places in ((M_i.left, rows), (M_i.right, columns))
    )
    return left.mul_(right).sum(dim=1).double()


def _leverage(operator: NormalOperator, rows: Tensor, columns: Tensor) -> Tensor:
    """How the error that comes from everywhere is spread over entries, mean 1: the diagonal of A^-1 less 1/n.

    On the core A is taken for the Kronecker product that preconditions it.
    """
    n = len(operator.a)
    sides = (operator.Q, operator.inverse_G_U, rows), (operator.P, operator.inverse_G_V, columns)
    (q, u), (p, v) = (_diagonals(basis.float(), inverse.float(), places) for basis, inverse, places in sides)
    diagonal = ((1 - q) * (1 - p) - 1) / n + u * (1 - p) + (1 - q) * v + n * u * v
    spread = diagonal.clamp(min=0)
    return spread / spread.mean().clamp(min=torch.finfo(spread.dtype).tiny)


def _diagonals(basis: Tensor, inverse: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Some of the diagonals of `Q Q^T` and `Q G^+ Q^T`, float64."""
    projector, weighed = basis.square().sum(dim=1), (product(basis, inverse) * basis).sum(dim=1)
    return projector[places].double(), weighed[places].double()


def _entries(weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows and columns of different entries: all of a small matrix, some of a large one."""
    step = max(1, weight.numel() // SAMPLED)
    starts = torch.arange(0, weight.numel() - step + 1, step, device=weight.device)
    places = starts + torch.randint(step, starts.shape, generator=generator, device=weight.device)
    return places // weight.shape[1], places % weight.shape[1]
