"""The operator of the recovery problem near its answer, `A: Delta -> sum_i P_i Delta R_i`.

With `P_i = I - U_i U_i^T` and `R_i = I - V_i V_i^T` for the deltas' spaces. With Q a basis of all U_i and P of all V_i
it falls apart: `n Delta` outside both spans, an s x s matrix `G_U = sum_i Q^T P_i Q` on `(Q, outside)`, `G_V` on
`(outside, P)`, and a core of s x s unknowns on `(Q, P)`, solved by conjugate gradients with `X -> n G_U^-1 X G_V^-1`
as preconditioner.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from detune.numerics.linalg import inverse_of_normal, joint_basis, product

__all__ = ["NormalOperator"]

# Conjugate gradients on singular equations are stopped when the residual is a thousand times the least so far: any
# number does, as it grows by orders once rounding has the upper hand.
DIVERGED = 1e3
# A float64 system of 128^2 unknowns or more is solved in float32 first: any number does, smaller ones take no time;
LARGE_CORE = 128**2
# first to this share of its right-hand side, 25 times float32's precision (derived);
IN_SINGLE = 3e-6
# then again, as long as no more than a tenth is left each time: any number does that is well below one.
REFINED = 0.1


@dataclass(frozen=True)
class NormalOperator:
    """The operator `A: Delta -> sum_i P_i Delta R_i` on the joint spans, all but the bases in one compute dtype.

    Attributes:
        Q: Orthonormal basis of all column spaces, `(out, s_U)`, in their dtype.
        P: Orthonormal basis of all row spaces, `(in, s_V)`, in their dtype.
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
    def of(cls, U: Sequence[Tensor], V: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> "NormalOperator":
        """The operator for given spaces.

        Args:
            U: Orthonormal `(out, r_i)`, of one dtype, as exact as it is.
            V: Orthonormal `(in, r_i)`, of that dtype too.
            dtype: Dtype of the computation.
        """
        (Q, all_a), (P, all_b) = joint_basis(U), joint_basis(V)
        a = torch.split(all_a.to(dtype), [U_i.shape[1] for U_i in U], dim=1)
        b = torch.split(all_b.to(dtype), [V_i.shape[1] for V_i in V], dim=1)
        return cls(Q, P, a, b, _inverse_gram(a), _inverse_gram(b))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation."""
        return self.inverse_G_U.dtype

    @cached_property
    def single(self) -> "NormalOperator":
        """The operator in float32."""
        a, b = (tuple(c_i.float() for c_i in coordinates) for coordinates in (self.a, self.b))
        return NormalOperator(self.Q, self.P, a, b, self.inverse_G_U.float(), self.inverse_G_V.float())

    @cached_property
    def spectrum_U(self) -> Tensor:
        """Eigenvalues of `sum_i a_i a_i^T`, ascending: 0 where spaces are dependent, n for a direction in all."""
        return _spectrum(self.a)

    @cached_property
    def spectrum_V(self) -> Tensor:
        """Eigenvalues of `sum_i b_i b_i^T`."""
        return _spectrum(self.b)

    def apply(self, X: Tensor) -> Tensor:
        """`sum_i (I - a_i a_i^T) X (I - b_i b_i^T)` on the core, `(s_U, s_V)`: all models in each large product."""
        joint_a, joint_b = self.joint
        left, right = product(joint_a.mT, X), product(X, joint_b)
        left_of = torch.split(left, [a_i.shape[1] for a_i in self.a])
        right_of = torch.split(right, [b_i.shape[1] for b_i in self.b], dim=1)
        for a_i, b_i, left_i, right_i in zip(self.a, self.b, left_of, right_of, strict=True):
            right_i -= a_i @ (left_i @ b_i)
        return len(self.a) * X - product(joint_a, left) - product(right, joint_b.mT)

    @cached_property
    def joint(self) -> tuple[Tensor, Tensor]:
        """All `a_i` side by side, and all `b_i`."""
        return torch.cat(self.a, dim=1), torch.cat(self.b, dim=1)

    def project(self, model: int, X: Tensor) -> Tensor:
        """`P_i X R_i` on the core, `(..., s_U, s_V)`."""
        a_i, b_i = self.a[model], self.b[model]
        X = X - a_i @ (a_i.mT @ X)
        return X - (X @ b_i) @ b_i.mT

    def solve(self, rhs: Tensor, precision: float = 0.0, max_steps: int = 500) -> Tensor:
        """`A^-1 rhs` on the core by preconditioned conjugate gradients.

        A large float64 system is solved in float32 first, and what that leaves of the right-hand side again, as long as
        each time but a small part is left (iterative refinement): several times faster than in float64 alone.

        Args:
            rhs: `(s_U, s_V)`.
            precision: Frobenius norm of the residual to stop at; the dtype's own precision if that is larger.
            max_steps: Most steps.

        Returns:
            The iterate with the smallest residual: a part of the right-hand side in A's null space is left over.
        """
        X, left, norm = torch.zeros_like(rhs), rhs, float(rhs.norm())
        precision = max(precision, 0.1 * torch.finfo(rhs.dtype).eps * norm)
        while rhs.dtype == torch.float64 and rhs.numel() >= LARGE_CORE and norm > precision:
            step = self.single._descend((left / norm).float(), max(precision / norm / 2, IN_SINGLE), max_steps)
            refined = X + norm * step.double()
            still_left = rhs - self.apply(refined)
            before, norm_now = norm, float(still_left.norm())
            if not norm_now <= REFINED * before:
                break
            X, left, norm = refined, still_left, norm_now
        return X if norm <= precision else X + self._descend(left, precision, max_steps)

    def _descend(self, rhs: Tensor, target: float, max_steps: int) -> Tensor:
        """Conjugate gradients in the dtype of the right-hand side."""
        X = torch.zeros_like(rhs)
        residual = rhs.clone()
        z = self._precondition(residual)
        direction = z
        rho = (residual * z).sum()
        best, least = X.clone(), float(rhs.norm())
        for _ in range(max_steps):
            norm = float(residual.norm())
            if norm < least:
                best, least = X.clone(), norm
            # With a null space, rounding makes the iteration diverge in the end.
            if norm <= target or not norm <= DIVERGED * least:
                break
            image = self.apply(direction)
            alpha = rho / (direction * image).sum()
            X += alpha * direction
            residual -= alpha * image
            z = self._precondition(residual)
            previous, rho = rho, (residual * z).sum()
            direction = z + (rho / previous) * direction
        return X if float(residual.norm()) < least else best

    def _precondition(self, residual: Tensor) -> Tensor:
        return len(self.a) * product(product(self.inverse_G_U, residual), self.inverse_G_V)


def _spectrum(coordinates: Sequence[Tensor]) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh(_projectors(coordinates))
    return values.to(coordinates[0].dtype)


def _inverse_gram(coordinates: Sequence[Tensor]) -> Tensor:
    """`(sum_i (I - c_i c_i^T))^+`."""
    total = _projectors(coordinates)
    eye = torch.eye(len(total), dtype=total.dtype, device=total.device)
    return inverse_of_normal(len(coordinates) * eye - total).to(coordinates[0].dtype)


def _projectors(coordinates: Sequence[Tensor]) -> Tensor:
    """`sum_i c_i c_i^T`, float64."""
    joint = torch.cat(list(coordinates), dim=1).double()
    return joint @ joint.mT
