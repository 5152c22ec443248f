"""The average, and what it says of itself."""

import torch

from detune.methods import Mean
from detune.problem import Stack
from tests.cases import Regime, make_problem, seeded


def test_is_the_mean_with_what_the_deltas_share_left_in():
    problem = make_problem(Regime(), seeded())
    recovery = Mean().solve(Stack.of(problem.stack))
    torch.testing.assert_close(recovery.weight, problem.W_star + torch.stack(problem.deltas).mean(dim=0))
    assert recovery.relative_residual == 1.0
    assert recovery.reason == "the average of 3 models; no deltas were split off"


def test_of_one_model_it_is_that_model():
    W_i = make_problem(Regime(), seeded()).stack[0]
    recovery = Mean().solve(Stack.of([W_i]))
    assert recovery.weight.equal(W_i)
    assert recovery.relative_residual == 0.0
