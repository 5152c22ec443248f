import math

import pytest
import torch

from detune.errors import InputError
from detune.metrics import activation_distance


def states(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_is_the_mean_of_one_minus_cosine_over_inputs_then_layers():
    first, second = states(0, (3, 4, 5), (2, 6)), states(1, (3, 4, 5), (2, 6))
    layers = [
        (1 - torch.cosine_similarity(u.double().flatten(1), v.double().flatten(1))).mean()
        for u, v in zip(first, second, strict=True)
    ]
    assert activation_distance(first, second) == pytest.approx(float(sum(layers)) / 2, rel=1e-12)


def test_equal_states_are_at_distance_zero_and_opposite_ones_at_two():
    same = states(0, (3, 7))
    assert activation_distance(same, same) == 0.0
    assert activation_distance(same, [-same[0]]) == pytest.approx(2.0)


def test_length_does_not_matter():
    first, second = states(0, (3, 7)), states(1, (3, 7))
    assert activation_distance([4 * first[0]], second) == pytest.approx(activation_distance(first, second))


@pytest.mark.parametrize("angle", [1e-3, 1e-8, 1e-12])
def test_tiny_distances_survive(angle):
    """One minus the cosine of 1e-12 is 5e-25; subtracted from 1 in float64, it would be 0."""
    first = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    second = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert activation_distance([first], [second]) == pytest.approx(2 * math.sin(angle / 2) ** 2, rel=1e-3)


def test_states_of_zeros_have_no_direction():
    zeros, ones = torch.zeros(1, 3), torch.ones(1, 3)
    assert activation_distance([zeros], [zeros]) == 0.0
    assert activation_distance([zeros], [ones]) == activation_distance([ones], [zeros]) == 1.0


def test_half_precision_is_compared_in_double():
    first = [state.bfloat16() for state in states(0, (3, 7))]
    assert activation_distance(first, [state.double() for state in first]) == 0.0


def test_states_that_are_not_numbers_give_none():
    broken = torch.full((1, 3), math.nan)
    assert math.isnan(activation_distance([torch.ones(1, 3)], [broken]))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([], []),
        ([(2, 3)], [(2, 3), (2, 3)]),
        ([(2, 3)], [(3, 3)]),
        ([(3,)], [(3,)]),
        ([(0, 3)], [(0, 3)]),
    ],
)
def test_states_that_cannot_be_compared(first, second):
    with pytest.raises(InputError, match=r"cannot be compared; got shapes \[.*\] and \[.*\], expected the same"):
        activation_distance([torch.ones(shape) for shape in first], [torch.ones(shape) for shape in second])
