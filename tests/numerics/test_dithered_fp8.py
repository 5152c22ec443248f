"""Stochastic rounding to fp8, and the interval that it leaves once the dither is known."""

import pytest
import torch

from detune.numerics.dithered_fp8 import fp8_grid_of, fp8_interval, fp8_stochastic, named_dither
from detune.numerics.float_grid import lies_on, spacing
from tests.cases import normal, seeded

GRIDS = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.fixture(params=GRIDS, ids=str)
def grid(request):
    return request.param


def numbers(grid: torch.dtype) -> torch.Tensor:
    """Ordinary ones, tiny ones, powers of two and their neighbours, zeros of both signs, and too large ones."""
    generator = seeded(0)
    powers = 2.0 ** torch.arange(-12, 8, dtype=torch.float64)
    beside = torch.cat([powers, powers * (1 + 2**-9), powers * (1 - 2**-10)])
    limits = torch.finfo(grid)
    extremes = torch.tensor([0.0, -0.0, limits.max, 1.5 * limits.max, limits.smallest_normal], dtype=torch.float64)
    return torch.cat([0.1 * normal(generator, 4000), 1e-3 * normal(generator, 4000), beside, -beside, extremes])


def test_values_are_points_beside_the_number(grid):
    x = numbers(grid)
    rounded = fp8_stochastic(x, named_dither("a", x.shape), grid)
    assert lies_on(rounded, grid)
    inside = x.abs() <= torch.finfo(grid).max
    assert bool(((rounded - x).abs() <= spacing(rounded, grid))[inside].all())
    assert bool((rounded.abs() == torch.finfo(grid).max)[~inside].all())


def test_points_of_the_grid_stay(grid):
    x = numbers(grid).to(grid).double()
    x = x[x.isfinite()]
    assert torch.equal(fp8_stochastic(x, named_dither("a", x.shape), grid), x)


def test_it_is_right_on_average(grid):
    x = (0.1 * normal(seeded(1), 200)).half().double()
    dithers = (torch.arange(256, dtype=torch.float64) / 256)[:, None].expand(256, 200)
    mean = fp8_stochastic(x.expand(256, 200), dithers, grid).mean(dim=0)
    torch.testing.assert_close(mean, x, rtol=0, atol=float(spacing(x, grid).max()) / 256)


def test_every_number_is_in_its_interval_and_that_is_a_step_wide(grid):
    x = numbers(grid)
    dither = named_dither("a", x.shape)
    stored = fp8_stochastic(x, dither, grid)
    found = fp8_interval(stored.float(), dither, grid)
    within = x.abs() <= torch.finfo(torch.float16).max
    assert bool(((found.low <= x) & (x <= found.high))[within].all())
    ordinary = stored.abs() < torch.finfo(grid).max
    steps = ((found.high - found.low) / spacing(stored, grid))[ordinary]
    # float16, which comes first, has 128 and 256 steps in one.
    assert float(steps.max()) < 1 + 2 / 128
    assert float(steps.median()) > 0.9


def test_numbers_outside_the_interval_are_rounded_to_another_point(grid):
    stored = (0.1 * normal(seeded(2), 3000)).to(grid).double()
    dither = named_dither("b", stored.shape)
    found = fp8_interval(stored, dither, grid)
    for end, side in ((found.low, -1), (found.high, 1)):
        beyond = end + side * 1e-3 * spacing(stored, grid)
        # An interval next to zero ends there, whatever the sign beyond.
        kept = stored.abs() > spacing(stored, grid)
        assert not bool((fp8_stochastic(beyond, dither, grid) == stored)[kept].any())


def test_the_dither_is_known_by_its_name_and_uniform():
    one = named_dither("layer.0.weight", (300, 200))
    assert torch.equal(one, named_dither("layer.0.weight", (300, 200)))
    assert not torch.equal(one, named_dither("layer.1.weight", (300, 200)))
    assert float(one.min()) == 0
    assert float(one.max()) == 255 / 256
    assert float(one.mean()) == pytest.approx(0.5, abs=0.01)


def test_the_grid_is_found(grid):
    x = 0.1 * normal(seeded(3), 1000)
    assert fp8_grid_of(x.to(grid).float()) is grid
    assert fp8_grid_of(x) is None
