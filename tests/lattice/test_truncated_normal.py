"""The moments against Gauss-Legendre quadrature, and across the limits beyond which asymptotes take over."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from detune.lattice import truncated_normal as truncated
from detune.lattice.truncated_normal import FAR, Moments, one_sided, truncated_normal

THIN = truncated.THIN[torch.float64]
NODES, WEIGHTS = map(torch.from_numpy, np.polynomial.legendre.leggauss(120))


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def standard(intervals: Sequence[tuple[float, float]]) -> Moments:
    return truncated_normal(numbers(*(a for a, _ in intervals)), numbers(*(b - a for a, b in intervals)))


def by_quadrature(a: float, b: float) -> Moments:
    """The definition, with the density relative to its largest value, over the part that holds the mass."""
    peak = min(max(0.0, a), b)
    reach = min(12.0, 40 / max(1e-3, abs(peak)))
    a, b = max(a, peak - reach), min(b, peak + reach)
    t = a - peak + (b - a) * (NODES + 1) / 2
    mass = WEIGHTS * (b - a) / 2 * torch.exp(-t * (t / 2 + peak))
    Z = mass.sum()
    mean = (mass * t).sum() / Z
    log_Z = Z.log() - peak**2 / 2 - math.log(2 * math.pi) / 2
    return Moments(log_Z, peak + mean, (mass * (t - mean).square()).sum() / Z)


ORDINARY = [
    (-1.0, 1.0),
    (-0.3, 2.0),
    (0.5, 0.7),
    (-5.0, -4.9),
    (-100.0, -1.0),
    (2.0, 100.0),
    (-40.0, 40.0),
    (-5.9, -5.8),
    (5.9, 7.0),
    (0.1, 0.1 + 2 * THIN),
    (5.5, 5.5 + 2 * THIN),
]


@pytest.mark.parametrize("ends", ORDINARY, ids=str)
def test_ordinary_intervals(ends):
    found, expected = standard([ends]), by_quadrature(*ends)
    assert float(found.log_probability) == pytest.approx(float(expected.log_probability), abs=1e-9)
    assert float(found.mean) == pytest.approx(float(expected.mean), rel=1e-9, abs=1e-9)
    assert float(found.variance) == pytest.approx(float(expected.variance), rel=1e-4)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("width", [0.002, 0.02, 0.2, 1.0, 1000.0])
@pytest.mark.parametrize("distance", [FAR + 0.01, 8.0, 20.0, 300.0])
def test_far_tails(distance, width, sign):
    """The asymptotic series' next terms are 1, 2 and 6 over the squared distance (Mills' ratio)."""
    ends = sorted((sign * distance, sign * (distance + width)))
    found, expected = standard([(ends[0], ends[1])]), by_quadrature(*ends)
    error = 1 / distance**2
    assert float(found.log_probability) == pytest.approx(float(expected.log_probability), abs=error, rel=1e-12)
    assert abs(float(found.mean) - sign * distance) == pytest.approx(
        abs(float(expected.mean) - sign * distance), rel=2 * error
    )
    assert float(found.variance) == pytest.approx(float(expected.variance), rel=6 * error)
    assert ends[0] < float(found.mean) < ends[1]


@pytest.mark.parametrize("place", [-30.0, -2.0, 0.0, 0.3, 5.0, 10.0])
def test_thin_intervals_are_points(place):
    """The density varies by a share of `|place| THIN` over them at most."""
    width = THIN / 10
    found = standard([(place - width / 2, place + width / 2)])
    log_density = -(place**2) / 2 - math.log(2 * math.pi) / 2
    assert float(found.log_probability) == pytest.approx(log_density + math.log(width), abs=1e-5)
    assert float(found.mean) == pytest.approx(place, abs=width / 100)
    assert float(found.variance) == pytest.approx(width**2 / 12, rel=1e-3)


@pytest.mark.parametrize("start", [-20.0, -6.5, -3.0, 0.0, 0.7, 5.0, 9.0])
def test_no_jump_where_intervals_become_thin(start):
    thinner, wider = standard([(start, start + 0.9999 * THIN)]), standard([(start, start + 1.0001 * THIN)])
    assert float(thinner.log_probability) == pytest.approx(float(wider.log_probability), abs=1e-3)
    assert float(thinner.mean) == pytest.approx(float(wider.mean), abs=THIN / 100)
    assert float(thinner.variance) == pytest.approx(float(wider.variance), rel=2e-3)


@pytest.mark.parametrize("width", [2 * THIN, 0.05, 0.5, 50.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_small_jump_where_tails_become_far(width, sign):
    near, far = (
        standard([(min(sign * d, sign * (d + width)), max(sign * d, sign * (d + width)))])
        for d in (FAR - 1e-6, FAR + 1e-6)
    )
    error = 1 / FAR**2
    assert float(near.log_probability) == pytest.approx(float(far.log_probability), abs=error)
    assert abs(float(near.mean)) - FAR == pytest.approx(abs(float(far.mean)) - FAR, rel=2 * error)
    assert float(near.variance) == pytest.approx(float(far.variance), rel=6 * error)


@pytest.mark.parametrize("width", [1e-4, 3e-3, 0.04, 0.06, 0.5, 3.0, 50.0])
@pytest.mark.parametrize("place", [-20.0, -5.5, -1.0, 0.0, 0.4, 3.0, 9.0])
def test_float32_agrees_with_float64(place, width):
    interval = numbers(place - width / 2).float(), numbers(width).float()
    found = truncated_normal(*interval)
    expected = truncated_normal(*(number.double() for number in interval))
    assert float(found.log_probability) == pytest.approx(float(expected.log_probability), abs=3e-3)
    deviation = float(expected.variance.sqrt())
    assert float(found.mean) == pytest.approx(float(expected.mean), abs=0.02 * deviation)
    assert float(found.variance) == pytest.approx(float(expected.variance), rel=0.02)


@pytest.mark.parametrize("x", [-30.0, -7.0, -1.0, 0.0, 0.5, 4.0, 20.0])
def test_one_sided_is_an_interval_without_another_end(x):
    below, less = one_sided(numbers(x))
    expected = by_quadrature(x - 60, x)
    assert -float(below) == pytest.approx(float(expected.mean), rel=1e-6, abs=1e-12)
    assert 1 - float(less) == pytest.approx(float(expected.variance), rel=1e-3)


def test_probabilities_of_a_partition_add_up_to_one():
    cuts = torch.linspace(-9, 9, 400, dtype=torch.float64)
    found = truncated_normal(cuts[:-1], cuts.diff())
    assert float(found.log_probability.exp().sum()) == pytest.approx(1, abs=1e-9)
    assert float((found.log_probability.exp() * found.mean).sum()) == pytest.approx(0, abs=1e-6)


def test_nothing_is_infinite_however_far():
    found = standard([(1e3, 1e3 + 1), (-1e6, -1e6 + 1e-9), (-1e6, -1e5), (-1e300, 1e300)])
    assert all(torch.isfinite(moment).all() for moment in found)
