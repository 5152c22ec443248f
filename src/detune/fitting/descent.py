"""Least squares for given ranks that never gets worse: Gauss-Newton steps shortened until the misfit falls.

`detune.fitting.gauss_newton` takes full steps and stops where they wander, which they do where the ranks are not the
right ones. Finding the ranks means fitting wrong ones too. This fit holds the whole stack in memory and looks at the
misfit after every step, so it is for small matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from detune.fitting.gauss_newton import GaussNewton, Tangent, gauss_newton_step
from detune.fitting.least_squares import solve_given_rows
from detune.numerics.linalg import orthonormal
from detune.problem.low_rank import LowRank
from detune.problem.stack import Stack
from detune.problem.storage_noise import noise_edge

# Shares of a step that are tried, longest first: any numbers do that fall by a factor of two to three.
STEP_LENGTHS = (1.0, 0.4, 0.15, 0.05)
# A misfit is as good as it gets if it changes by less than 3e-3 of the noise's largest squared singular value:
# a direction is worth more than a whole one (derived).
ENOUGH = 3e-3
# Most steps, and most where the answer will be held down (measured on merges of all-MiniLM-L6-v2 in 8 bits: the same
# answers as with all steps). Any numbers do from there on.
MOST_STEPS, FEW_STEPS = 25, 1
# Every step solves a linear problem that is wrong anyway: conjugate gradients need not solve it to the last digit.
INNER = GaussNewton(cg_tolerance=0.1, cg_steps=30)


@dataclass(frozen=True)
class Fit:
    """Deltas of given ranks at, or near, a least misfit.

    Attributes:
        deltas: The `M_i`, float64.
        residual: `W_i - W_star - M_i` with `W_star = mean_i (W_i - M_i)`, `(n, out, in)`, float64.
    """

    deltas: tuple[LowRank, ...]
    residual: Tensor

    @classmethod
    def of(cls, centred: Tensor, deltas: Sequence[LowRank]) -> "Fit":
        """Take the misfit of deltas; `centred` is `W_i - mean`, `(n, out, in)`, float64."""
        left = centred - torch.stack([M_i.dense() for M_i in deltas])
        return cls(tuple(deltas), left - left.mean(dim=0))

    @cached_property
    def misfit(self) -> float:
        """`sum_i |W_i - W_star - M_i|^2`."""
        return float(self.residual.square().sum())

    @cached_property
    def U(self) -> tuple[Tensor, ...]:
        """Orthonormal column spaces of the deltas."""
        return tuple(_basis(M_i.left) for M_i in self.deltas)

    @cached_property
    def V(self) -> tuple[Tensor, ...]:
        """Orthonormal row spaces of the deltas."""
        return tuple(_basis(M_i.right) for M_i in self.deltas)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each delta."""
        return tuple(M_i.rank for M_i in self.deltas)


def damped_gauss_newton(stack: Stack, V: Sequence[Tensor]) -> tuple[LowRank, ...]:
    """The deltas of least misfit, for a stack small enough to be held in float64.

    Where noise was told, deltas that take many steps are near it, and will be held down: few are taken.

    Args:
        stack: The models.
        V: Orthonormal row spaces to start from, `(in, r_i)`.
    """
    noise = float(stack.noise.square().mean().sqrt())
    floor = noise_edge(stack.shape, noise**2)
    steps = FEW_STEPS if stack.noise_override else MOST_STEPS
    return descend(centred(stack), [V_i.double() for V_i in V], noise, ENOUGH * floor**2, steps).deltas


def centred(stack: Stack) -> Tensor:
    """`W_i - mean`, `(n, out, in)`, float64: differences first, which are exact or nearly so."""
    matrices = torch.stack([W_i.to(stack.device, torch.float64) for W_i in stack.matrices])
    differences = matrices - matrices[0]
    return differences.sub_(differences.mean(dim=0))


def descend(centred: Tensor, V: Sequence[Tensor], noise: float, enough: float, max_steps: int = MOST_STEPS) -> Fit:
    """Least squares for the ranks of the given row spaces, from there downhill.

    Args:
        centred: `W_i - mean`, `(n, out, in)`, float64.
        V: Orthonormal row spaces to start from, `(in, r_i)`, float64.
        noise: Root mean square of the storage noise.
        enough: Stop when a step lowers the misfit by less.
        max_steps: Most steps.
    """
    fit = _given_rows(centred, V)
    for _ in range(max_steps):
        better = _gauss_newton(centred, fit, noise) or _alternate(centred, fit)
        if better.misfit >= fit.misfit:
            break
        gain, fit = fit.misfit - better.misfit, better
        if gain < enough:
            break
    return fit


def _gauss_newton(centred: Tensor, fit: Fit, noise: float) -> Fit | None:
    """The longest part of a Gauss-Newton step that lowers the misfit; None where none does."""
    E = [U_i.mT @ C_i for U_i, C_i in zip(fit.U, centred, strict=True)]
    F = [C_i @ V_i for V_i, C_i in zip(fit.V, centred, strict=True)]
    tangents = gauss_newton_step(E, F, fit.U, fit.V, noise, INNER)
    here = [(U_i.mT @ M_i.left) @ (M_i.right.mT @ V_i) for U_i, V_i, M_i in zip(fit.U, fit.V, fit.deltas, strict=True)]
    for length in STEP_LENGTHS:
        deltas = []
        for tangent, S in zip(tangents, here, strict=True):
            small = length * tangent.small
            small[: len(S), : len(S)] += (1 - length) * S
            deltas.append(Tangent(tangent.left, small, tangent.right).retract())
        moved = Fit.of(centred, deltas)
        if moved.misfit < fit.misfit:
            return moved
    return None


def _alternate(centred: Tensor, fit: Fit) -> Fit:
    """Row spaces for given column spaces, then the rest for given row spaces: slow, and downhill from anywhere."""
    E = solve_given_rows([C_i.mT @ U_i for U_i, C_i in zip(fit.U, centred, strict=True)], fit.U)
    return _given_rows(centred, [_basis(E_i) for E_i in E])


def _given_rows(centred: Tensor, V: Sequence[Tensor]) -> Fit:
    F = solve_given_rows([C_i @ V_i for V_i, C_i in zip(V, centred, strict=True)], V)
    return Fit.of(centred, [LowRank(F_i, V_i) for F_i, V_i in zip(F, V, strict=True)])


def _basis(factor: Tensor) -> Tensor:
    return orthonormal(factor) if factor.shape[1] else factor
