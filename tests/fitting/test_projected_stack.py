"""A stack in the coordinates of its joint column and row space."""

import torch

from detune.fitting.projected_stack import ProjectedStack
from detune.problem import Stack
from tests.cases import Regime, make_problem, seeded

FIVE = Regime(shape=(60, 48), ranks=(4,) * 5, scale=0.3)


def test_core_holds_all_that_differs():
    problem = make_problem(FIVE, seeded())
    core = ProjectedStack.of(Stack.of(problem.stack), 4)
    assert core is not None
    for side in (core.Q, core.P):
        torch.testing.assert_close(side.mT @ side, torch.eye(side.shape[1], dtype=side.dtype))
    for W_i, C_i in zip(problem.stack, core.cores, strict=True):
        torch.testing.assert_close(core.Q @ C_i @ core.P.mT, W_i - problem.stack.mean(dim=0), rtol=0, atol=1e-12)


def test_there_is_none_where_it_would_save_nothing():
    assert ProjectedStack.of(Stack.of(make_problem(FIVE, seeded()).stack), 9) is None
