"""A grid's points are its dtype's bit patterns: neighbours are one apart, and casts round to the nearest."""

import math

import pytest
import torch
from torch import Tensor

from detune.numerics.float_grid import interval, lies_on, nearest, spacing, times_power_of_two
from tests.cases import normal, seeded

INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
# A cast from here rounds once; one from float64 to half precision goes by way of float32 and rounds twice.
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}

grids = pytest.mark.parametrize("grid", INTEGERS, ids=str)


def positive(grid: torch.dtype) -> Tensor:
    """Zero, subnormals, every power of two with its neighbours, and random points; all but the last finite one."""
    info = torch.finfo(grid)
    integer = INTEGERS[grid]
    last = int(torch.tensor(info.max, dtype=grid).view(integer))
    binade = int(torch.tensor(2.0, dtype=grid).view(integer)) - int(torch.tensor(1.0, dtype=grid).view(integer))
    powers = torch.arange(binade, last, binade)
    random = torch.randint(last, (500,), generator=seeded())
    patterns = torch.cat([torch.arange(5), powers - 1, powers, powers + 1, random]).unique()
    return patterns[patterns < last].to(integer).view(grid)


def above(points: Tensor) -> Tensor:
    """The next larger point of each, float64; of positive ones."""
    return (points.view(INTEGERS[points.dtype]) + 1).view(points.dtype).double()


def below(points: Tensor) -> Tensor:
    """The next smaller one."""
    smaller = (points.view(INTEGERS[points.dtype]) - 1).view(points.dtype).double()
    return torch.where(points == 0, -above(torch.zeros_like(points)), smaller)


@grids
class TestSpacing:
    def test_is_the_way_to_the_next_point(self, grid):
        points = positive(grid)
        step = above(points) - points.double()
        assert torch.equal(spacing(points, grid), step)
        assert torch.equal(spacing(-points, grid), step)

    def test_is_the_binades_between_the_points_too(self, grid):
        points = positive(grid)
        between = (points.double() + above(points)) / 2
        assert torch.equal(spacing(between, grid), spacing(points, grid))


@grids
class TestInterval:
    def test_ends_halfway_to_the_neighbours(self, grid):
        points = positive(grid)
        low, high = interval(points)
        assert torch.equal(low, (below(points) + points.double()) / 2)
        assert torch.equal(high, (points.double() + above(points)) / 2)

    def test_is_mirrored_with_the_sign(self, grid):
        points = positive(grid)
        low, high = interval(points)
        mirrored = interval(-points)
        assert torch.equal(mirrored.low, -high)
        assert torch.equal(mirrored.high, -low)

    def test_holds_what_a_cast_rounds_to_the_point_and_nothing_else(self, grid):
        points = torch.cat([positive(grid), -positive(grid)])
        low, high = (end.to(WIDER[grid]) for end in interval(points))
        up, down = torch.full_like(low, torch.inf), torch.full_like(low, -torch.inf)
        assert torch.equal(torch.nextafter(low, up).to(grid), points)
        assert torch.equal(torch.nextafter(high, down).to(grid), points)
        assert not (torch.nextafter(low, down).to(grid) == points).any()
        assert not (torch.nextafter(high, up).to(grid) == points).any()

    def test_holds_the_random_numbers_that_were_stored(self, grid):
        numbers = normal(seeded(1), 20_000) * torch.exp(3 * normal(seeded(2), 20_000))
        low, high = interval(numbers.to(WIDER[grid]).to(grid))
        assert ((low <= numbers.to(WIDER[grid])) & (numbers.to(WIDER[grid]) <= high)).all()


@grids
class TestNearest:
    def test_is_the_cast(self, grid):
        numbers = (normal(seeded(3), 20_000) * torch.exp(2 * normal(seeded(4), 20_000))).to(WIDER[grid])
        assert torch.equal(nearest(numbers, grid), numbers.to(grid).double())

    def test_breaks_ties_as_the_cast_does(self, grid):
        points = torch.cat([positive(grid), -positive(grid)])
        middle = interval(points).high
        assert torch.equal(nearest(middle, grid), middle.to(WIDER[grid]).to(grid).double())

    def test_leaves_points_alone(self, grid):
        points = torch.cat([positive(grid), -positive(grid)])
        assert torch.equal(nearest(points, grid), points.double())


@grids
class TestLiesOn:
    def test_sees_one_number_off_the_grid(self, grid):
        numbers = positive(grid).to(WIDER[grid])
        assert lies_on(numbers, grid)
        numbers[7] += spacing(numbers, grid)[7].to(numbers.dtype) / 4
        assert not lies_on(numbers, grid)

    def test_says_no_of_what_overflows_or_is_no_number(self, grid):
        largest = torch.tensor([torch.finfo(grid).max], dtype=torch.float64)
        assert lies_on(largest, grid)
        assert not lies_on(2 * largest, grid)
        assert not lies_on(torch.tensor([torch.nan]), grid)


def test_a_finer_grid_holds_the_coarser_of_its_exponents():
    """Not so bf16 and fp16: one has more exponents, the other more digits."""
    numbers = nearest(normal(seeded(5), 1000), torch.bfloat16)
    assert lies_on(numbers, torch.float32)
    assert not lies_on(nearest(numbers * 1.001, torch.float16), torch.bfloat16)
    assert not lies_on(numbers * 2.0**-20, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_times_a_power_that_has_no_float(dtype):
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    values = torch.tensor([smallest, 3 * smallest], dtype=dtype)
    exponent = -round(math.log2(smallest))
    assert times_power_of_two(values, exponent).tolist() == [1, 3]
    assert torch.equal(times_power_of_two(times_power_of_two(values, exponent), -exponent), values)
