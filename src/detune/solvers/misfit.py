"""What an answer leaves of the data, and how far it is from the best answer near it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detune.solvers.base import Recovery, Residuals
from detune.solvers.device import upload
from detune.solvers.polish import Core
from detune.solvers.space import Space
from detune.solvers.stack import Stack, storage_variance

# An average leaves residuals that sum to zero but for its rounding: a sum of less than this share of their energy is
# not looked at closer.
NEGLIGIBLE = 1e-6
# A delta whose singular values span more than this is looked at in directions of its own.
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
    def of(cls, stack: Stack, recovery: Recovery, core: Core, spaces: Sequence[Space]) -> "Misfit":
        """Measure it.

        The step is `Delta = A^-1 sum_i P_i e_i R_i` for residuals `e_i = W_i - W_star - M_i`: Gauss-Newton's, which is
        zero at a stationary point, wherever the answer came from.

        Args:
            stack: The models.
            recovery: The answer, with a delta for each model.
            core: The operator A at its spaces, float64.
            spaces: Of the deltas.
        """
        known = recovery.residuals
        if known is not None and known.are_of(recovery) and all(_well_scaled(space) for space in spaces):
            sums = _Sums.of_fit(known, recovery, core, spaces)
        else:
            sums = _Sums.measured(stack, recovery, core, spaces)
        Q, P, n = core.Q, core.P, stack.n
        left, right, middle = sums.total_left, sums.total_right, Q.mT @ sums.total_right
        outside = sums.total_energy - float(left.square().sum()) - float(right.square().sum())
        outside += float(middle.square().sum())
        # What the M_i can take up by moving in their tangent spaces.
        E, F, a, b = (torch.cat(parts, dim) for parts, dim in ((sums.E, 0), (sums.F, 1), (core.a, 1), (core.b, 1)))
        inner_F = Q.mT @ F
        middle = middle - a @ (E @ P) - inner_F @ b.mT
        energy = sums.energy - float(E.square().sum()) - float(F.square().sum())
        for a_i, b_i, inner_i in zip(core.a, core.b, inner_F.split([len(c.mT) for c in core.b], dim=1), strict=True):
            both = a_i.mT @ inner_i
            energy += float(both.square().sum())
            middle = middle + a_i @ both @ b_i.mT
        left, right = left - a @ E, right - F @ b.mT
        left, right = left - (left @ P) @ P.mT, right - Q @ (Q.mT @ right)
        steps = (core.inverse_G_U @ left, right @ core.inverse_G_V, core.solve(middle, 1e-6 * float(middle.norm())))
        gained = sum(float((part * step).sum()) for part, step in zip((left, right, middle), steps, strict=True))
        distance = sum(float(step.square().sum()) for step in steps)
        outside = max(0.0, outside)
        distance = max(0.0, distance + outside / n**2 - sums.rounding)
        return cls(max(0.0, energy - gained - outside / n), distance)


def _well_scaled(space: Space) -> bool:
    """Whether what the factors give by products in the compute dtype holds for their weakest direction too."""
    return not len(space.S) or float(space.S[-1]) > LEAST_SCALE * float(space.S[0])


@dataclass(frozen=True)
class _Sums:
    """Sums over the matrices.

    Attributes:
        energy: `sum_i |e_i|^2`.
        total_energy: `|sum_i e_i|^2`.
        rounding: Expected energy of the rounding of W_star to its dtype.
        total_left: `Q^T sum_i e_i`.
        total_right: `sum_i e_i P`.
        E: `U_i^T e_i`.
        F: `e_i V_i`.
    """

    energy: float
    total_energy: float
    rounding: float
    total_left: Tensor
    total_right: Tensor
    E: tuple[Tensor, ...]
    F: tuple[Tensor, ...]

    @classmethod
    def of_fit(cls, known: Residuals, recovery: Recovery, core: Core, spaces: Sequence[Space]) -> "_Sums":
        """From what the solver's last step has seen: the sums that its normal equations make zero are."""
        # U_i = M_i.left (M_i.right^T V_i) / S_i, and the same with left and right exchanged.
        if known.transposed:
            factors = [(M_i.left, space.U, space.S) for M_i, space in zip(recovery.deltas, spaces, strict=True)]
        else:
            factors = [(M_i.right, space.V, space.S) for M_i, space in zip(recovery.deltas, spaces, strict=True)]
        products = tuple(
            ((given.to(basis).mT @ basis) / S).mT @ product.to(basis)
            for (given, basis, S), product in zip(factors, known.products, strict=True)
        )
        (out, s_U), (columns, s_V) = core.Q.shape, core.P.shape
        zeros = core.Q.new_zeros
        return cls(
            known.energy,
            0.0,
            0.0,
            zeros(s_U, columns),
            zeros(out, s_V),
            tuple(zeros(len(p), columns) for p in products) if known.transposed else products,
            tuple(p.mT for p in products) if known.transposed else tuple(zeros(out, len(p)) for p in products),
        )

    @classmethod
    def measured(cls, stack: Stack, recovery: Recovery, core: Core, spaces: Sequence[Space]) -> "_Sums":
        """In one pass over the models, block by block."""
        energy = all_energy = rounding = 0.0
        right = [M_i.right.to(stack.device, stack.dtype).mT for M_i in recovery.deltas]
        left = [M_i.left.to(stack.device, stack.dtype) for M_i in recovery.deltas]
        U, V = [space.U.to(stack.dtype) for space in spaces], [space.V.to(stack.dtype) for space in spaces]
        Q, P = core.Q.to(stack.dtype), core.P.to(stack.dtype)
        out, columns = stack.shape
        E, F = [stack.zeros(U_i.shape[1], columns) for U_i in U], [stack.zeros(out, V_i.shape[1]) for V_i in V]
        total_left, total_right = stack.zeros(Q.shape[1], columns), stack.zeros(out, P.shape[1])
        height = stack.block_height
        runs = [slice(start, start + height) for start in range(0, out, height)]
        for rows, stored in zip(runs, upload(stack.matrices, runs, stack.device), strict=True):
            weight = recovery.weight[rows].to(stack.device, stack.dtype)
            rounding += float(storage_variance(recovery.weight[rows]).sum())
            total = torch.zeros_like(weight)
            here = 0.0
            for i, W_i in enumerate(stored):
                e_i = (W_i.to(stack.dtype) - weight).addmm_(left[i][rows], right[i], alpha=-1)
                here += float(torch.linalg.vector_norm(e_i)) ** 2
                total += e_i
                E[i].addmm_(U[i][rows].mT, e_i)
                torch.mm(e_i, V[i], out=F[i][rows])
            total_here = float(torch.linalg.vector_norm(total)) ** 2
            energy += here
            all_energy += total_here
            if total_here > NEGLIGIBLE * here:
                total_left.addmm_(Q[rows].mT, total)
                torch.mm(total, P, out=total_right[rows])
        return cls(
            energy,
            all_energy,
            rounding,
            total_left.to(core.Q),
            total_right.to(core.Q),
            tuple(E_i.to(core.Q) for E_i in E),
            tuple(F_i.to(core.Q) for F_i in F),
        )
