import math

import pytest
import torch
from torch import Tensor

from detune import recover_matrix
from detune.certificate.certify import Verdict, certify
from detune.methods import SOLVERS, Auto
from detune.metrics import w_error
from detune.numerics.float_grid import nearest, times_power_of_two
from detune.problem import NonFinite, Stack
from detune.problem.outliers import Outliers
from detune.problem.solving import solve, told_by_others
from tests.cases import Problem, Regime, make_problem, normal, seeded

PLAIN = Regime(shape=(48, 40), ranks=(2, 2, 2), scale=0.01, dtype=torch.float32)
MOST = torch.finfo(torch.float32).max


def damaged(problem: Problem, *entries: tuple[int, int, int, float]) -> tuple[Tensor, ...]:
    """The models with other values in some entries: (model, row, column, value)."""
    models = [W_i.clone() for W_i in problem.stack]
    for model, row, column, value in entries:
        models[model][row, column] = value
    return tuple(models)


ONE = ((1, 5, 7, 1e37),)
DAMAGE = {
    "one entry": ONE,
    "thousands of times the rms": ((1, 5, 7, -2e3),),
    "a million times the rms": ((1, 5, 7, -1.2e6),),
    "a part of a row": tuple((0, 3, column, 1e30) for column in range(10)),
    "a column": tuple((2, row, 8, 1e30) for row in range(36)),
    "here and there": tuple((i % 3, 7 * i % 48, 11 * i % 40, 1e9 * (i + 1)) for i in range(20)),
    "two models, elsewhere": ((0, 1, 2, 1e20), (2, 3, 4, -1e37)),
    "two models, in one place": ((0, 1, 2, 1e20), (2, 1, 2, -1e37)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("exponent", [0, -80], ids=["order one", "small"])
def test_what_some_models_hold_is_found_from_the_others(damage, exponent):
    problem = make_problem(PLAIN, seeded())
    whole = recover_matrix(problem.stack)
    damage = [(*place, value if exponent == 0 else math.copysign(1e20, value)) for *place, value in damage]
    models = [times_power_of_two(W_i, exponent) for W_i in problem.stack]
    for model, row, column, value in damage:
        models[model][row, column] = value
    stack = Stack.of(models)
    recovery = solve(Auto(), stack)
    weight = times_power_of_two(recovery.weight, -exponent)
    assert recovery.ranks == (2, 2, 2)
    assert w_error(weight, problem.W_star) < w_error(whole.weight, problem.W_star) + 0.1
    rows, columns = (torch.tensor([entry[side] for entry in damage]) for side in (1, 2))
    off = (weight - problem.W_star)[rows, columns].abs()
    assert float(off.max()) < 10 * float((whole.weight - problem.W_star).square().mean().sqrt())
    certificate = certify(stack, recovery, torch.float32)
    assert certificate.verdict is Verdict.FLOOR, certificate.reason
    shift = 2 * exponent * math.log10(2)
    assert certificate.predicted_w_error - shift == pytest.approx(w_error(weight.float(), problem.W_star), abs=0.5)


def test_they_are_named():
    problem = make_problem(PLAIN, seeded())
    recovery = recover_matrix(damaged(problem, *ONE))
    assert "entry (5, 7) of model 1, 1e+37, is " in recovery.reason
    assert recovery.reason.endswith(" times the typical size: left out of the fit, and found from the others")
    many = recover_matrix(damaged(problem, *DAMAGE["a part of a row"]))
    assert many.reason.endswith("and in 7 more places")


def test_bits_are_found_beside_them():
    problem = make_problem(PLAIN, seeded())
    W = nearest(problem.W_star, torch.bfloat16)
    merged = Problem(W, problem.deltas, torch.stack([W + M_i for M_i in problem.deltas]).float())
    stack = Stack.of(damaged(merged, *ONE))
    recovery = solve(Auto(), stack)
    assert torch.equal(recovery.weight, W)
    assert int(recovery.bits.certain.count_nonzero()) == W.numel() - 1
    assert not recovery.bits.certain[5, 7]
    assert certify(stack, recovery, torch.float32).verdict is not Verdict.EXACT


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_models_that_agree_but_for_one_entry(lost):
    """Whose it is: the first two share an adapter."""
    problem = make_problem(PLAIN, seeded())
    models = [problem.stack[0].clone(), problem.stack[0].clone(), problem.W_star.float()]
    whole = recover_matrix(models)
    models[lost][5, 7] = 1e37
    recovery = recover_matrix(models)
    assert recovery.method == whole.method == "unchanged"
    assert torch.equal(recovery.weight, whole.weight)
    certificate = certify(Stack.of(models), recovery, torch.float32)
    assert certificate.reason == "exact, if models 0 and 1 agree in every bit because the matrix was left alone"
    assert certificate.worst_w_error >= w_error(recovery.weight, problem.W_star.float()) - 1e-3


@pytest.mark.parametrize("value", [MOST, -MOST, 1e20, 5e3])
@pytest.mark.parametrize("method", ["auto", "intersect", "spectral"])
def test_what_all_models_hold_is_taken_as_it_is_and_no_certainty(method, value):
    problem = make_problem(PLAIN, seeded())
    truth = problem.W_star.clone()
    truth[5, 7] = value
    stack = Stack.of(damaged(problem, *((i, 5, 7, value) for i in range(3))))
    recovery = solve(SOLVERS[method](), stack)
    assert float(recovery.weight[5, 7]) == pytest.approx(value, rel=1e-7)
    assert "of all models" in recovery.reason
    assert "taken as it is" in recovery.reason
    apart = recovery.weight - truth
    apart[5, 7] = 0
    plain = SOLVERS[method]().solve(Stack.of(problem.stack))
    assert w_error(apart, 0 * apart) < w_error(plain.weight, problem.W_star) + 0.1
    certificate = certify(stack, recovery, torch.float32)
    assert certificate.verdict in (Verdict.APPROXIMATE, Verdict.NOT_DETERMINED)
    if certificate.verdict is Verdict.APPROXIMATE:
        assert "known to its rounding at best" in certificate.reason
        assert certificate.worst_w_error > 2 * math.log10(abs(value)) - 20


@pytest.mark.parametrize("larger", [slice(0, 3), slice(0, 20)], ids=["few columns", "most columns"])
def test_a_matrix_of_two_scales_has_none(larger):
    W = normal(seeded(), 40, 30)
    W[:, larger] *= 10 ** (9 * torch.rand(40, 1, generator=seeded(1), dtype=torch.float64))
    assert Outliers.of(Stack.of([W, 1.01 * W, 0.99 * W])) is None


def test_zeros_make_no_outliers():
    W = torch.zeros(40, 30)
    W[3, 4] = 1.0
    assert Outliers.of(Stack.of([W, torch.zeros(40, 30)])) is None


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinity_and_nan_are_refused(value):
    problem = make_problem(PLAIN, seeded())
    with pytest.raises(NonFinite, match="matrix 2 holds NaN or Inf"):
        recover_matrix(damaged(problem, (2, 0, 0, value), *ONE))


def test_the_average_is_that_of_the_others():
    problem = make_problem(PLAIN, seeded())
    stack = damaged(problem, *ONE)
    found = recover_matrix(stack, "mean").weight[5, 7]
    others = [problem.stack[i][5, 7].double() for i in (0, 2)]
    assert float(found) == pytest.approx(float(sum(others) / 2), rel=1e-6)
    assert float(recover_matrix(stack, "single").weight[5, 7]) == float(problem.stack[0][5, 7])


def test_a_single_model_stays_as_it_is():
    problem = make_problem(PLAIN, seeded())
    stack = damaged(problem, (0, 5, 7, 1e37))
    assert torch.equal(recover_matrix(stack, "single").weight.float(), stack[0])


def test_looking_changes_nothing_else():
    problem = make_problem(PLAIN, seeded())
    stack = Stack.of(damaged(problem, *ONE))
    seen = told_by_others(stack)
    differs = torch.stack([a.ne(b) for a, b in zip(seen.matrices, stack.matrices, strict=True)])
    assert differs.nonzero().tolist() == [[1, 5, 7]]
