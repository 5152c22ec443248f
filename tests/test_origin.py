"""Where a weight comes from, whatever its method is called."""

from dataclasses import replace

import pytest

from detune.methods import Auto, Intersect, Mean, SHiRA, Single, Spectral
from detune.origin import Origin
from detune.problem import Stack
from tests.cases import normal, seeded

W_STAR = normal(seeded(1), 24, 20)
STACK = Stack.of([W_STAR + normal(seeded(i), 24, 2) @ normal(seeded(-i), 2, 20) for i in range(2, 5)])


@pytest.mark.parametrize(
    ("solver", "origin"),
    [
        (Mean(), Origin.MEAN),
        (Single(), Origin.SINGLE),
        (Spectral(iterations=2), Origin.SOLVED),
        (Intersect(), Origin.SOLVED),
        (Auto(), Origin.SOLVED),
    ],
    ids=lambda value: str(value) if isinstance(value, Origin) else type(value).__name__.lower(),
)
def test_an_answer_says_where_it_comes_from(solver, origin):
    assert solver.solve(STACK).origin is origin


def test_a_matrix_that_models_left_alone_is_nobodys_solution():
    stack = Stack.of([W_STAR, W_STAR, *STACK.matrices])
    found = Auto().solve(stack)
    assert found.origin is Origin.UNCHANGED
    assert found.left_alone
    assert not SHiRA().solve(Stack.of([W_STAR] * 3)).left_alone


def test_the_origin_stays_when_the_answer_is_scaled():
    assert Mean().solve(STACK).times_power_of_two(3).origin is Origin.MEAN
    assert replace(Mean().solve(STACK), mse_exponent=1).with_plain_errors().origin is Origin.MEAN


def test_what_is_meant_to_be_the_base():
    assert {origin for origin in Origin if origin.is_base} == {Origin.SOLVED, Origin.DENOISED, Origin.UNCHANGED}
