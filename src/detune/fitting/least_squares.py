"""Passes over the full matrices that the solvers share: projections, and the last step to the answer.

All of them go over the matrices as they lie in memory: a transposed stack is passed over as the stack that it was made
of, and the result is transposed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detune.numerics.linalg import gram, inverse_of_normal, product, weighted_sum
from detune.problem.low_rank import LowRank
from detune.problem.recovery import Residuals
from detune.problem.stack import Block, Stack
from detune.problem.storage_noise import COMPUTED


def project_right(stack: Stack, V: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`F_i = (W_i - mean) V_i` for each model, `(out, r_i)`, `stack.factor_dtype`.

    Args:
        stack: The models.
        V: `(in, r_i)` for each.
    """
    if stack.by_columns:
        return tuple(F_i.mT for F_i in project_left(stack.transposed, V))
    V = [V_i.to(stack.dtype) for V_i in V]
    F = [stack.zeros(stack.shape[0], V_i.shape[1]) for V_i in V]
    for block in stack.blocks():
        for centred_i, V_i, F_i in zip(block.centred, V, F, strict=True):
            F_i[block.rows] = product(centred_i, V_i)
    return tuple(F_i.to(stack.factor_dtype) for F_i in F)


def project_left(stack: Stack, U: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`E_i = U_i^T (W_i - mean)` for each model, `(r_i, in)`, `stack.factor_dtype`.

    Args:
        stack: The models.
        U: `(out, r_i)` for each.
    """
    if stack.by_columns:
        return tuple(E_i.mT for E_i in project_right(stack.transposed, U))
    U = [U_i.to(stack.dtype) for U_i in U]
    E = [stack.zeros(U_i.shape[1], stack.shape[1]) for U_i in U]
    for block in stack.blocks():
        for centred_i, U_i, E_i in zip(block.centred, U, E, strict=True):
            E_i += product(U_i[block.rows].mT, centred_i)
    return tuple(E_i.to(stack.factor_dtype) for E_i in E)


def normal_inverse(V: Sequence[Tensor]) -> Tensor:
    """The inverse of the normal equations for given row spaces, `(s, s)`, float64.

    With `M_i = F_i V_i^T` the normal equations of `sum_i |W_i - W - M_i|^2`, W eliminated, are
    `[F_i] (I - blocks(V_i^T V_j) / n) = [(W_i - mean) V_i]`: one small matrix for every row.

    Args:
        V: Orthonormal `(in, r_i)`, `s = sum r_i`; what their dtype rounds is in the answer.
    """
    overlaps = gram(torch.cat(list(V), dim=1))
    eye = torch.eye(len(overlaps), dtype=overlaps.dtype, device=overlaps.device)
    return inverse_of_normal(eye - overlaps / len(V))


def solve_given_rows(projected: Sequence[Tensor], V: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Least squares for all models at once when the row spaces are known: `F_i` of `M_i = F_i V_i^T`.

    Args:
        projected: `(W_i - mean) V_i`, `(out, r_i)`; their dtype is that of the answer.
        V: Orthonormal `(in, r_i)`, float64.
    """
    side_by_side = torch.cat(list(projected), dim=1)
    solved = side_by_side @ normal_inverse(V).to(side_by_side.dtype)
    return torch.split(solved, [V_i.shape[1] for V_i in V], dim=1)


@dataclass(frozen=True)
class WStep:
    """The base's matrix for given deltas, with the misfit measured on the data.

    Attributes:
        weight: `mean_i (W_i - M_i)`, `(out, in)`, compute dtype.
        deltas: The `M_i` it was made with.
        relative_residual: `sqrt(sum_i |W_i - weight - M_i|^2 / sum_i |W_i - mean|^2)`.
        noise_ratio: Root of the residual over what storage rounding alone leaves after the fit.
        energy: The residual, `sum_i |W_i - weight - M_i|^2`.
        residuals: What is left, where the deltas are the best for the spaces given.
    """

    weight: Tensor
    deltas: tuple[LowRank, ...]
    relative_residual: float
    noise_ratio: float
    energy: float
    residuals: Residuals | None = None

    @property
    def transposed(self) -> "WStep":
        """The step of the transposed stack."""
        weight, deltas, residuals = self.weight.mT, tuple(M_i.transposed for M_i in self.deltas), self.residuals
        if residuals is not None:
            residuals = replace(residuals, weight=weight, deltas=deltas, transposed=not residuals.transposed)
        return replace(self, weight=weight, deltas=deltas, residuals=residuals)


def w_step(stack: Stack, deltas: Sequence[LowRank]) -> WStep:
    """`W = mean_i (W_i - M_i)` on the full matrices: the storage noise of all n models averages out.

    Reference: Horwitz et al. 2024 (arXiv 2402.10208), Section 4, the W-step.

    Args:
        stack: The models.
        deltas: One for each model; empty takes every `M_i` as zero.

    Raises:
        InputError: The stack holds NaN or Inf.
    """
    if stack.by_columns:
        return w_step(stack.transposed, [M_i.transposed for M_i in deltas]).transposed
    accumulator = _Accumulator(stack, [M_i.right for M_i in deltas])
    left = [M_i.left.to(stack.device, stack.dtype) for M_i in deltas]
    for block in stack.blocks():
        accumulator.add(block, [left_i[block.rows] for left_i in left])
    return accumulator.finish(tuple(deltas))


def w_step_given_rows(stack: Stack, V: Sequence[Tensor]) -> WStep:
    """`solve_given_rows` and `w_step` in one pass, as the rows of `F_i` need no others; in two on a transposed stack.

    Args:
        stack: The models.
        V: Orthonormal `(in, r_i)`, float64.

    Raises:
        InputError: The stack holds NaN or Inf.
    """
    V = [V_i.to(stack.device, stack.factor_dtype).contiguous() for V_i in V]
    if stack.by_columns:
        return _w_step_given_columns(stack.transposed, V).transposed
    right = [V_i.to(stack.dtype) for V_i in V]
    accumulator = _Accumulator(stack, right)
    ranks = [V_i.shape[1] for V_i in V]
    inverse = normal_inverse(V).to(stack.dtype)
    F = stack.zeros(stack.shape[0], sum(ranks))
    products = tuple(stack.zeros(r, stack.shape[1]) for r in ranks)
    for block in stack.blocks():
        centred = zip(block.centred, right, strict=True)
        projected = torch.cat([product(centred_i, V_i) for centred_i, V_i in centred], dim=1)
        F[block.rows] = product(projected, inverse)
        left = torch.split(F[block.rows], ranks, dim=1)
        for left_over, left_i, rest_i in zip(products, left, accumulator.add(block, left), strict=True):
            left_over += product(left_i.mT, rest_i)
    step = accumulator.finish(tuple(map(LowRank, torch.split(F.to(stack.factor_dtype), ranks, dim=1), V)))
    return replace(step, residuals=Residuals(step.weight, step.deltas, accumulator.residual, products))


def _w_step_given_columns(stack: Stack, U: Sequence[Tensor]) -> WStep:
    """`w_step_given_rows` with known column spaces, `(out, r_i)`: a pass for the factors and one for the step."""
    onto_left = project_left(stack, U)
    right = solve_given_rows([E_i.mT for E_i in onto_left], U)
    accumulator = _Accumulator(stack, right)
    left, right_here = ([X_i.to(stack.dtype) for X_i in X] for X in (U, right))
    products = tuple(stack.zeros(stack.shape[0], U_i.shape[1]) for U_i in U)
    for block in stack.blocks():
        rest = accumulator.add(block, [left_i[block.rows] for left_i in left])
        for left_over, right_i, rest_i in zip(products, right_here, rest, strict=True):
            left_over[block.rows] = product(rest_i, right_i)
    step = accumulator.finish(tuple(map(LowRank, U, right)))
    turned = tuple(left_over.mT for left_over in products)
    return replace(step, residuals=Residuals(step.weight, step.deltas, accumulator.residual, turned, transposed=True))


class _Accumulator:
    """Sums of the W-step, block by block."""

    def __init__(self, stack: Stack, right: Sequence[Tensor]) -> None:
        self._stack = stack
        self._right = [right_i.to(stack.device, stack.dtype).mT for right_i in right]
        self._weight = torch.empty_like(stack.matrices[0], dtype=stack.dtype, device=stack.device)
        self._residual = torch.zeros((), dtype=torch.float64, device=stack.device)
        self._spread = torch.zeros_like(self._residual)

    @property
    def residual(self) -> float:
        """`sum_i |W_i - weight - M_i|^2` so far."""
        return float(self._residual)

    def add(self, block: Block, left: Sequence[Tensor]) -> Tensor:
        """Take in the block, whose centred models are used up, and return what is left of them, `(n, rows, in)`."""
        rest = block.centred
        weight = self._weight[block.rows]
        spread = _squares(rest)
        self._spread += spread
        if not left:
            # The average: the rest is what there was.
            torch.add(block.reference, block.offset, out=weight)
            self._residual += spread
            return rest
        for rest_i, left_i, right_i in zip(rest, left, self._right, strict=True):
            rest_i -= product(left_i, right_i)
        moved = weighted_sum(rest, 1 / len(rest))
        self._residual += _squares(rest.sub_(moved))
        torch.add(block.reference, moved.add_(block.offset), out=weight)
        return rest

    def finish(self, deltas: tuple[LowRank, ...]) -> WStep:
        """The step, once every block is in."""
        stack = self._stack
        stack.require_finite(self._residual)
        residual, spread = self.residual, float(self._spread)
        # Float64 models are as finely rounded as the computation: its own rounding, some eps of the deltas, is in the
        # residual too.
        out, columns = stack.shape
        computed = COMPUTED * (spread / (stack.n * out * columns)) ** 0.5
        variance = float(stack.noise.square().mean()) + computed**2
        expected = variance * _degrees_of_freedom(stack, deltas)
        return WStep(
            self._weight,
            deltas,
            (residual / spread) ** 0.5 if spread > 0 else 0.0,
            (residual / expected) ** 0.5 if expected > 0 else 0.0,
            residual,
        )


def _squares(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm.double().square()


def _degrees_of_freedom(stack: Stack, deltas: Sequence[LowRank]) -> float:
    """(n-1) dk noisy numbers, less the parameters that the fit took."""
    out, columns = stack.shape
    taken = sum(M_i.rank * (out + columns - M_i.rank) for M_i in deltas)
    return max(1.0, (stack.n - 1) * out * columns - taken)
