"""What an answer leaves of the data, and how far it is from the best answer near it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detune.solvers.base import Recovery
from detune.solvers.device import upload
from detune.solvers.polish import Core
from detune.solvers.stack import Stack, storage_variance

# An average leaves residuals that sum to zero but for its rounding: a sum of less than this share of their energy is
# not looked at closer.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Misfit:
    """Measured in one pass over the models.

    Attributes:
        energy: `sum_i |W_i - W_star - M_i|^2`, less what the step to the nearest maximum-likelihood answer takes off.
        distance: `|Delta|^2`, Delta the step of W to that answer, less what rounding W to its dtype has in it.
    """

    energy: float
    distance: float

    @classmethod
    def of(cls, stack: Stack, recovery: Recovery, core: Core, U: Sequence[Tensor], V: Sequence[Tensor]) -> "Misfit":
        """Measure it.

        The step is `Delta = A^-1 sum_i P_i e_i R_i` for residuals `e_i = W_i - W_star - M_i`: Gauss-Newton's, which is
        zero at a stationary point, wherever the answer came from.

        Args:
            stack: The models.
            recovery: The answer, with a delta for each model.
            core: The operator A at its spaces, float64.
            U: Column spaces of the deltas, orthonormal `(out, r_i)`, float64.
            V: Row spaces, `(in, r_i)`.
        """
        sums = _Sums(stack, recovery, core, U, V)
        Q, P, n = core.Q, core.P, stack.n
        left, right, middle = sums.total_left, sums.total_right, Q.mT @ sums.total_right
        outside = sums.total_energy - float(left.square().sum()) - float(right.square().sum())
        outside += float(middle.square().sum())
        energy = sums.energy
        for E_i, F_i, U_i, a_i, b_i in zip(sums.E, sums.F, U, core.a, core.b, strict=True):
            # What M_i can take up by moving in its tangent space.
            energy += float((U_i.mT @ F_i).square().sum() - E_i.square().sum() - F_i.square().sum())
            left = left - a_i @ E_i
            right = right - F_i @ b_i.mT
            middle = middle - a_i @ (E_i @ P) - (Q.mT @ F_i) @ b_i.mT + a_i @ (U_i.mT @ F_i) @ b_i.mT
        left, right = left - (left @ P) @ P.mT, right - Q @ (Q.mT @ right)
        steps = (core.inverse_G_U @ left, right @ core.inverse_G_V, core.solve(middle, 1e-6 * float(middle.norm())))
        gained = sum(float((part * step).sum()) for part, step in zip((left, right, middle), steps, strict=True))
        distance = sum(float(step.square().sum()) for step in steps)
        outside = max(0.0, outside)
        distance = max(0.0, distance + outside / n**2 - sums.rounding)
        return cls(max(0.0, energy - gained - outside / n), distance)


class _Sums:
    """Sums over the rows, block by block.

    Attributes:
        energy: `sum_i |e_i|^2`.
        total_energy: `|sum_i e_i|^2`.
        rounding: Expected energy of the rounding of W_star to its dtype.
        total_left: `Q^T sum_i e_i`.
        total_right: `sum_i e_i P`.
        E: `U_i^T e_i`.
        F: `e_i V_i`.
    """

    def __init__(self, stack: Stack, recovery: Recovery, core: Core, U: Sequence[Tensor], V: Sequence[Tensor]) -> None:
        self.energy = self.total_energy = self.rounding = 0.0
        right = [M_i.right.to(stack.device, stack.dtype).mT for M_i in recovery.deltas]
        left = [M_i.left.to(stack.device, stack.dtype) for M_i in recovery.deltas]
        U, V = ([basis.to(stack.dtype) for basis in bases] for bases in (U, V))
        Q, P = core.Q.to(stack.dtype), core.P.to(stack.dtype)
        out, columns = stack.shape
        E, F = [stack.zeros(U_i.shape[1], columns) for U_i in U], [stack.zeros(out, V_i.shape[1]) for V_i in V]
        total_left, total_right = stack.zeros(Q.shape[1], columns), stack.zeros(out, P.shape[1])
        height = stack.block_height
        runs = [slice(start, start + height) for start in range(0, out, height)]
        for rows, stored in zip(runs, upload(stack.matrices, runs, stack.device), strict=True):
            weight = recovery.weight[rows].to(stack.device, stack.dtype)
            self.rounding += float(storage_variance(recovery.weight[rows]).sum())
            total = torch.zeros_like(weight)
            energy = 0.0
            for i, W_i in enumerate(stored):
                e_i = (W_i.to(stack.dtype) - weight).addmm_(left[i][rows], right[i], alpha=-1)
                energy += float(torch.linalg.vector_norm(e_i)) ** 2
                total += e_i
                E[i].addmm_(U[i][rows].mT, e_i)
                torch.mm(e_i, V[i], out=F[i][rows])
            total_energy = float(torch.linalg.vector_norm(total)) ** 2
            self.energy += energy
            self.total_energy += total_energy
            if total_energy > NEGLIGIBLE * energy:
                total_left.addmm_(Q[rows].mT, total)
                torch.mm(total, P, out=total_right[rows])
        self.E, self.F = ([part.to(core.Q) for part in parts] for parts in (E, F))
        self.total_left, self.total_right = total_left.to(core.Q), total_right.to(core.Q)
