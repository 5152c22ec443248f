"""Gauss-Newton steps from a good start to the maximum-likelihood answer.

Near rank-limited `M_i = U_i C_i V_i^T` the problem is linear: `M_i` may move in the tangent space
`{U_i X^T + Y V_i^T}`, and what is left of W is fixed by

    sum_i P_i (W - W_i) R_i = 0,     P_i = I - U_i U_i^T,  R_i = I - V_i V_i^T.

in parts, as `detune.fitting.normal_operator` takes the operator apart. A step takes two passes over the matrices;
convergence is quadratic, where alternating minimisation crawls.

Reference for the step: Golub & Pereyra 1973, variable projection; for the tangent space, Vandereycken 2013
(arXiv 1209.3834), Section 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from detune.fitting.least_squares import project_left, project_right, solve_given_rows
from detune.fitting.normal_operator import NormalOperator
from detune.numerics.linalg import orthonormal, product
from detune.problem.low_rank import LowRank
from detune.problem.stack import Stack


class GaussNewtonFit(NamedTuple):
    """The deltas after Gauss-Newton.

    Attributes:
        deltas: The `M_i`.
        steps: Gauss-Newton steps taken.
        converged: Whether the last one was within the tolerance.
    """

    deltas: tuple[LowRank, ...]
    steps: int
    converged: bool


@dataclass(frozen=True)
class GaussNewton:
    """Gauss-Newton on the manifold of rank-limited deltas, with full steps.

    Attributes:
        max_steps: Most Gauss-Newton steps; each is two passes over the matrices.
        tolerance: Stop when what the linearisation neglects is below this share of the storage noise.
        cg_tolerance: Conjugate gradients stop when their residual is below this share of the storage noise in it.
        cg_steps: Most conjugate gradient steps.
    """

    max_steps: int = 8
    tolerance: float = 0.1
    cg_tolerance: float = 0.01
    cg_steps: int = 500

    def run(self, stack: Stack, V: Sequence[Tensor]) -> GaussNewtonFit:
        """The deltas at the maximum.

        Gauss-Newton converges quadratically or not at all: where some direction is as good as undetermined it wanders,
        and is stopped once a step leaves no less behind than half of the step before.

        Args:
            stack: The models.
            V: Orthonormal row spaces near the answer, `(in, r_i)`, float64.
        """
        # The noise that a delta's tangent space takes in has about this norm.
        widest = max(V_i.shape[1] for V_i in V)
        noise = float(stack.noise.square().mean().sqrt())
        floor = noise * (widest * sum(stack.shape)) ** 0.5
        V = tuple(V_i.to(stack.factor_dtype) for V_i in V)
        onto_right = project_right(stack, V)
        left = solve_given_rows(onto_right, V)
        before = float("inf")
        for steps in range(1, self.max_steps + 1):
            U = [orthonormal(left_i) for left_i in left]
            moved = gauss_newton_step(project_left(stack, U), onto_right, U, V, noise, self)
            deltas = tuple(tangent.retract() for tangent in moved)
            left_behind = max(tangent.second_order for tangent in moved)
            converged = left_behind <= self.tolerance * floor
            if converged or left_behind > before / 2 or steps == self.max_steps:
                break
            before = left_behind
            V = tuple(M_i.right for M_i in deltas)
            left = tuple(M_i.left for M_i in deltas)
            onto_right = project_right(stack, V)
        return GaussNewtonFit(deltas, steps, converged)


@dataclass(frozen=True)
class Tangent:
    """A matrix in the tangent space of the rank-r matrices at `U S V^T`: `U X + (I - U U^T) Y V^T`.

    It is `[U QY] small [V QX]^T` with orthonormal factors.

    Attributes:
        left: `[U QY]`, `(out, 2r)`.
        small: `(2r, 2r)`.
        right: `[V QX]`, `(in, 2r)`.
    """

    left: Tensor
    small: Tensor
    right: Tensor

    @classmethod
    def of(cls, X: Tensor, Y: Tensor, U: Tensor, V: Tensor) -> "Tangent":
        """Take `U X^T + Y V^T` apart: X is `(r, in)`, Y `(out, r)`, U and V are orthonormal."""
        S = product(X, V)
        X, Y = X - product(S, V.mT), Y - product(U, product(U.mT, Y))
        QX, QY = orthonormal(X.mT), orthonormal(Y)
        upper, lower = (S, product(X, QX)), (product(QY.mT, Y), torch.zeros_like(S))
        small = torch.cat([torch.cat(row, dim=1) for row in (upper, lower)])
        return cls(torch.cat([U, QY], dim=1), small, torch.cat([V, QX], dim=1))

    @property
    def rank(self) -> int:
        """The rank r of the point."""
        return self.small.shape[0] // 2

    def retract(self) -> LowRank:
        """Best rank-r approximation (Vandereycken 2013, eq. 3.1)."""
        A, sigma, Bh = torch.linalg.svd(self.small)
        r = self.rank
        return LowRank(product(self.left, A[:, :r] * sigma[:r]), product(self.right, Bh[:r].mT))

    @property
    def second_order(self) -> float:
        """How far the rank-r matrices curve away from their tangent space here: `|RY S^-1 RX|_F`."""
        r = self.rank
        S, RX, RY = self.small[:r, :r], self.small[:r, r:], self.small[r:, :r]
        return float((RY @ torch.linalg.pinv(S) @ RX).norm())


def gauss_newton_step(
    E: Sequence[Tensor],
    F: Sequence[Tensor],
    U: Sequence[Tensor],
    V: Sequence[Tensor],
    noise: float = 0.0,
    options: GaussNewton | None = None,
) -> tuple[Tangent, ...]:
    """Solve the problem linearised at `U_i`, `V_i` exactly.

    Args:
        E: `U_i^T (W_i - mean)`, `(r_i, in)`, any one compute dtype, and so the others.
        F: `(W_i - mean) V_i`, `(out, r_i)`.
        U: Orthonormal `(out, r_i)`.
        V: Orthonormal `(in, r_i)`.
        noise: Root mean square of the storage noise: the equations need not be solved better than it allows.
        options: Tolerances of the conjugate gradients.

    Returns:
        The new `M_i`, each in its tangent space.
    """
    options = options or GaussNewton()
    operator = NormalOperator.of(U, V, U[0].dtype)
    Q, P, a, b = operator.Q, operator.P, operator.a, operator.b

    ranks = [U_i.shape[1] for U_i in U]
    E_all, F_all = torch.cat(list(E)), torch.cat(list(F), dim=1)
    a_all, b_all = operator.joint

    # Right-hand side -sum_i [U_i E_i + F_i V_i^T - U_i (U_i^T F_i) V_i^T], block by block. All models go into one
    # product: with a thin one for each, and P or Q in all of them, the cost would be cubic in their number.
    aE, Fb = product(a_all, E_all), product(F_all, b_all.mT)  # (s_U, in), (out, s_V)
    aEP, QFb = product(aE, P), product(Q.mT, Fb)
    left = product(aEP, P.mT) - aE  # outside P
    right = product(Q, QFb) - Fb  # outside Q
    middle = -aEP - QFb
    for F_i, U_i, a_i, b_i in zip(F, U, a, b, strict=True):
        middle += a_i @ product(U_i.mT, F_i) @ b_i.mT

    # Delta = W - mean = Q left + right P^T + Q middle P^T.
    left = product(operator.inverse_G_U, left)
    right = product(right, operator.inverse_G_V)
    precision = options.cg_tolerance * noise * (len(U) * middle.numel()) ** 0.5
    middle = operator.solve(middle, precision, options.cg_steps)
    # U_i^T (W_i - W), where `right` has no part in Q, and (W_i - W) V_i, where `left` has none in P.
    X = torch.split(E_all - product(a_all.mT, left + product(middle, P.mT)), ranks)
    Y = torch.split(F_all - product(product(Q, middle) + right, b_all), ranks, dim=1)
    return tuple(map(Tangent.of, X, Y, U, V))
