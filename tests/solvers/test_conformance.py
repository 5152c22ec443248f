"""What every solver must do, on every row of the table."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from detune.errors import InputError
from detune.solvers import SOLVERS, NonFinite, NotRecoverable, Recovery, Stack
from detune.solvers.differences import ring
from tests.cases import CASES, REGIMES, Case, Problem, Regime, make_problem, normal, orthogonal, rms, seeded

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.solver}-{case.regime}".replace(" ", "_"))
solvers = pytest.mark.parametrize("name", SOLVERS)


def problem_of(case: Case, seed: int = 0) -> Problem:
    return make_problem(REGIMES[case.regime], seeded(seed))


def solve(case: Case, stack: torch.Tensor) -> Recovery:
    return SOLVERS[case.solver]().solve(Stack.of(stack))


def distance(weight: torch.Tensor, expected: torch.Tensor, problem: Problem) -> float:
    return rms(weight.double() - expected.double()) / problem.delta_rms


def test_every_solver_has_a_row():
    assert {case.solver for case in CASES} == set(SOLVERS)


@cases
@pytest.mark.parametrize("seed", [0, 1])
def test_answers_within_its_tolerance(case, seed):
    problem = problem_of(case, seed)
    assert problem.error(solve(case, problem.stack).weight) <= case.tolerance


@cases
def test_result_is_described_truly(case):
    problem = problem_of(case)
    stack = Stack.of(problem.stack)
    recovery = SOLVERS[case.solver]().solve(stack)
    assert recovery.weight.shape == stack.shape
    assert recovery.weight.dtype is stack.dtype
    assert recovery.weight.device == stack.device
    assert recovery.method
    assert recovery.reason
    assert len(recovery.deltas) == len(recovery.ranks) in (0, stack.n)
    assert tuple(M_i.rank for M_i in recovery.deltas) == recovery.ranks
    assert all(M_i.dense().shape == stack.shape for M_i in recovery.deltas)


@cases
def test_residual_is_the_one_of_its_own_answer(case):
    """Never trust a method's own claim: the figures follow from the weight and the deltas."""
    problem = problem_of(case)
    recovery = solve(case, problem.stack)
    if recovery.relative_residual is None:
        assert case.solver == "single"
        return
    models = problem.stack.double()
    deltas = [M_i.dense().double() for M_i in recovery.deltas] or [torch.zeros_like(models[0])] * len(models)
    rest = models - recovery.weight.double() - torch.stack(deltas)
    spread = models - models.mean(dim=0)
    expected = rms(rest) / rms(spread)
    assert recovery.relative_residual == pytest.approx(expected, rel=1e-2, abs=1e-6)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_computes_in_the_dtype_it_is_told(case, dtype):
    problem = problem_of(case)
    recovery = SOLVERS[case.solver]().solve(Stack.of(problem.stack, dtype))
    assert recovery.weight.dtype is dtype
    assert problem.error(recovery.weight) <= max(case.tolerance, 1e-2)


@cases
def test_leaves_its_input_alone(case):
    stack = problem_of(case).stack
    before = stack.clone()
    weight = solve(case, stack).weight
    weight.zero_()
    assert stack.equal(before)


@cases
def test_is_deterministic_and_leaves_the_global_generator_alone(case):
    stack = problem_of(case).stack
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = solve(case, stack)
    assert torch.random.get_rng_state().equal(state)
    torch.manual_seed(2)
    assert solve(case, stack).weight.equal(first.weight)


@cases
def test_turns_with_the_matrices(case):
    problem = problem_of(case)
    if problem.stack.dtype is not torch.float64:
        problem = make_problem(with_dtype(case, torch.float64), seeded())
    generator = seeded(7)
    left, right = (orthogonal(generator, size) for size in problem.W_star.shape)
    turned = solve(case, left @ problem.stack @ right)
    expected = left @ solve(case, problem.stack).weight @ right
    assert distance(turned.weight, expected, problem) <= case.rounding


@cases
def test_transposes_with_the_matrices(case):
    problem = problem_of(case)
    turned = solve(case, problem.stack.mT.contiguous()).weight.mT
    assert distance(turned, solve(case, problem.stack).weight, problem) <= case.rounding


@cases
@pytest.mark.parametrize("power", [-20, 1, 12])
def test_scales_with_the_matrices(case, power):
    problem = problem_of(case)
    if problem.stack.dtype is torch.float16:
        power //= 3  # its range is short
    scaled = solve(case, problem.stack * 2.0**power)
    expected = solve(case, problem.stack).weight
    assert distance(scaled.weight * 2.0**-power, expected, problem) <= case.rounding


@cases
def test_shifts_with_the_base(case):
    problem = make_problem(with_dtype(case, torch.float64), seeded())
    shift = normal(seeded(8), *problem.W_star.shape)
    plain, shifted = solve(case, problem.stack), solve(case, problem.stack + shift)
    assert distance(shifted.weight, plain.weight + shift, problem) <= case.rounding
    for M_i, expected in zip(shifted.deltas, plain.deltas, strict=True):
        assert distance(M_i.dense(), expected.dense(), problem) <= case.rounding


@cases
def test_order_of_the_models_does_not_matter(case):
    problem = problem_of(case)
    order = torch.randperm(len(problem.stack), generator=seeded(3))
    plain, permuted = solve(case, problem.stack), solve(case, problem.stack[order])
    assert distance(permuted.weight, plain.weight, problem) <= case.rounding
    assert permuted.ranks == tuple(plain.ranks[i] for i in order[: len(plain.ranks)])


def with_dtype(case: Case, dtype: torch.dtype) -> Regime:
    regime = REGIMES[case.regime]
    return Regime(regime.shape, regime.ranks, regime.decay, regime.scale, regime.shared_rows, dtype)
