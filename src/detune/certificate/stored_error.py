"""The error of an answer once it is stored.

Rounding to a dtype adds `ulp^2 / 12` where the base lies anywhere between the dtype's numbers. But a base was mostly
stored in that dtype itself: then an answer closer than half a unit in the last place becomes the base's own number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from detune.fitting.normal_operator import NormalOperator
from detune.numerics.float_grid import interval, spacing
from detune.numerics.linalg import product
from detune.numerics.random import seeded
from detune.problem.low_rank import LowRank
from detune.problem.recovery import PredictedError, Recovery
from detune.problem.storage_noise import storage_energy

# Enough entries to know the average of what rounding does.
SAMPLED = 1 << 14
# Standard errors by which the answer must be closer to the dtype's numbers than by chance.
SURE = 6.0
# Errors are predicted to about this, as a logarithm.
KNOWN_TO = 0.2


@dataclass(frozen=True)
class StoredError(PredictedError):
    """The error of the stored weight.

    Attributes:
        if_less: What it is if the error before was less by as much as it is known to, where nothing is in doubt.
    """

    if_less: float


def rounded_mse(
    recovery: Recovery,
    operator: NormalOperator,
    dtypes: Sequence[torch.dtype],
    stored: torch.dtype,
    before: PredictedError,
    averaged: float,
    seed: int = 0,
    quantised: bool = False,
) -> StoredError:
    """The mean squared error per entry that an answer has once its weight is stored.

    Simulated on some entries: a base is rounded with every delta, the mean of the n rounding errors is taken, and the
    rest of the error is added.

    Args:
        recovery: The answer, with a delta for each model.
        operator: The operator at its spaces.
        dtypes: Of the models.
        stored: The dtype to round to.
        before: The error of the weight as it is.
        averaged: The part of it that is the mean of the n models' rounding errors in that very entry; the rest comes
            from everywhere, is normal, and larger where the spaces have large entries.
        seed: Of the sampled entries and of the draws.
        quantised: Whether the models were rounded to levels of their own, which no dtype's grid undoes.
    """
    less = before.mse * 10**-KNOWN_TO
    if quantised:
        added = storage_energy(recovery.weight.to(stored)) / recovery.weight.numel()
        return StoredError(before.mse + added, before.least + added, before.most + added, less + added)
    if torch.finfo(stored).eps < min(torch.finfo(dtype).eps for dtype in dtypes):
        # Nothing is lost, and nothing undone.
        return StoredError(before.mse, before.least, before.most, less)
    generator = seeded(seed, recovery.weight.device)
    rows, columns = _entries(recovery.weight, generator)
    weight = recovery.weight[rows, columns].double()
    between = recovery.mse_reduction > 0
    entries = torch.stack([_entries_of(M_i, rows, columns) for M_i in recovery.deltas])
    # Where a base may be as far as anybody knows: within the rounding of the models.
    steps = torch.stack([spacing(weight + M_i, dtype) for M_i, dtype in zip(entries, dtypes, strict=True)])
    reach = steps.amax(dim=0)
    uniform, normal = (
        draw(weight.shape, generator=generator, dtype=weight.dtype, device=weight.device)
        for draw in (torch.rand, torch.randn)
    )
    base = weight + reach * (uniform - 0.5)
    if between:
        averaged = float((_answer(base, entries, dtypes, between) - base).square().mean())
    leverage = _leverage(operator, rows, columns)

    def rest(error: float) -> Tensor:
        return normal * (max(0.0, error - averaged) * leverage).sqrt()

    errors = (before.mse, before.least, before.most, less)
    if stored == torch.float64:
        own = torch.rand(steps.shape, generator=generator, dtype=weight.dtype, device=weight.device) - 0.5
        return StoredError(*(_in_float64(weight, steps, rest(error), own) for error in errors))

    def simulate(base: Tensor, error: float) -> _Stored:
        return _Stored.simulate(base, entries, dtypes, rest(error), stored, between)

    if _on_grid(recovery.weight, weight, stored, simulate(base, before.mse)):
        base = base.to(stored).double()
    return StoredError(*(simulate(base, error).mse for error in errors))


def _in_float64(weight: Tensor, steps: Tensor, rest: Tensor, uniform: Tensor) -> float:
    """The stored error where the base is in the dtype of the computation: rounding cannot be simulated by doing it."""
    error = (uniform * steps).mean(dim=0) + rest
    ulp = spacing(weight, torch.float64)
    return float((torch.round(error / ulp) * ulp).square().mean())


class _Stored(NamedTuple):
    """A simulated answer: the mean squared error once stored, and how far it was from the dtype's numbers.

    `distances` are squares, in units in the last place, an entry each.
    """

    mse: float
    distances: Tensor

    @classmethod
    def simulate(
        cls,
        base: Tensor,
        deltas: Tensor,
        dtypes: Sequence[torch.dtype],
        rest: Tensor,
        stored: torch.dtype,
        between: bool,
    ) -> "_Stored":
        """Merge, average, and store.

        Args:
            base: Entries of a base, `(entries,)`, float64.
            deltas: The deltas there, `(n, entries)`.
            dtypes: Of the models.
            rest: The part of the answer's error that is not its own rounding.
            stored: The dtype of the answer.
            between: Whether the answer is the middle between the models' intervals, not their mean.
        """
        answer = _answer(base, deltas, dtypes, between) + rest
        return cls(float((answer.to(stored).double() - base).square().mean()), _distances(answer, stored))


def _answer(base: Tensor, deltas: Tensor, dtypes: Sequence[torch.dtype], between: bool) -> Tensor:
    """The weight for known deltas: the mean of the models, or the middle of what their intervals have in common."""
    models = [(base + M_i).to(dtype) for M_i, dtype in zip(deltas, dtypes, strict=True)]
    if not between:
        return (torch.stack([W_i.double() for W_i in models]) - deltas).mean(dim=0)
    ends = [interval(W_i) for W_i in models]
    low = (torch.stack([low for low, _ in ends]) - deltas).amax(dim=0)
    return (low + (torch.stack([high for _, high in ends]) - deltas).amin(dim=0)) / 2


def _distances(values: Tensor, dtype: torch.dtype) -> Tensor:
    return ((values.to(dtype).double() - values) / spacing(values, dtype)).square()


def _on_grid(weight: Tensor, sampled: Tensor, stored: torch.dtype, off: _Stored) -> bool:
    """Whether the base was a number of the dtype that its estimate will be stored in.

    Then, where its error is below half a unit, the estimate is closer to such a number than one of a base that was not:
    by six standard errors of the mean square distance. An estimate in the dtype itself says nothing; then the base is
    taken to have been stored in it too.
    """
    if torch.finfo(weight.dtype).eps >= torch.finfo(stored).eps:
        return True
    found = _distances(sampled, stored)
    error = ((found.var() + off.distances.var()) / len(found)).sqrt()
    return bool(off.distances.mean() - found.mean() > SURE * error)


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
