"""One tensor, from what the models hold of it to its result."""

import pytest
import torch

from detune.certificate.verdict import Verdict
from detune.compatibility.model_set import Held
from detune.methods import Auto, Mean
from detune.recovery.tensor import RecoveredTensor, solve_tensor
from tests.cases import REGIMES, Regime, make_problem, normal, seeded


def solve(tensors, solver=None, **options) -> RecoveredTensor:
    return solve_tensor("w", Held.of(tensors), solver or Auto(), None, None, **options)


def test_a_matrix_has_a_verdict_and_the_figures_of_its_certificate():
    problem = make_problem(REGIMES["float32"], seeded())
    found = solve(problem.stack)
    assert (found.result.name, found.result.shape, found.result.dtype) == ("w", (96, 80), "float32")
    assert found.result.verdict is Verdict.FLOOR
    assert found.result.ranks == (4, 4, 4)
    assert found.result.predicted_w_error is not None
    assert found.certain is None
    assert problem.error(found.weight) < 1e-4


def test_a_base_on_a_grid_has_its_certain_entries():
    problem = make_problem(Regime(shape=(96, 80), ranks=(2,) * 3, scale=0.02, dtype=torch.float32), seeded())
    base = problem.W_star.bfloat16()
    found = solve([(base.double() + M_i).float() for M_i in problem.deltas])
    assert found.result.grid == "bfloat16"
    assert found.certain is not None
    assert found.result.certain == pytest.approx(float(found.certain.double().mean()))
    assert found.weight.bfloat16()[found.certain].equal(base[found.certain])


def test_a_model_that_has_the_matrix_anew_is_left_out():
    problem = make_problem(Regime(shape=(96, 80), ranks=(3,) * 4, dtype=torch.float32), seeded())
    stack = [*problem.stack]
    stack[1] = normal(seeded(5), 96, 80).float()
    found = solve(stack)
    assert "without model 1 of the 4 used: full rank here" in found.result.reason
    assert found.result.ranks == (3, 80, 3, 3)
    assert problem.error(found.weight) < 1e-4


def test_vectors_and_integers_are_no_matrices():
    vector = solve([normal(seeded(seed), 7) for seed in range(3)])
    assert (vector.result.verdict, vector.result.shape) == (Verdict.AVERAGED, (7,))
    steps = solve([torch.tensor(step) for step in (3, 4, 5)])
    assert (steps.result.verdict, steps.result.method, int(steps.weight)) == (Verdict.NOT_DETERMINED, "single", 3)
    assert "not floating point" in steps.result.reason


def test_what_cannot_be_recovered_is_averaged_and_says_why():
    tensors = [normal(seeded(seed), 40, 40).float() for seed in range(3)]
    found = solve(tensors)
    assert (found.result.verdict, found.result.method) == (Verdict.NOT_DETERMINED, "mean")
    assert "differ at full rank in a 40x40 matrix" in found.result.reason
    assert solve(tensors, Mean()).result.verdict is Verdict.AVERAGED
