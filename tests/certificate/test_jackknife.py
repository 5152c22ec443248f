import math

import pytest
import torch

from detune.certificate.certify import Verdict, certify
from detune.certificate.jackknife import disagreement
from detune.methods import Auto, Mean
from detune.problem import Recovery, Stack
from tests.cases import Regime, make_problem, normal, rms, seeded


def average(stack: Stack) -> Recovery:
    return Mean().solve(stack)


@pytest.mark.parametrize("n", [4, 5, 6, 9])
def test_of_averages_is_the_variance_of_the_average(n):
    """Where it can be computed: n measurements with unit noise have an average with variance 1 / n."""
    stack = Stack.of(normal(seeded(), n, 200, 150))
    assert disagreement(stack, average) == pytest.approx(1 / n, rel=0.05)


def test_needs_more_than_three_models():
    assert disagreement(Stack.of(normal(seeded(), 3, 20, 15)), average) is None


def test_parts_that_cannot_be_solved_say_nothing():
    """Four models suffice where three have too few numbers."""
    problem = make_problem(Regime(shape=(24, 24), ranks=(11,) * 4, dtype=torch.float32), seeded())
    assert disagreement(Stack.of(problem.stack), lambda part: Auto(lattice=None).solve(part)) is None


@pytest.mark.parametrize("n", [4, 7])
def test_agrees_with_the_prediction_and_the_truth(n):
    regime = Regime(shape=(96, 96), ranks=(2,) * n, scale=1e-3, dtype=torch.float32)
    problem = make_problem(regime, seeded())
    stack, solver = Stack.of(problem.stack), Auto(lattice=None)
    recovery = solver.solve(stack)
    certificate = certify(stack, recovery, check=solver.solve)
    assert certificate.verdict is Verdict.FLOOR
    assert certificate.agreement == pytest.approx(certificate.predicted_w_error, abs=0.15)
    assert certificate.agreement == pytest.approx(2 * math.log10(rms(recovery.weight - problem.W_star)), abs=0.15)


def test_parts_that_disagree_are_a_doubt():
    problem = make_problem(Regime(ranks=(2,) * 6, scale=1e-3, dtype=torch.float32), seeded())
    stack = Stack.of(problem.stack)
    certificate = certify(stack, Auto(lattice=None).solve(stack), check=average)
    assert certificate.verdict is Verdict.APPROXIMATE
    assert "times as much as predicted" in certificate.reason
