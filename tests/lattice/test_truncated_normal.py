"""Functions that are inlined into the compiled loops, against quadrature, scipy and torch's own rounding."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from detune.lattice import truncated_normal
from detune.lattice.entries import grid_of
from detune.numerics import float_grid
from tests.lattice.entries import truncated


class TestCache:
    """Compiled code is kept between runs where it can be."""

    @pytest.mark.parametrize("failing", ["__init__", "save_overload", "load_overload"])
    def test_a_loop_runs_that_cannot_be_kept(self, monkeypatch, failing):
        def fail(*_: object) -> None:
            raise (RuntimeError if failing == "__init__" else OSError)("no space left")

        monkeypatch.setattr(truncated_normal.FunctionCache, failing, fail)
        assert truncated_normal.compiled(lambda x: x + 1.0)(2.0) == 3.0

    def test_a_loop_is_kept(self):
        assert isinstance(truncated_normal.spacing._cache, truncated_normal.FunctionCache)
        assert truncated_normal.spacing._cache._cache_file._source_stamp == truncated_normal.SOURCES


class TestTruncatedNormal:
    @given(st.floats(-87, 0))
    def test_exponential(self, x):
        assert truncated_normal.exp(x) == pytest.approx(math.exp(x), rel=1e-8)

    @given(st.floats(0, 1e6))
    def test_tail(self, z):
        assert truncated_normal.tail(z) == pytest.approx(float(special.erfcx(z)), rel=1e-8)

    @pytest.mark.parametrize("sign", [-1, 1])
    @pytest.mark.parametrize("x", [0.0, 1e-3, 1.0, 7.0, 13.0])
    def test_edge(self, x, sign):
        density, beyond = truncated_normal.edge(sign * x)
        assert density == pytest.approx(math.exp(-x * x / 2) / math.sqrt(2 * math.pi), rel=1e-7)
        assert beyond == pytest.approx(float(special.ndtr(-x)), rel=1e-7)

    @given(st.floats(-9, 9), st.floats(-6, 2))
    def test_moments(self, low, log10_width):
        width = 10**log10_width
        expected = truncated(np.array(low), np.array(low + width))
        found = truncated_normal.truncated_normal(low, low + width)
        # Beyond nine deviations nothing is decided by what is left; see the next test.
        probability, mean, variance = map(float, expected)
        if low < 9 and low + width > -9:
            assert found[0] == pytest.approx(probability, rel=1e-5)
            assert found[1] == pytest.approx(mean, abs=1e-3 * math.sqrt(variance))
            assert found[2] == pytest.approx(variance, rel=0.01)

    @pytest.mark.parametrize("width", [1e-4, 0.02, 0.3, 1.0, 50.0])
    @pytest.mark.parametrize("distance", [9.5, 11.0, 13.5, 40.0, 1e5])
    def test_far_intervals_are_nearly_right_or_out_of_sight(self, distance, width):
        probability, mean, variance = truncated_normal.truncated_normal(distance, distance + width)
        expected = truncated(np.array(distance), np.array(distance + width))
        mirrored = truncated_normal.truncated_normal(-distance - width, -distance)
        if probability:
            assert probability == pytest.approx(float(expected[0]), rel=1e-3)
            assert distance <= mean <= distance + width
            assert variance == pytest.approx(float(expected[2]), rel=0.03)
            assert mirrored == pytest.approx((probability, -mean, variance), rel=1e-4)
        else:
            assert float(expected[0]) < 1e-36
            assert mirrored[0] == 0

    @pytest.mark.parametrize("start", [-8.5, -6.5, -3.0, 0.0, 0.7, 5.0, 8.0])
    def test_no_jump_where_intervals_become_thin(self, start):
        thin = truncated_normal.THIN / max(1.0, abs(start) / 6)
        below, above = (truncated_normal.truncated_normal(start, start + factor * thin) for factor in (0.9999, 1.0001))
        assert above[0] == pytest.approx(1.0002 * below[0], rel=1e-3)
        assert above[1] == pytest.approx(below[1], abs=1e-3 * thin)
        assert above[2] == pytest.approx(below[2], rel=0.01)

    def test_probabilities_of_a_partition_add_up_to_one(self):
        cuts = np.linspace(-9, 9, 401)
        found = np.array([truncated_normal.truncated_normal(a, b) for a, b in pairwise(cuts)])
        assert found[:, 0].sum() == pytest.approx(1, abs=1e-7)
        assert (found[:, 0] * found[:, 1]).sum() == pytest.approx(0, abs=1e-7)
        assert (found[:, 0] * (found[:, 2] + found[:, 1] ** 2)).sum() == pytest.approx(1, abs=1e-4)


class TestGrid:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @given(st.floats(-60000, 60000, width=32))
    def test_spacing_and_nearest(self, dtype, value):
        number = torch.tensor(value, dtype=torch.float64)
        step = truncated_normal.spacing(value, *grid_of(dtype))
        assert step == float(float_grid.spacing(number, dtype))
        # Half a step away either neighbour is the nearest.
        assert abs(truncated_normal.nearest(value, *grid_of(dtype)) - value) == abs(
            float(float_grid.nearest(number, dtype)) - value
        )
