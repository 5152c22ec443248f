"""Passes over the full matrices that the solvers share: projections, and the last step to the answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detune.solvers.base import LowRank
from detune.solvers.stack import Stack


@dataclass(frozen=True)
class Projections:
    """What a Gauss-Newton step needs of the data.

    Attributes:
        onto_left: `U_i^T (W_i - mean)` for each model, `(r_i, in)`, float64.
        onto_right: `(W_i - mean) V_i` for each model, `(out, r_i)`, float64.
    """

    onto_left: tuple[Tensor, ...]
    onto_right: tuple[Tensor, ...]


def project(stack: Stack, left: Sequence[Tensor], right: Sequence[Tensor]) -> Projections:
    """Project the centred models onto given column and row spaces in one pass.

    Args:
        stack: The models.
        left: `U_i`, `(out, r_i)`; empty for no left projections.
        right: `V_i`, `(in, r_i)`; empty for no right projections.
    """
    out, columns = stack.shape
    U = [U_i.to(stack.dtype) for U_i in left]
    V = [V_i.to(stack.dtype) for V_i in right]
    onto_left = [stack.zeros(U_i.shape[1], columns) for U_i in U]
    onto_right = [stack.zeros(out, V_i.shape[1]) for V_i in V]
    for block in stack.blocks():
        centred = block.centred()
        for i, U_i in enumerate(U):
            onto_left[i].addmm_(U_i[block.rows].mT, centred[i])
        for i, V_i in enumerate(V):
            torch.mm(centred[i], V_i, out=onto_right[i][block.rows])
    return Projections(tuple(E.double() for E in onto_left), tuple(F.double() for F in onto_right))


def solve_given_spaces(projected: Tensor, bases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Least squares for all models at once when one side's spaces are known.

    With `M_i = F_i V_i^T` the normal equations of `sum_i |W_i - W - M_i|^2`, W eliminated, are
    `F (I - blocks(V_i^T V_j) / n) = [(W_i - mean) V_i]_i`: one small matrix for every row of F.

    Args:
        projected: `[(W_i - mean) V_i]_i` side by side, `(rows, s)`, float64.
        bases: Orthonormal `V_i`, `(columns, r_i)`, float64, `s = sum r_i`.

    Returns:
        `F_i`, `(rows, r_i)`, for each model.
    """
    n = len(bases)
    joint = torch.cat(list(bases), dim=1)
    normal = torch.eye(joint.shape[1], dtype=joint.dtype, device=joint.device) - joint.mT @ joint / n
    # The pseudo-inverse, not a Cholesky factor: where spaces coincide the least-norm answer is the one to give.
    solved = projected @ torch.linalg.pinv(normal, hermitian=True, rtol=1e-12)
    return torch.split(solved, [V_i.shape[1] for V_i in bases], dim=1)


@dataclass(frozen=True)
class WStep:
    """The base's matrix for given deltas, with the misfit measured on the data.

    Attributes:
        weight: `mean_i (W_i - M_i)`, `(out, in)`, compute dtype.
        residual: `sum_i |W_i - weight - M_i|_F^2`.
        spread: `sum_i |W_i - mean|_F^2`.
        noise_ratio: Root of residual over what storage rounding alone leaves after the fit.
    """

    weight: Tensor
    residual: float
    spread: float
    noise_ratio: float

    @property
    def relative_residual(self) -> float:
        """The share of the spread that is left, as a ratio of norms."""
        return float((self.residual / self.spread) ** 0.5) if self.spread > 0 else 0.0


def w_step(stack: Stack, deltas: Sequence[LowRank]) -> WStep:
    """`W = mean_i (W_i - M_i)` on the full matrices: the storage noise of all n models averages out.

    Reference: Horwitz et al. 2024 (arXiv 2402.10208), Section 4, the W-step.

    Args:
        stack: The models.
        deltas: One for each model; empty takes every `M_i` as zero.

    Raises:
        InputError: The stack holds NaN or Inf.
    """
    out, columns = stack.shape
    weight = torch.empty(out, columns, dtype=stack.dtype, device=stack.device)
    residual = torch.zeros((), dtype=torch.float64, device=stack.device)
    spread = torch.zeros_like(residual)
    left = [M_i.left.to(stack.device, stack.dtype) for M_i in deltas]
    right = [M_i.right.to(stack.device, stack.dtype).mT for M_i in deltas]
    for block in stack.blocks():
        rest = block.deviations
        spread += _spread(rest)
        for i in range(len(deltas)):
            rest[i].addmm_(left[i][block.rows], right[i], alpha=-1)
        torch.add(block.reference, rest.mean(dim=0), out=weight[block.rows])
        residual += _spread(rest)
    stack.require_finite(residual)
    return WStep(weight, float(residual), float(spread), _noise_ratio(stack, deltas, float(residual)))


def _spread(values: Tensor) -> Tensor:
    """`sum_i |x_i - mean|^2` over the models."""
    return (values - values.mean(dim=0)).square_().sum(dtype=torch.float64)


def _noise_ratio(stack: Stack, deltas: Sequence[LowRank], residual: float) -> float:
    """Residual over its expectation: (n-1) dk noisy numbers, less the parameters that the fit took."""
    out, columns = stack.shape
    taken = sum(M_i.rank * (out + columns - M_i.rank) for M_i in deltas)
    free = max(1.0, (stack.n - 1) * out * columns - taken)
    expected = float(stack.noise.square().mean()) * free
    return float((residual / expected) ** 0.5) if expected > 0 else 0.0
