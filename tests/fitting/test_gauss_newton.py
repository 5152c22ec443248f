"""The Gauss-Newton step against dense least squares, and the answer against the Cramér-Rao bound."""

import math

import pytest
import torch
from torch import Tensor

from detune.fitting.gauss_newton import Tangent, gauss_newton_step
from detune.fitting.least_squares import project_left, project_right
from detune.fitting.normal_operator import NormalOperator
from detune.identifiability.error_traces import cramer_rao_mse
from detune.methods import Auto, Intersect
from detune.problem import Stack
from tests.cases import Problem, Regime, make_problem, normal, orthogonal, rms, seeded


def spaces(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """Orthonormal `U_i` and `V_i` of the true deltas."""
    U, V = [], []
    for M_i in problem.deltas:
        left, S, right = torch.linalg.svd(M_i, full_matrices=False)
        r = int((1e-9 * S[0] < S).sum()) if S[0] > 0 else 0
        U.append(left[:, :r])
        V.append(right[:r].mT)
    return U, V


def projectors(bases: list[Tensor]) -> list[Tensor]:
    return [torch.eye(len(basis), dtype=basis.dtype) - basis @ basis.mT for basis in bases]


def dense_operator(U: list[Tensor], V: list[Tensor]) -> Tensor:
    """`Delta -> sum_i P_i Delta R_i` on row-major vectors: what the fast one must be."""
    return sum(torch.kron(P_i, R_i) for P_i, R_i in zip(projectors(U), projectors(V), strict=True))


TINY = Regime(shape=(11, 9), ranks=(2, 1, 2), scale=1.0)


@pytest.mark.parametrize("ranks", [(2, 1, 2), (1, 1, 1, 1), (2, 0, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_step_equals_dense_least_squares(ranks, seed):
    """Minimise `sum_i |W_i - W - T_i|^2` over W and T_i in the tangent spaces, by brute force."""
    regime = Regime(shape=(11, 9), ranks=ranks, scale=1.0)
    problem = make_problem(regime, seeded(seed))
    generator = seeded(100 + seed)
    U, V = spaces(problem)
    # Off the answer, with noise: a step that only works at the solution would show.
    U = [torch.linalg.qr(U_i + 0.1 * normal(generator, *U_i.shape))[0] for U_i in U]
    V = [torch.linalg.qr(V_i + 0.1 * normal(generator, *V_i.shape))[0] for V_i in V]
    models = problem.stack + 0.1 * normal(generator, *problem.stack.shape)
    mean = models.mean(dim=0)

    rhs = sum(P_i @ (W_i - mean) @ R_i for P_i, W_i, R_i in zip(projectors(U), models, projectors(V), strict=True))
    W = mean + torch.linalg.solve(dense_operator(U, V), rhs.reshape(-1)).reshape(mean.shape)

    stack = Stack.of(models)
    moved = gauss_newton_step(project_left(stack, U), project_right(stack, V), U, V)
    for tangent, W_i, P_i, R_i in zip(moved, models, projectors(U), projectors(V), strict=True):
        expected = (W_i - W) - P_i @ (W_i - W) @ R_i
        got = tangent.left @ tangent.small @ tangent.right.mT
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_core_applies_the_dense_operator():
    U, V = spaces(make_problem(TINY, seeded()))
    operator = NormalOperator.of(U, V)
    X = normal(seeded(1), operator.Q.shape[1], operator.P.shape[1])
    dense = (dense_operator(U, V) @ (operator.Q @ X @ operator.P.mT).reshape(-1)).reshape(11, 9)
    torch.testing.assert_close(operator.apply(X), operator.Q.mT @ dense @ operator.P)


def test_conjugate_gradients_equal_a_dense_solve():
    U, V = spaces(make_problem(Regime(shape=(30, 26), ranks=(3, 4, 2, 3)), seeded()))
    operator = NormalOperator.of(U, V)
    rhs = normal(seeded(1), operator.Q.shape[1], operator.P.shape[1])
    units = torch.eye(rhs.numel(), dtype=rhs.dtype).reshape(-1, *rhs.shape)
    dense = torch.stack([operator.apply(unit).reshape(-1) for unit in units], dim=1)
    expected = torch.linalg.solve(dense, rhs.reshape(-1)).reshape(rhs.shape)
    torch.testing.assert_close(operator.solve(rhs), expected, rtol=1e-7, atol=1e-8)


def test_tangent_is_what_it_is_made_of():
    generator = seeded()
    U, V = (torch.linalg.qr(normal(generator, size, 3))[0] for size in (12, 10))
    X, Y = normal(generator, 3, 10), normal(generator, 12, 3)
    tangent = Tangent.of(X, Y, U, V)
    expected = U @ X + (Y - U @ (U.mT @ Y)) @ V.mT
    torch.testing.assert_close(tangent.left @ tangent.small @ tangent.right.mT, expected)
    left, S, right = torch.linalg.svd(expected)
    best = (left[:, :3] * S[:3]) @ right[:3]
    torch.testing.assert_close(tangent.retract().dense(), best)


BOUND = {
    "flat": Regime(shape=(120, 100), ranks=(5, 5, 5), scale=0.1, dtype=torch.float32),
    "decaying": Regime(shape=(120, 100), ranks=(6, 6, 6), scale=0.1, decay=7.0, dtype=torch.float32),
    "one seed": Regime(shape=(120, 100), ranks=(5, 5, 5), scale=0.1, shared_rows=0.97, dtype=torch.float32),
    "mixed": Regime(shape=(90, 140), ranks=(8, 2, 5, 3), scale=0.1, dtype=torch.float32),
    "many": Regime(shape=(120, 100), ranks=(5,) * 8, scale=0.1, dtype=torch.float32),
    "high": Regime(shape=(120, 100), ranks=(25, 25, 25), scale=0.1, dtype=torch.float32),
    "bfloat16": Regime(shape=(160, 128), ranks=(4,) * 5, scale=1.0, dtype=torch.bfloat16),
    "float16": Regime(shape=(160, 128), ranks=(4,) * 4, scale=0.5, dtype=torch.float16),
}


@pytest.mark.parametrize("name", BOUND)
def test_reaches_the_cramer_rao_bound(name):
    problem = make_problem(BOUND[name], seeded())
    stack = Stack.of(problem.stack)
    bound = cramer_rao_mse(*spaces(problem), float(stack.noise.square().mean()))
    recovery = Auto(lattice=None).solve(stack)
    error = rms(recovery.weight.double() - problem.W_star) ** 2
    assert abs(math.log10(error) - math.log10(bound)) <= 0.3
    assert recovery.method == "intersect+polish"
    assert recovery.noise_ratio == pytest.approx(1, abs=0.15)


def test_gets_closer_than_the_closed_form():
    problem = make_problem(BOUND["decaying"], seeded())
    errors = [problem.error(solver.solve(Stack.of(problem.stack)).weight) for solver in (Intersect(), Auto())]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("seed", range(4))
def test_noise_that_is_more_than_rounding_does_not_spoil_a_good_start(seed):
    """Matrix products add their own rounding; ranks are then found too high, and some directions are noise."""
    generator = seeded(seed)
    problem = make_problem(Regime(), generator)
    left, right = (orthogonal(generator, size) for size in problem.W_star.shape)
    recovery = Auto().solve(Stack.of(left @ problem.stack @ right))
    assert rms(recovery.weight - left @ problem.W_star @ right) <= 1e-9 * problem.delta_rms
