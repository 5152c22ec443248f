"""From a good start to the maximum-likelihood answer, by Gauss-Newton steps.

Near rank-limited `M_i = U_i C_i V_i^T` the problem is linear: `M_i` may move in the tangent space
`{U_i X^T + Y V_i^T}`, and what is left of W is fixed by

    sum_i P_i (W - W_i) R_i = 0,     P_i = I - U_i U_i^T,  R_i = I - V_i V_i^T.

With `Delta = W - mean_i W_i`, Q a basis of all U_i and P of all V_i, the operator `A: Delta -> sum_i P_i Delta R_i`
falls apart: `n Delta` outside both spans, an s x s matrix `G_U = sum_i Q^T P_i Q` on `(Q, outside)`, `G_V` on
`(outside, P)`, and a core of s x s unknowns on `(Q, P)`, solved by conjugate gradients with `X -> n G_U^-1 X G_V^-1`
as preconditioner. A step takes one pass over the matrices; convergence is quadratic, where alternating
minimisation crawls.

Reference for the step: Golub & Pereyra 1973, variable projection; for the tangent space, Vandereycken 2013
(arXiv 1209.3834), Section 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detune.solvers.base import LowRank
from detune.solvers.differences import orthonormal, thin_svd
from detune.solvers.fit import Projections, project
from detune.solvers.stack import Stack


@dataclass(frozen=True)
class Polish:
    """How long to polish.

    Attributes:
        max_steps: Most Gauss-Newton steps; each is one pass over the matrices.
        tolerance: Stop when the error that the next step would remove is below this share of the storage noise.
        cg_tolerance: Relative residual at which conjugate gradients stop.
        cg_steps: Most conjugate gradient steps.
    """

    max_steps: int = 8
    tolerance: float = 0.1
    cg_tolerance: float = 1e-10
    cg_steps: int = 500

    def run(self, stack: Stack, start: Sequence[LowRank]) -> tuple[tuple[LowRank, ...], int]:
        """Polished deltas and the number of steps taken.

        Args:
            stack: The models.
            start: A delta for each model, near the answer.
        """
        deltas = tuple(start)
        noise = float(stack.noise.square().mean().sqrt())
        steps = 0
        while steps < self.max_steps:
            steps += 1
            U = [orthonormal(M_i.left.double()) for M_i in deltas]
            V = [orthonormal(M_i.right.double()) for M_i in deltas]
            moved = gauss_newton_step(project(stack, U, V), U, V, self)
            remainder = max(
                (_second_order(old, new) for old, new in zip(deltas, moved, strict=True) if old.rank),
                default=0.0,
            )
            deltas = moved
            # The noise that a delta's tangent space takes in has about this norm.
            floor = noise * max((M_i.rank * sum(stack.shape)) ** 0.5 for M_i in deltas)
            if remainder <= self.tolerance * floor:
                break
        return deltas, steps


def _second_order(old: LowRank, new: LowRank) -> float:
    """What a step of this size leaves behind: `|step|^2 / sigma_min`, by the curvature of the rank-r manifold."""
    L = torch.cat([new.left, -old.left.double()], dim=1)
    R = torch.cat([new.right, old.right.double()], dim=1)
    step = (torch.linalg.qr(L)[1] @ torch.linalg.qr(R)[1].mT).square().sum()
    smallest = torch.linalg.svdvals(torch.linalg.qr(new.left)[1] @ torch.linalg.qr(new.right)[1].mT)[-1]
    return float(step / smallest)


def gauss_newton_step(
    projections: Projections, U: Sequence[Tensor], V: Sequence[Tensor], options: Polish | None = None
) -> tuple[LowRank, ...]:
    """Solve the linearised problem exactly and go back to rank r.

    Args:
        projections: `E_i = U_i^T (W_i - mean)` and `F_i = (W_i - mean) V_i`.
        U: Orthonormal `(out, r_i)`, float64.
        V: Orthonormal `(in, r_i)`, float64.
        options: Tolerances of the conjugate gradients.

    Returns:
        The new `M_i`.
    """
    options = options or Polish()
    E, F = projections.onto_left, projections.onto_right
    core = Core.of(U, V)
    Q, P, a, b = core.Q, core.P, core.a, core.b
    n = len(U)
    H = [U_i.mT @ F_i for F_i, U_i in zip(F, U, strict=True)]

    # Right-hand side -sum_i [U_i E_i + F_i V_i^T - U_i H_i V_i^T], block by block.
    EP = [E_i @ P for E_i in E]
    QF = [Q.mT @ F_i for F_i in F]
    left = Q.new_zeros(Q.shape[1], P.shape[0])  # (s_U, in), rows outside P
    right = Q.new_zeros(Q.shape[0], P.shape[1])  # (out, s_V), columns outside Q
    middle = Q.new_zeros(Q.shape[1], P.shape[1])
    for i in range(n):
        left -= a[i] @ (E[i] - EP[i] @ P.mT)
        right -= (F[i] - Q @ QF[i]) @ b[i].mT
        middle -= a[i] @ EP[i] + (QF[i] - a[i] @ H[i]) @ b[i].mT

    # Delta = Q left + right P^T + Q middle P^T.
    left = core.inverse_G_U @ left
    right = right @ core.inverse_G_V
    middle = core.solve(middle, options.cg_tolerance, options.cg_steps)

    deltas = []
    for i in range(n):
        X = E[i] - a[i].mT @ (left + middle @ P.mT)  # U_i^T (Y_i - Delta); right has no part in Q
        Y = F[i] - (Q @ (middle @ b[i]) + right @ b[i])  # (Y_i - Delta) V_i; left has no part in P
        deltas.append(_retract(X, Y, U[i], V[i]))
    return tuple(deltas)


def _retract(X: Tensor, Y: Tensor, U: Tensor, V: Tensor) -> LowRank:
    """Best rank-r approximation of the tangent vector `U X + (I - U U^T) Y V^T` (Vandereycken 2013, eq. 3.1)."""
    r = U.shape[1]
    if r == 0:
        return LowRank(U, V)
    S = X @ V
    QX, RX = torch.linalg.qr((X - S @ V.mT).mT)
    QY, RY = torch.linalg.qr(Y - U @ (U.mT @ Y))
    small = torch.cat([torch.cat([S, RX.mT], dim=1), torch.cat([RY, torch.zeros_like(RX)], dim=1)])
    A, sigma, Bh = torch.linalg.svd(small)
    left = torch.cat([U, QY], dim=1) @ (A[:, :r] * sigma[:r])
    return LowRank(left, torch.cat([V, QX], dim=1) @ Bh[:r].mT)


@dataclass(frozen=True)
class Core:
    """The operator `A: Delta -> sum_i P_i Delta R_i` on the joint spans, all float64.

    Attributes:
        Q: Orthonormal basis of all column spaces, `(out, s_U)`.
        P: Orthonormal basis of all row spaces, `(in, s_V)`.
        a: `Q^T U_i`.
        b: `P^T V_i`.
        inverse_G_U: Pseudo-inverse of `sum_i (I - a_i a_i^T)`.
        inverse_G_V: Pseudo-inverse of `sum_i (I - b_i b_i^T)`.
    """

    Q: Tensor
    P: Tensor
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    inverse_G_U: Tensor
    inverse_G_V: Tensor

    @classmethod
    def of(cls, U: Sequence[Tensor], V: Sequence[Tensor]) -> "Core":
        """The operator for given spaces: `U_i` `(out, r_i)` and `V_i` `(in, r_i)`, orthonormal, float64."""
        Q, P = _joint_basis(U), _joint_basis(V)
        a = tuple(Q.mT @ U_i for U_i in U)
        b = tuple(P.mT @ V_i for V_i in V)
        return cls(Q, P, a, b, _inverse_gram(a), _inverse_gram(b))

    def apply(self, X: Tensor) -> Tensor:
        """`sum_i (I - a_i a_i^T) X (I - b_i b_i^T)` on the core, `(s_U, s_V)`."""
        total = len(self.a) * X
        for a_i, b_i in zip(self.a, self.b, strict=True):
            aX = a_i.mT @ X
            total -= a_i @ aX
            total -= ((X - a_i @ aX) @ b_i) @ b_i.mT
        return total

    def solve(self, rhs: Tensor, tolerance: float = 1e-10, max_steps: int = 500) -> Tensor:
        """`A^-1 rhs` on the core by preconditioned conjugate gradients."""
        n = len(self.a)
        X = torch.zeros_like(rhs)
        residual = rhs.clone()
        z = n * self.inverse_G_U @ residual @ self.inverse_G_V
        direction = z
        rho = (residual * z).sum()
        target = tolerance * float(rhs.norm())
        for _ in range(max_steps):
            if float(residual.norm()) <= target:
                break
            image = self.apply(direction)
            alpha = rho / (direction * image).sum()
            X += alpha * direction
            residual -= alpha * image
            z = n * self.inverse_G_U @ residual @ self.inverse_G_V
            previous, rho = rho, (residual * z).sum()
            direction = z + (rho / previous) * direction
        return X


def _joint_basis(bases: Sequence[Tensor]) -> Tensor:
    """Orthonormal basis of the sum of spaces; directions that coincide to rounding are counted once."""
    U, S, _ = thin_svd(torch.cat(list(bases), dim=1))
    return U[:, S.gt(1e-12)]


def _inverse_gram(coordinates: Sequence[Tensor]) -> Tensor:
    """`(sum_i (I - c_i c_i^T))^+`."""
    joint = torch.cat(list(coordinates), dim=1)
    gram = len(coordinates) * torch.eye(joint.shape[0], dtype=joint.dtype, device=joint.device) - joint @ joint.mT
    inverse: Tensor = torch.linalg.pinv(gram, hermitian=True, rtol=1e-12)
    return inverse
