"""The result type, and the protocol of solvers: frozen hyperparameters with one verb, `solve(stack) -> Recovery`.

Notation, as in the paper (arXiv 2402.10208):

| symbol | meaning | shape |
| --- | --- | --- |
| `W`, `W_star` | the base's weight matrix, and its estimate | `(out, in) = (d, k)` |
| `W_i` | the same matrix in fine-tuned model i, `W + M_i` rounded to its dtype | `(d, k)` |
| `M_i` | the merged adapter of model i, of rank at most `r_i` | `(d, k)` |
| `U_i`, `V_i` | orthonormal bases of the column and row space of `M_i` | `(d, r_i)`, `(k, r_i)` |
| `n` | number of models | |
| `s` | joint width, the sum of the ranks | |
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from detune.errors import DetuneError
from detune.numerics.float_grid import times_power_of_two
from detune.origin import Origin
from detune.problem.low_rank import LowRank
from detune.problem.rank_rule import MOST_RANK
from detune.problem.stack import Stack

# A difference of two models splits into two adapters in infinitely many ways; a third model decides (derived, see
# `docs/method.md`).
FEWEST_MODELS = 3


class NotRecoverable(DetuneError):
    """The method does not apply to this stack; the message says which condition fails and what to try."""


class NotLowRank(NotRecoverable):
    """Some differences have no low rank.

    Attributes:
        pairs: The pairs of models.
    """

    def __init__(self, pairs: tuple[tuple[int, int], ...], shape: tuple[int, int]) -> None:
        self.pairs = pairs
        super().__init__(
            f"models {pairs[0][0]} and {pairs[0][1]} differ at full rank in a {shape[0]}x{shape[1]} matrix",
            f"one has another base, was fine-tuned in full, or their ranks add up to {min(*shape, MOST_RANK)} or more",
            "leave it out",
        )


@dataclass(frozen=True)
class PredictedError:
    """A mean squared error per entry that nobody has measured.

    Attributes:
        mse: What to expect.
        least: The lower end of its range.
        most: The upper end.
    """

    mse: float
    least: float
    most: float

    def times_power_of_two(self, exponent: int) -> "PredictedError":
        """The error times `2^exponent`."""
        return PredictedError(*(math.ldexp(mse, exponent) for mse in (self.mse, self.least, self.most)))


@dataclass(frozen=True)
class DecodedBits:
    """The base's grid, and the entries whose bits are known.

    Attributes:
        grid: The dtype whose grid the base's entries lie on: bfloat16, float16 or float32.
        log10_false_positive: Logarithm of the probability that a base off that grid would have looked as if it were
            on it; the test's bound, not an estimate.
        certain: Where the weight is the base's, bit for bit, `(out, in)`, bool.
        expected: Error of the weight that the rest is expected to leave: the median, and between what it is by chance.
        foreseeable: The probability that the error is within a factor of two of the median: where a few entries with
            long steps decide, it is chance.
        from_least_squares: Whether the fit began with a least-squares answer, and not from nothing.
    """

    grid: torch.dtype
    log10_false_positive: float
    certain: Tensor
    expected: PredictedError
    foreseeable: float
    from_least_squares: bool = False

    @property
    def share(self) -> float:
        """The share of entries that are certain."""
        return int(self.certain.count_nonzero()) / self.certain.numel()


@dataclass(frozen=True)
class Residuals:
    """The residuals of a fit for given row or column spaces, `e_i = W_i - W_star - M_i`.

    The normal equations hold exactly: `sum_i e_i = 0`, and `e_i V_i = 0` where row spaces are given.

    Attributes:
        weight: `W_star`, the very tensor: of an answer that was changed since, these say nothing.
        deltas: The `M_i`.
        energy: `sum_i |e_i|^2`.
        products: What need not vanish, `M_i.left^T e_i` for each model, `(r_i, in)`, compute dtype; where column spaces
            are given, `M_i.right^T e_i^T`, `(r_i, out)`.
        transposed: Whether column spaces were given.
    """

    weight: Tensor
    deltas: tuple[LowRank, ...]
    energy: float
    products: tuple[Tensor, ...]
    transposed: bool = False

    def are_of(self, recovery: "Recovery") -> bool:
        """Whether an answer is still the one that they were seen of."""
        return self.weight is recovery.weight and self.deltas is recovery.deltas


@dataclass(frozen=True)
class Recovery:
    """A solver's answer for one matrix.

    Attributes:
        weight: `W_star`, `(out, in)`, compute dtype.
        method: The solver that gave it; `auto` names the one it chose.
        reason: One sentence: why this method, what was assumed, what went wrong.
        deltas: The recovered `M_i`, one for each model; empty where the method does not split them off.
        ranks: The rank of each `M_i`; empty where not known.
        relative_residual: `sqrt(sum_i |W_i - W_star - M_i|^2 / sum_i |W_i - mean|^2)`: the share of what differs
            between the models that the answer does not explain. None where the method has no model of it.
        noise_ratio: The same residual over what storage rounding alone leaves: 1 is the storage floor.
        steps: Iterations used; 0 for a closed form.
        bits: Where the base was found to lie on a grid: which, and which entries are certain. None where it was not.
        mse_reduction: By how much the weight's mean squared error per entry is below that of least squares.
        residuals: Where the last step has seen them: they save the certificate a pass over the models.
        agreed: Where at least two models have the weight's bits, `(out, in)`, bool: for methods that ask for no more.
        source_models: The models that the weight is from, and that the residuals speak of, where the others are
            stored far more coarsely; empty is all.
        hidden_mse: Where a model is taken, without proof, to have left the matrix alone: the most that the weight's
            mean squared error is if it did not.
        expected: The error of the weight by what the fit itself leaves open, where it is no fit of least squares.
        origin: Where the weight comes from.
        mse_exponent: The mean squared errors here and in `bits` are to be multiplied by `2^mse_exponent`: what they are
            then may have no float.
    """

    weight: Tensor
    method: str
    reason: str
    deltas: tuple[LowRank, ...] = ()
    ranks: tuple[int, ...] = ()
    relative_residual: float | None = None
    noise_ratio: float | None = None
    steps: int = 0
    bits: DecodedBits | None = None
    mse_reduction: float = 0.0
    residuals: Residuals | None = None
    agreed: Tensor | None = None
    source_models: tuple[int, ...] = ()
    hidden_mse: float = 0.0
    expected: PredictedError | None = None
    origin: Origin = Origin.SOLVED
    mse_exponent: int = 0

    @property
    def left_alone(self) -> bool:
        """Whether it is the matrix of a model that is taken to have left it alone: nothing was solved."""
        return self.origin is Origin.UNCHANGED

    def times_power_of_two(self, exponent: int) -> "Recovery":
        """The answer for models that are `2^exponent` times as large."""
        if not exponent:
            return self
        return replace(
            self,
            weight=times_power_of_two(self.weight, exponent),
            deltas=tuple(M_i.times_power_of_two(exponent) for M_i in self.deltas),
            residuals=None,
            mse_exponent=self.mse_exponent + 2 * exponent,
        )

    def scaled(self, rows: Tensor, columns: Tensor) -> "Recovery":
        """The least-squares answer for models with rows and columns multiplied by these numbers, `(out,)`, `(in,)`."""
        weight = self.weight * rows.to(self.weight)[:, None] * columns.to(self.weight)
        return replace(
            self, weight=weight, deltas=tuple(M_i.scaled(rows, columns) for M_i in self.deltas), residuals=None
        )

    def with_plain_errors(self) -> "Recovery":
        """The answer with mean squared errors that are the weight's."""
        exponent = self.mse_exponent
        if not exponent:
            return self
        return replace(
            self,
            bits=self.bits and replace(self.bits, expected=self.bits.expected.times_power_of_two(exponent)),
            expected=self.expected and self.expected.times_power_of_two(exponent),
            mse_reduction=math.ldexp(self.mse_reduction, exponent),
            hidden_mse=math.ldexp(self.hidden_mse, exponent),
            mse_exponent=0,
        )


def left_alone(stack: Stack, model: int, sign: str, hidden_mse: float = 0.0) -> Recovery:
    """A model's own matrix, taken to be the base's.

    Args:
        stack: The models.
        model: Which one.
        sign: The evidence that it left the matrix alone.
        hidden_mse: As in `Recovery`.
    """
    return Recovery(
        stack.matrices[model].to(stack.device, stack.dtype, copy=True),
        "unchanged",
        f"{sign}: taken to have left it as the base has it",
        noise_ratio=0.0,
        hidden_mse=hidden_mse,
        origin=Origin.UNCHANGED,
    )


class Solver(Protocol):
    """A recovery method with its hyperparameters, a frozen dataclass.

    Attributes:
        min_models: The fewest models that it makes sense with.
        low_rank: Whether it takes models to differ by low ranks, which then tell whether they share a base.
        working_copies: What it holds beside the stack of three models at most, in copies of a large matrix in float32,
            or in float64 of models in float32. How many matrices are solved at the same time depends on it.
    """

    min_models: ClassVar[int]
    low_rank: ClassVar[bool]
    working_copies: ClassVar[int]

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        """Recover the base's matrix from the stack.

        Args:
            stack: The matrix of every model.
            rank: The most that any `M_i` can have; None finds each model's rank from the data.

        Raises:
            NotRecoverable: The method's conditions do not hold on this stack.
        """
        ...
