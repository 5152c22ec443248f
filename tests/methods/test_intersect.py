"""The closed form as a method."""

import pytest

from detune.methods import Intersect
from detune.problem import NotRecoverable, Stack
from tests.cases import Regime, make_problem, seeded


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [
        ((40, 60), (17, 15, 17)),
        ((36, 60), (15, 15, 15)),
        ((60, 36), (15, 15, 15)),
        ((60, 60), (20, 20, 20)),
        ((60, 50), (10, 25, 15, 10)),
    ],
)
def test_solves_up_to_its_conditions(shape, ranks):
    problem = make_problem(Regime(shape=shape, ranks=ranks), seeded())
    recovery = Intersect().solve(Stack.of(problem.stack))
    assert recovery.ranks == ranks
    assert problem.error(recovery.weight) <= 1e-8


def test_two_models_are_not_enough():
    problem = make_problem(Regime(ranks=(4, 4)), seeded())
    with pytest.raises(NotRecoverable, match=r"2 models: a difference of two splits .* infinitely many ways; a third"):
        Intersect().solve(Stack.of(problem.stack))


def test_a_rank_given_too_low_is_an_approximation():
    problem = make_problem(Regime(ranks=(6, 6, 6), decay=5), seeded())
    recovery = Intersect().solve(Stack.of(problem.stack), 4)
    assert recovery.ranks == (4, 4, 4)
    assert recovery.noise_ratio > 100
