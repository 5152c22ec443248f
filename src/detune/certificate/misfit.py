"""The misfit of an answer: what it leaves of the data, and how far it is from the best answer near it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detune.fitting.normal_operator import NormalOperator
from detune.numerics.device import upload
from detune.numerics.linalg import product
from detune.problem.low_rank import SVDFactors
from detune.problem.recovery import Recovery, Residuals
from detune.problem.stack import Stack
from detune.problem.storage_noise import storage_energy

# An average leaves residuals that sum to zero but for its rounding: a sum of less than a millionth of their energy has
# no part in the step (derived).
NEGLIGIBLE = 1e-6
# Conjugate gradients for the step stop at this share of the right-hand side: a hundred-thousandth of a distance that is
# compared with a quarter (derived).
PRECISION = 1e-5
# Products in float32, with its precision of 1e-7, hold to a ten-thousandth for singular values that span three orders;
# a delta whose values span more is looked at in directions of its own (derived).
LEAST_SCALE = 1e-3


@dataclass(frozen=True)
class Misfit:
    """Measured in one pass over the models, or by the solver in its last.

    Attributes:
        energy: `sum_i |W_i - W_star - M_i|^2`, less what the step to the nearest maximum-likelihood answer takes off.
        distance: `|Delta|^2`, Delta the step of W to that answer, less what rounding W to its dtype has in it.
    """

    energy: float
    distance: float

    @classmethod
    def of(cls, stack: Stack, recovery: Recovery, operator: NormalOperator, spaces: Sequence[SVDFactors]) -> "Misfit":
        """Measure it.

        The step is `Delta = A^-1 sum_i P_i e_i R_i` for residuals `e_i = W_i - W_star - M_i`: Gauss-Newton's, which is
        zero at a stationary point, wherever the answer came from.

        Args:
            stack: The models.
            recovery: The answer, with a delta for each model.
            operator: The operator A at its spaces, computing in float64.
            spaces: Spaces of the deltas.
        """
        known = recovery.residuals
        if known is not None and known.are_of(recovery) and all(_well_scaled(space) for space in spaces):
            sums = _Sums.of_fit(known, recovery, operator, spaces)
        else:
            sums = _Sums.measured(stack, recovery, operator, spaces)
        left, right, n = sums.left, sums.right, stack.n
        middle = left.inner + right.inner.mT - sums.common
        step = operator.solve(middle, PRECISION * float(middle.norm()))
        gained = left.weighed(operator.inverse_G_U) + right.weighed(operator.inverse_G_V) + float((middle * step).sum())
        distance = sum(
            side.weighed(inverse @ inverse)
            for side, inverse in ((left, operator.inverse_G_U), (right, operator.inverse_G_V))
        )
        distance += float(step.square().sum()) + sums.outside / n**2 - sums.rounding
        return cls(max(0.0, sums.energy - gained - sums.outside / n), max(0.0, distance))


def _well_scaled(space: SVDFactors) -> bool:
    """Whether what the factors give by products in the compute dtype holds for their weakest direction too."""
    return not len(space.S) or float(space.S[-1]) > LEAST_SCALE * float(space.S[0])


@dataclass(frozen=True)
class _Side:
    """Rows X in the joint columns' coordinates, `(s, in)`, by what is asked of them; or the same of columns.

    Attributes:
        gram: `X X^T` of their part outside the joint rows P, `(s, s)`.
        inner: `X P`.
    """

    gram: Tensor
    inner: Tensor

    @classmethod
    def zeros(cls, Q: Tensor, P: Tensor) -> "_Side":
        """The sides of an X that is zero, in the coordinates of Q."""
        s = Q.shape[1]
        return cls(*(Q.new_zeros(s, width, dtype=torch.float64) for width in (s, P.shape[1])))

    @classmethod
    def of(cls, X: Tensor, P: Tensor) -> "_Side":
        """The side of any X, by products in its dtype."""
        inner = product(X, P.to(X)).double()
        return cls(product(X, X.mT).double() - inner @ inner.mT, inner)

    def times(self, c: Tensor) -> "_Side":
        """The side of `c X`."""
        return _Side(c @ self.gram @ c.mT, c @ self.inner)

    def weighed(self, weights: Tensor) -> float:
        """`<X, weights X>` outside P."""
        return max(0.0, float((weights * self.gram).sum()))


@dataclass(frozen=True)
class _Sums:
    """Sums over the matrices, of the residuals e_i.

    Attributes:
        energy: `sum_i |e_i|^2`, less what the M_i can take up by moving in their tangent spaces.
        outside: `|sum_i e_i|^2` outside both joint spans.
        rounding: Expected energy of the rounding of W_star to its dtype.
        left: The side of `Q^T sum_i P_i e_i`.
        right: The side of `P^T sum_i R_i e_i^T`.
        common: `Q^T (sum_i e_i - U_i U_i^T e_i V_i V_i^T) P`, which is in both.
    """

    energy: float
    outside: float
    rounding: float
    left: _Side
    right: _Side
    common: Tensor

    @classmethod
    def of_fit(
        cls, known: Residuals, recovery: Recovery, operator: NormalOperator, spaces: Sequence[SVDFactors]
    ) -> "_Sums":
        """Take the sums from the solver's last step: its normal equations make some of them zero."""
        # U_i = M_i.left (M_i.right^T V_i) / S_i, and the same with left and right exchanged.
        if known.transposed:
            factors = [(M_i.left, space.U, space.S) for M_i, space in zip(recovery.deltas, spaces, strict=True)]
        else:
            factors = [(M_i.right, space.V, space.S) for M_i, space in zip(recovery.deltas, spaces, strict=True)]
        products = torch.cat(
            [
                product(((given.to(basis).mT @ basis) / S).mT.to(left_over), left_over)
                for (given, basis, S), left_over in zip(factors, known.products, strict=True)
            ]
        )
        sides = [_Side.zeros(operator.Q, operator.P), _Side.zeros(operator.P, operator.Q)]
        other = operator.Q if known.transposed else operator.P
        sides[known.transposed] = _Side.of(products, other).times(-operator.joint[known.transposed])
        left, right = sides
        energy = known.energy - _energy(products)
        return cls(energy, 0.0, 0.0, left, right, torch.zeros_like(left.inner))

    @classmethod
    def measured(
        cls, stack: Stack, recovery: Recovery, operator: NormalOperator, spaces: Sequence[SVDFactors]
    ) -> "_Sums":
        """Take the sums in one pass over the models."""
        seen = _Pass.over(stack, recovery, operator, spaces)
        dtype = stack.factor_dtype
        Q, P, L, R = (matrix.to(dtype) for matrix in (operator.Q, operator.P, seen.left, seen.right))
        a_all, b_all = (coordinates.to(dtype) for coordinates in operator.joint)
        E_all, F_all = torch.cat(seen.E).to(dtype), torch.cat(seen.F, dim=1).to(dtype)
        common = product(Q.mT, R).double()
        outside = seen.total_energy - _energy(L) - _energy(R) + _energy(common)
        energy = seen.energy - _energy(E_all) - _energy(F_all)
        onto_Q = torch.split(product(Q.mT, F_all).double(), [F_i.shape[1] for F_i in seen.F], dim=1)
        for a_i, b_i, QF_i in zip(operator.a, operator.b, onto_Q, strict=True):
            both = a_i.mT @ QF_i
            energy += _energy(both)
            common = common - a_i @ both @ b_i.mT
        left = _Side.of(L - product(a_all, E_all), P)
        right = _Side.of((R - product(F_all, b_all.mT)).mT, Q)
        return cls(energy, max(0.0, outside), storage_energy(recovery.weight), left, right, common)


@dataclass
class _Pass:
    """Sums of a pass over the models, block by block, compute dtype.

    Attributes:
        E: `U_i^T e_i`, `(r_i, in)` each.
        F: `e_i V_i`, `(out, r_i)` each.
        left: `Q^T sum_i e_i`, `(s_U, in)`.
        right: `sum_i e_i P`, `(out, s_V)`.
        energy: `sum_i |e_i|^2`.
        total_energy: `|sum_i e_i|^2`.
    """

    E: list[Tensor]
    F: list[Tensor]
    left: Tensor
    right: Tensor
    energy: float = 0.0
    total_energy: float = 0.0

    @classmethod
    def over(cls, stack: Stack, recovery: Recovery, operator: NormalOperator, spaces: Sequence[SVDFactors]) -> "_Pass":
        """Read the models once."""
        U, V = ([basis.to(stack.dtype) for basis in side] for side in zip(*((s.U, s.V) for s in spaces), strict=True))
        Q, P = operator.Q.to(stack.dtype), operator.P.to(stack.dtype)
        deltas = [
            (M_i.left.to(stack.device, stack.dtype), M_i.right.to(stack.device, stack.dtype).mT)
            for M_i in recovery.deltas
        ]
        out, columns = stack.shape
        seen = cls(
            [stack.zeros(U_i.shape[1], columns) for U_i in U],
            [stack.zeros(out, V_i.shape[1]) for V_i in V],
            stack.zeros(Q.shape[1], columns),
            stack.zeros(out, P.shape[1]),
        )
        runs = [slice(start, start + stack.block_height) for start in range(0, out, stack.block_height)]
        for rows, stored in zip(runs, upload(stack.matrices, runs, stack.device), strict=True):
            weight = recovery.weight[rows].to(stack.device, stack.dtype)
            total, energy = torch.zeros_like(weight), 0.0
            for i, (W_i, (left, right)) in enumerate(zip(stored, deltas, strict=True)):
                e_i = (W_i.to(stack.dtype) - weight).sub_(product(left[rows], right))
                energy += _energy(e_i)
                total += e_i
                seen.E[i] += product(U[i][rows].mT, e_i)
                seen.F[i][rows] = product(e_i, V[i])
            seen.energy += energy
            seen.total_energy += _energy(total)
            if _energy(total) > NEGLIGIBLE * energy:
                seen.left += product(Q[rows].mT, total)
                seen.right[rows] = product(total, P)
        return seen


def _energy(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2
