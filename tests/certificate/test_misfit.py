"""What an answer leaves, and how far it is from the best, against dense least squares."""

from dataclasses import replace

import pytest
import torch

from detune.certificate.misfit import Misfit
from detune.fitting.normal_operator import NormalOperator
from detune.methods import Auto, Intersect
from detune.problem import LowRank, Recovery, Stack
from detune.problem.low_rank import SVDFactors
from tests.cases import Problem, Regime, make_problem, normal, rms, seeded
from tests.fitting.test_gauss_newton import dense_operator, projectors, spaces


def truth(problem: Problem) -> tuple[Recovery, list[torch.Tensor], list[torch.Tensor]]:
    U, V = spaces(problem)
    deltas = [LowRank(U_i @ (U_i.mT @ M_i @ V_i), V_i) for M_i, U_i, V_i in zip(problem.deltas, U, V, strict=True)]
    return Recovery(problem.W_star, "truth", "told", tuple(deltas)), U, V


def measure(stack: Stack, recovery: Recovery) -> Misfit:
    spaces = [SVDFactors.of(M_i) for M_i in recovery.deltas]
    return Misfit.of(
        stack, recovery, NormalOperator.of([space.U for space in spaces], [space.V for space in spaces]), spaces
    )


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
    misfit = measure(stack, recovery)
    assert misfit.distance == pytest.approx(float(step @ step), rel=1e-6)
    assert misfit.energy == pytest.approx(
        float(sum(part.square().sum() for part in projected)) - float(rhs @ step), rel=1e-6
    )


def test_the_best_answer_is_at_no_distance():
    problem = make_problem(Regime(scale=1e-3, dtype=torch.float32), seeded())
    stack = Stack.of(problem.stack)
    recovery = Auto(lattice=None).solve(stack)
    best = measure(stack, recovery)
    noise = float(stack.noise.square().mean()) * recovery.weight.numel()
    assert best.distance < 1e-2 * noise
    shift = 1e-5 * normal(seeded(2), *recovery.weight.shape)
    moved = measure(stack, replace(recovery, weight=recovery.weight + shift))
    assert moved.distance == pytest.approx(rms(shift) ** 2 * shift.numel(), rel=0.05)
    assert moved.energy == pytest.approx(best.energy, rel=0.05)


@pytest.mark.parametrize("same_rows", [False, True])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_what_the_solver_saw_is_what_a_pass_finds(shape, same_rows):
    problem = make_problem(Regime(shape=shape, ranks=(3, 2, 4, 3), scale=1e-3, dtype=torch.float32), seeded())
    models = problem.stack
    if same_rows:
        # Row spaces that nearly coincide: the columns are given instead.
        shared = normal(seeded(3), 3, shape[1])
        models = torch.stack(
            [
                problem.W_star + normal(seeded(i), shape[0], 3) @ (shared + 0.1 * normal(seeded(9 + i), 3, shape[1]))
                for i in range(4)
            ]
        ).float()
    stack = Stack.of(models)
    recovery = Intersect().solve(stack)
    assert recovery.residuals is not None
    assert recovery.residuals.transposed == same_rows
    seen, found = measure(stack, recovery), measure(stack, replace(recovery, residuals=None))
    assert seen.energy == pytest.approx(found.energy, rel=1e-6)
    assert seen.distance == pytest.approx(found.distance, rel=1e-3)


def test_what_the_solver_saw_is_void_once_the_answer_is_changed():
    problem = make_problem(Regime(scale=1e-3, dtype=torch.float32), seeded())
    stack = Stack.of(problem.stack)
    recovery = Intersect().solve(stack)
    shift = 1e-5 * normal(seeded(2), *recovery.weight.shape)
    moved = measure(stack, replace(recovery, weight=recovery.weight + shift))
    assert moved.distance == pytest.approx(rms(shift) ** 2 * shift.numel(), rel=0.05)
