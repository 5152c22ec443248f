"""Independent models are told by how well their adapters' spaces are told apart."""

import pytest

from detune.fitting.differences import find_differences
from detune.fitting.separation import Chosen, well_separated
from detune.problem import Stack
from tests.cases import normal, seeded

SHAPE = (64, 56)


def chooser(W_star, deltas):
    stack = Stack.of([W_star + M_i for M_i in deltas])
    asked = []

    def choose(models):
        asked.append(models)
        return Chosen(models, find_differences(stack.part(models)))

    return choose, asked


def drawn(seed):
    generator = seeded(seed)
    a, b, c, d = (normal(generator, SHAPE[0], r) @ normal(generator, r, SHAPE[1]) / 100 for r in (2, 3, 1, 2))
    return normal(generator, *SHAPE), a, b, c, d


@pytest.mark.parametrize("seed", range(3))
def test_independent_models_are_taken_as_they_are(seed):
    W_star, *deltas = drawn(seed)
    choose, asked = chooser(W_star, deltas)
    found = well_separated(4, (0, 1, 2, 3), choose)
    assert found.models == (0, 1, 2, 3)
    assert found.separation > 0.5
    assert len(asked) == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("models", [(0, 1, 2, 3), (0, 1, 3)], ids=str)
def test_not_both_of_two_that_have_a_part_in_common(models, seed):
    W_star, a, b, c, d = drawn(seed)
    choose, _ = chooser(W_star, [a, b, c, a / 2 + d])
    assert choose(models).separation < 0.1
    found = well_separated(4, models, choose)
    assert len(found.models) == 3
    assert not {0, 3} <= set(found.models)


def test_the_models_remain_where_no_others_are_told_apart_better():
    W_star, a, *_ = drawn(0)
    choose, asked = chooser(W_star, [a, 2 * a, 3 * a, 5 * a])
    assert well_separated(4, (0, 1, 2, 3), choose).models == (0, 1, 2, 3)
    assert len(asked) == 5
