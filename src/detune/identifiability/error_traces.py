"""Traces of the inverse of the recovery problem's operator: how well the data determine W.

Linearised at `M_i = U_i C_i V_i^T`, least squares leaves W with the error

    E = A^-1 sum_i P_i N_i R_i,    A: Delta -> sum_i P_i Delta R_i,    P_i = I - U_i U_i^T,  R_i = I - V_i V_i^T,

for storage noise `N_i` (`detune.fitting.gauss_newton`). With independent entries of variance `sigma_i^2` its energy is
`sum_i sigma_i^2 tr(A^-1 (P_i x R_i) A^-1)`; where all are equal that is `sigma^2 tr(A^-1)`, the Cramér-Rao bound. All
traces fall apart as A does: outside both joint spans, on either side, and a core.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from detune.fitting.normal_operator import NormalOperator
from detune.identifiability.null_space import ZERO, dense_core
from detune.numerics.random import seeded
from detune.numerics.trace import probe

# A core of at most 700 unknowns is decomposed, exactly and in 0.2 s on one thread; a larger one is probed. Any
# number does that is as quick.
DENSE = 700
PROBES = 8
# Two probes do where the standard error of the whole is below a hundredth: 0.004 in log10, far below the 0.3 that a
# prediction is good to (derived).
FEWEST_PROBES = 2
CLOSE_ENOUGH = 0.01
# Conjugate gradients for the probes stop at this share of the right-hand side, a hundredth of CLOSE_ENOUGH (derived).
PRECISION = 1e-4


def cramer_rao_mse(U: Sequence[Tensor], V: Sequence[Tensor], variance: float, probes: int = 16, seed: int = 0) -> float:
    """The least mean squared error per entry that an unbiased recovery can have.

    Args:
        U: Orthonormal column spaces of the true `M_i`, `(out, r_i)`, float64.
        V: Orthonormal row spaces, `(in, r_i)`, float64.
        variance: Variance of the storage noise, per entry and model.
        probes: Random sign matrices for the trace of the core; the rest is exact.
        seed: Seed of the probes.

    Returns:
        `variance * trace(A^-1) / (out * in)`.
    """
    operator = NormalOperator.of(U, V)
    (d, s_U), (k, s_V) = operator.Q.shape, operator.P.shape

    def measure(z: Tensor) -> Tensor:
        return (z * operator.solve(z, 1e-8 * z.numel() ** 0.5)).sum()

    inner = float(probe(measure, (s_U, s_V), probes, seeded(seed, operator.Q.device), operator.inverse_G_U).mean())
    trace = (
        (d - s_U) * (k - s_V) / len(U)
        + (k - s_V) * float(operator.inverse_G_U.trace())
        + (d - s_U) * float(operator.inverse_G_V.trace())
        + inner
    )
    return variance * trace / (d * k)


@dataclass(frozen=True)
class ErrorTraces:
    """The way of each model's noise into W and the residual.

    Attributes:
        weight: `tr(A^-1 (P_i x R_i) A^-1)` for each model, `(n,)`: times its variance, its share of `|E|^2`.
        residual: `tr(P_i x R_i) - tr(A^-1 (P_i x R_i))`, `(n,)`: times its variance, its share of the misfit.
        directions: `tr(A^-1)^2 / tr(A^-2)`: about how many directions share the error. Where they are few, its energy
            scatters by `sqrt(2 / directions)`.
        solved: Whether the equations could be solved; if not, the traces are too small.
    """

    weight: Tensor
    residual: Tensor
    directions: float
    solved: bool


class _CoreTraces(NamedTuple):
    """`tr(A^-1 A_i A^-1)` and `tr(A^-1 A_i)` for each model, `tr(A^-2)`, and whether they are to be trusted."""

    weight: Tensor
    image: Tensor
    squares: float
    solved: bool = True


def error_traces(operator: NormalOperator, seed: int = 0) -> ErrorTraces:
    """The traces that turn variances into expected errors; A has no null space.

    Args:
        operator: The operator, float64.
        seed: Seed of the probes.
    """
    n = len(operator.a)
    (d, s_U), (k, s_V) = operator.Q.shape, operator.P.shape
    outside = float((d - s_U) * (k - s_V)) / n
    weight, taken = (operator.inverse_G_U.new_full((n,), part) for part in (outside / n, outside))
    squares = outside / n
    ranks = torch.tensor([a_i.shape[1] for a_i in operator.a], dtype=torch.float64, device=operator.Q.device)
    for inverse, coordinates, times in (
        (operator.inverse_G_U, operator.a, k - s_V),
        (operator.inverse_G_V, operator.b, d - s_U),
    ):
        images = [(c_i, inverse @ c_i) for c_i in coordinates]
        square = inverse.square().sum()
        weight = weight + times * torch.stack([square - image.square().sum() for _, image in images])
        taken = taken + times * torch.stack([inverse.trace() - (c_i * image).sum() for c_i, image in images])
        squares += times * float(square)
    inner = _core_traces(operator, float(weight.sum()), seed)
    weight, taken, squares = weight + inner.weight, taken + inner.image, squares + inner.squares
    free = (d - ranks) * (k - ranks) - taken
    return ErrorTraces(weight, free.clamp(min=0), float(weight.sum()) ** 2 / squares, inner.solved)


def _core_traces(operator: NormalOperator, outside: float, seed: int) -> _CoreTraces:
    """The core's part, as exactly as it has to be, given the part of the error outside."""
    if operator.Q.shape[1] * operator.P.shape[1] <= DENSE:
        return _dense_traces(operator)
    # Probes need no more digits, but near-singular equations do.
    found = _probed_traces(operator.single, outside, seed)
    return found if found.solved else _probed_traces(operator, outside, seed)


def _dense_traces(operator: NormalOperator) -> _CoreTraces:
    s_U, s_V = operator.Q.shape[1], operator.P.shape[1]
    values, vectors = torch.linalg.eigh(dense_core(operator))
    kept = values > ZERO * len(operator.a)
    X, values = vectors.mT[kept].reshape(int(kept.sum()), s_U, s_V), values[kept]
    shares = torch.stack([operator.project(i, X).square().sum(dim=(1, 2)) for i in range(len(operator.a))])
    return _CoreTraces((shares / values.square()).sum(1), (shares / values).sum(1), float(values.pow(-2).sum()))


def _probed_traces(operator: NormalOperator, outside: float, seed: int) -> _CoreTraces:
    """Estimate the traces from few random sign matrices.

    Args:
        operator: The operator.
        outside: The rest of the error, which the core's share, `sum_i tr(A^-1 A_i A^-1)`, is added to: that share need
            not be known better than the sum.
        seed: Seed of the probes.
    """
    n, shape = len(operator.a), (operator.Q.shape[1], operator.P.shape[1])

    def measure(z: Tensor) -> Tensor:
        solved = operator.solve(z, PRECISION * z.numel() ** 0.5)
        moved = [operator.project(i, solved) for i in range(n)]
        weights, images = [moved_i.square().sum() for moved_i in moved], [(moved_i * z).sum() for moved_i in moved]
        left = (z - operator.apply(solved)).square().mean()
        return torch.stack([*weights, *images, solved.square().sum(), left])

    def settled(figures: Tensor) -> bool:
        """Whether more probes would not change the whole."""
        totals = figures[:, :n].sum(dim=1)
        if len(totals) < FEWEST_PROBES:
            return False
        return float(totals.std()) / math.sqrt(len(totals)) <= CLOSE_ENOUGH * (outside + float(totals.mean()))

    figures = probe(measure, shape, PROBES, seeded(seed, operator.Q.device), operator.inverse_G_U, settled)
    weight, image, (squares, _) = figures.mean(dim=0).split([n, n, 2])
    solved_well = float(figures[:, -1].max()) <= (10 * PRECISION) ** 2
    return _CoreTraces(weight, image, float(squares), solved_well)
