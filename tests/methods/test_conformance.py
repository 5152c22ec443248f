"""What every solver must do, on every row of the table."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detune.methods import SOLVERS
from detune.problem import NonFinite, NotLowRank, NotRecoverable, Recovery, Stack
from tests.cases import CASES, REGIMES, Case, Problem, Regime, make_problem, normal, rms, seeded


def name_of(case: Case) -> str:
    return f"{case.solver}-{case.regime}".replace(" ", "_")


cases = pytest.mark.parametrize("case", CASES, ids=name_of)
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
        assert case.solver in ("single", "shira") or recovery.method == "unchanged"
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


@pytest.mark.parametrize("name", SOLVERS)
def test_answers_alike_from_two_threads_and_leaves_the_global_generator_alone(name):
    """Tensors are solved in threads; the light bfloat16 ones need what few others do."""
    regimes = ["plain", "one seed", "high ranks", "float32", "bfloat16", "float16"]
    stacks = [make_problem(REGIMES[regime], seeded(seed)).stack for seed, regime in enumerate(regimes)]
    stacks.append(
        make_problem(Regime(scale=0.002, dtype=torch.bfloat16, shape=(160, 96), ranks=(3,) * 3), seeded()).stack
    )
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    alone = [bits_of(name, stack) for stack in stacks]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(partial(bits_of, name), stacks * 2))
    assert [i for i, bits in enumerate(together) if bits != alone[i % len(alone)]] == []
    assert torch.random.get_rng_state().equal(state)


def bits_of(name: str, stack: torch.Tensor) -> bytes:
    """The bits of an answer and of its deltas; of a refusal, its words."""
    try:
        recovery = SOLVERS[name]().solve(Stack.of(stack))
    except NotRecoverable as refusal:
        return str(refusal).encode()
    parts = [recovery.weight, *(side for M_i in recovery.deltas for side in (M_i.left, M_i.right))]
    return b"".join(part.cpu().contiguous().numpy().tobytes() for part in parts)


@cases
def test_turns_with_the_matrices(case):
    problem = problem_of(case)
    left, right = REGIMES[case.regime].change_of_basis(seeded(7))
    turned = solve(case, problem.turned(left, right).stack).weight.double()
    expected = left @ solve(case, problem.stack).weight.double() @ right
    assert distance(turned, expected, problem) <= case.rounding


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


@pytest.mark.parametrize("case", [case for case in CASES if case.solver != "single"], ids=name_of)
def test_order_of_the_models_does_not_matter(case):
    problem = problem_of(case)
    order = torch.randperm(len(problem.stack), generator=seeded(3))
    plain, permuted = solve(case, problem.stack), solve(case, problem.stack[order])
    assert distance(permuted.weight, plain.weight, problem) <= case.rounding
    assert permuted.ranks == tuple(plain.ranks[i] for i in order[: len(plain.ranks)])


# --- what all must refuse, and exact recovery on any shape ---


@solvers
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_names_the_model_that_holds_nan_or_inf(name, value, dtype):
    stack = make_problem(Regime(dtype=dtype), seeded()).stack
    model = 0 if name == "single" else 1
    stack[model, 30, 7] = value
    with pytest.raises(NonFinite, match=rf"matrix {model} holds NaN or Inf; expected finite weights; leave") as refused:
        SOLVERS[name]().solve(Stack.of(stack))
    assert refused.value.model == model


@pytest.mark.parametrize("name", ["auto", "intersect"])
def test_needs_three_models(name):
    with pytest.raises(NotRecoverable, match=r"2 models.* a third decides: add a model"):
        SOLVERS[name]().solve(Stack.of(make_problem(REGIMES["plain"], seeded()).stack[:2]))


@pytest.mark.parametrize("name", ["auto", "intersect"])
def test_names_the_models_that_differ_at_full_rank(name):
    stack = make_problem(REGIMES["many models"], seeded()).stack
    stack[2] = normal(seeded(9), *stack[2].shape)
    with pytest.raises(
        NotLowRank, match=r"models 1 and 2 differ at full rank in a 72x60 matrix; .*leave it out"
    ) as refused:
        SOLVERS[name]().solve(Stack.of(stack))
    assert all(2 in pair for pair in refused.value.pairs)


@st.composite
def solvable(draw: st.DrawFn) -> tuple[Regime, int]:
    """Any shapes and ranks that meet the conditions with some room, and a seed."""
    shape = draw(st.integers(12, 90)), draw(st.integers(12, 90))
    n = draw(st.integers(3, 6))
    least, most = 0.6 * min(shape) / 2, 0.6 * max(shape) / 3
    ranks = draw(st.lists(st.integers(0, int(min(least, most))), min_size=n, max_size=n))
    return Regime(shape=shape, ranks=tuple(ranks)), draw(st.integers(0, 2**31))


@pytest.mark.parametrize("name", ["auto", "intersect"])
@given(drawn=solvable())
def test_recovers_exactly_under_its_conditions(name, drawn):
    regime, seed = drawn
    problem = make_problem(regime, seeded(seed))
    recovery = SOLVERS[name]().solve(Stack.of(problem.stack))
    assert rms(recovery.weight - problem.W_star) <= 1e-12
    if recovery.ranks:
        assert recovery.ranks == regime.ranks
    for M_i, expected in zip(recovery.deltas, problem.deltas, strict=False):
        assert rms(M_i.dense() - expected) <= 1e-12


@given(drawn=solvable(), extra=st.integers(0, 3))
def test_a_rank_is_taken_as_the_most(drawn, extra):
    regime, seed = drawn
    problem = make_problem(regime, seeded(seed))
    recovery = SOLVERS["auto"]().solve(Stack.of(problem.stack), max(1, *regime.ranks) + extra)
    assert rms(recovery.weight - problem.W_star) <= 1e-12
    assert recovery.ranks in ((), regime.ranks)


def with_dtype(case: Case, dtype: torch.dtype) -> Regime:
    return replace(REGIMES[case.regime], dtype=dtype)
