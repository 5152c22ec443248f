"""The way to a solver and back."""

import torch

from detune.methods import Mean
from detune.problem import Stack
from detune.problem.solving import Prepared, outliers_of, solve, told_by_others
from tests.cases import normal, seeded


def models(exponent: int = 0, outlier: bool = False) -> Stack:
    W = normal(seeded(), 40, 30)
    matrices = [(W + 0.01 * normal(seeded(i), 40, 1) @ normal(seeded(9 + i), 1, 30)) * 2.0**exponent for i in range(3)]
    if outlier:
        matrices[1][3, 4] = 2.0**exponent * 1e9
    return Stack.of(matrices)


def test_ordinary_stacks_are_solved_as_they_are():
    stack = models()
    prepared = Prepared.of(stack)
    assert prepared.stack is stack
    assert prepared.outliers is None
    assert prepared.foretold(lambda part: ()) is prepared


def test_answers_are_of_the_models_scale():
    small = solve(Mean(), models(-500))
    assert small.weight.equal(solve(Mean(), models()).weight * 2.0**-500)


def test_an_outlier_does_not_reach_the_answer():
    clean, damaged = solve(Mean(), models()), solve(Mean(), models(outlier=True))
    assert float((clean.weight - damaged.weight).abs().max()) < 0.1
    assert outliers_of(models()) == ""
    assert "model 1" in outliers_of(models(outlier=True))
    assert "b" in outliers_of(models(outlier=True), ["a", "b", "c"])


def test_as_solved_undoes_what_restored_does():
    stack = models(-500, outlier=True)
    prepared = Prepared.of(stack).foretold(lambda part: ())
    found = Mean().solve(prepared.stack)
    again, recovery = prepared.as_solved(prepared.restored(found))
    assert again.matrices[0].equal(prepared.stack.matrices[0])
    torch.testing.assert_close(recovery.weight, found.weight)


def test_what_is_only_looked_at_has_the_others_entries_in_place_of_outliers():
    told = told_by_others(models(outlier=True))
    assert float(told.matrices[1].abs().max()) < 10
