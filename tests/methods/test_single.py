"""One model as it is."""

import pytest

from detune.methods import Single
from detune.problem import Stack
from tests.cases import Regime, make_problem, seeded


@pytest.mark.parametrize("index", [0, 2])
def test_is_a_copy_of_the_model_that_was_chosen(index):
    models = make_problem(Regime(), seeded()).stack
    recovery = Single(index).solve(Stack.of(models))
    assert recovery.weight.equal(models[index])
    assert recovery.weight.data_ptr() != models[index].data_ptr()
    assert recovery.reason == f"model {index} as it is"
