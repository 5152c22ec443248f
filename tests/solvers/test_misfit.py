"""What an answer leaves, and how far it is from the best, against dense least squares."""

from dataclasses import replace

import pytest
import torch

from detune.solvers import Auto, LowRank, Recovery, Stack
from detune.solvers.misfit import Misfit
from detune.solvers.polish import Core
from tests.cases import Problem, Regime, make_problem, normal, rms, seeded
from tests.solvers.test_polish import dense_operator, projectors, spaces


def truth(problem: Problem) -> tuple[Recovery, list[torch.Tensor], list[torch.Tensor]]:
    U, V = spaces(problem)
    deltas = [LowRank(U_i @ (U_i.mT @ M_i @ V_i), V_i) for M_i, U_i, V_i in zip(problem.deltas, U, V, strict=True)]
    return Recovery(problem.W_star, "truth", "told", tuple(deltas)), U, V


@pytest.mark.parametrize("ranks", [(2, 1, 2), (1, 1, 1, 1), (2, 0, 2)])
def test_step_and_gain_equal_dense_least_squares(ranks):
    problem = make_problem(Regime(shape=(11, 9), ranks=ranks, scale=1.0), seeded())
    recovery, U, V = truth(problem)
    noise = 0.01 * normal(seeded(1), *problem.stack.shape)
    stack = Stack.of(problem.stack + noise)
    # In the tangent spaces the deltas take it up.
    projected = [P_i @ N_i @ R_i for P_i, N_i, R_i in zip(projectors(U), noise, projectors(V), strict=True)]
    rhs = sum(projected).reshape(-1)
    step = torch.linalg.solve(dense_operator(U, V), rhs)
    misfit = Misfit.of(stack, recovery, Core.of(U, V), U, V)
    assert misfit.distance == pytest.approx(float(step @ step), rel=1e-6)
    assert misfit.energy == pytest.approx(
        float(sum(part.square().sum() for part in projected)) - float(rhs @ step), rel=1e-6
    )


def test_the_best_answer_is_at_no_distance():
    problem = make_problem(Regime(scale=1e-3, dtype=torch.float32), seeded())
    stack = Stack.of(problem.stack)
    recovery = Auto(lattice=None).solve(stack)
    U = [torch.linalg.qr(M_i.left)[0] for M_i in recovery.deltas]
    V = [torch.linalg.qr(M_i.right)[0] for M_i in recovery.deltas]
    core = Core.of(U, V)
    best = Misfit.of(stack, recovery, core, U, V)
    noise = float(stack.noise.square().mean()) * recovery.weight.numel()
    assert best.distance < 1e-2 * noise
    shift = 1e-5 * normal(seeded(2), *recovery.weight.shape)
    moved = Misfit.of(stack, replace(recovery, weight=recovery.weight + shift), core, U, V)
    assert moved.distance == pytest.approx(rms(shift) ** 2 * shift.numel(), rel=0.05)
    assert moved.energy == pytest.approx(best.energy, rel=0.05)
