"""Frozen factors from a seed."""

import pytest
import torch

from detune.methods.vera import Frozen, VeRA, draw_factors, expected_mse
from detune.metrics import w_error
from detune.problem import NotRecoverable, Stack
from tests.cases import Regime, make_problem, normal, seeded

REGIME = Regime(frozen=0, ranks=(6, 6, 6), dtype=torch.float32)


def test_factors_of_a_smaller_layer_are_a_part_of_the_largest_layers():
    largest = draw_factors((40, 30), 4, seed=3)
    A, B = draw_factors((20, 25), 4, seed=3, largest=(40, 30))
    assert A.equal(largest[0][:, :25])
    assert B.equal(largest[1][:20])
    assert not draw_factors((40, 30), 4, seed=4)[0].equal(largest[0])


def test_factors_have_the_variance_of_their_fan_in():
    A, B = draw_factors((300, 200), 50, seed=0)
    assert float(A.var()) == pytest.approx(2 / 200, rel=0.05)
    assert float(B.var()) == pytest.approx(2 / 50, rel=0.05)


def test_the_deltas_scale_the_factors_of_the_seed():
    problem = make_problem(REGIME, seeded())
    recovery = VeRA().solve(Stack.of(problem.stack))
    A, B = draw_factors(problem.W_star.shape, 6, 0)
    for M_i in recovery.deltas:
        assert isinstance(M_i, Frozen)
        torch.testing.assert_close(M_i.dense(), (M_i.b[:, None] * B * M_i.c) @ A)
        torch.testing.assert_close(M_i.times_power_of_two(-3).dense() * 8, M_i.dense())


def test_the_expected_error_is_the_true_one():
    problem = make_problem(REGIME, seeded())
    stack = Stack.of(problem.stack)
    recovery = VeRA().solve(stack)
    expected = torch.tensor(expected_mse(stack, recovery)).log10()
    assert w_error(recovery.weight, problem.W_star) == pytest.approx(float(expected), abs=0.15)


def test_another_seed_is_refused():
    stack = Stack.of(make_problem(REGIME, seeded()).stack)
    with pytest.raises(NotRecoverable, match=r"differ outside of the row space of VeRA's A; of seed 1, rank 6 and lay"):
        VeRA(seed=1).solve(stack, 6)


def test_the_rank_cannot_be_told_from_full_ranks():
    stack = Stack.of([normal(seeded(i), 40, 30) for i in range(3)])
    with pytest.raises(NotRecoverable, match=r"VeRA's rank cannot be told from that; give it: --rank"):
        VeRA().solve(stack)
