"""Numbers of values in their order, against numpy's neighbours."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detune.metrics import from_ordered_bits, ordered_bits, ulps

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_neighbours_differ_by_one(value):
    above = np.nextafter(np.float32(value), np.float32(np.inf))
    pair = torch.tensor([value, float(above)], dtype=torch.float32)
    low, high = ordered_bits(pair).tolist()
    # numpy takes the two zeros for one: 0 comes after -0, and -0 before 0.
    over_a_zero = np.signbit(value) and above >= 0
    assert high - low == (2 if over_a_zero else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_comes_back(dtype):
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    patterns = torch.randint(torch.iinfo(integer).min, torch.iinfo(integer).max, (999,), dtype=integer)
    again = from_ordered_bits(ordered_bits(patterns.view(dtype)), dtype)
    assert torch.equal(again.view(integer), patterns)


def test_what_is_no_float_keeps_its_bits():
    numbers = torch.tensor([-3, 0, 7])
    assert torch.equal(ordered_bits(numbers), numbers)
    assert torch.equal(from_ordered_bits(numbers, torch.int64), numbers)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_distances_across_zero_and_powers_of_two(dtype):
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    got = torch.tensor([1 + eps, 1 - eps, -tiny, 2.0], dtype=dtype)
    expected = torch.tensor([1, 1, tiny, 1], dtype=dtype)
    # Below one the steps are half as wide; between -tiny and tiny lie -0 and 0; one binade has 1 / eps steps.
    assert ulps(got, expected).tolist() == [1, 2, 3, round(1 / eps)]


def test_more_steps_than_can_be_counted():
    far = torch.tensor([1e300, -1e300, 1.0], dtype=torch.float64)
    assert ulps(far, -far).tolist()[:2] == [2**63 - 1] * 2
    assert ulps(far, far + torch.tensor([0, 0, 2.0**-52])).tolist() == [0, 0, 1]


def test_values_are_compared_in_the_expected_dtype():
    assert ulps(torch.tensor([1.001]), torch.tensor([1.0], dtype=torch.bfloat16)).tolist() == [0]
