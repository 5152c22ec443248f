"""The compiled loops against plain transcriptions: sums over all grid points, dense linear algebra."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pytest
import torch

from detune.lattice.entries import grid_of
from detune.lattice.kernels import (
    CONTAMINATED,
    MOST_PULL,
    Known,
    decode,
    intervals,
    log_ratios,
    measure,
    weigh,
)
from detune.numerics import float_grid
from tests.lattice.entries import GRID, REGIMES, Sample, all_points, found


class TestIntervals:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_are_the_numbers_that_round_to_the_stored_ones(self, dtype):
        """Every half-precision number; of float32 random ones, powers of two and numbers below the smallest normal."""
        if dtype.itemsize == 2:
            stored = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
        else:
            patterns = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, 1 << 16)
            powers = np.arange(256) << 23
            stored = torch.from_numpy(np.concatenate([patterns, powers, np.arange(-8, 8)]).astype(np.int32)).view(dtype)
        # The next number's place is beyond the largest one.
        stored = stored[stored.abs() < torch.finfo(dtype).max].view(1, 1, -1)
        expected = float_grid.interval(stored)
        low, high = np.empty(stored.shape), np.empty(stored.shape)
        intervals(stored.float().numpy(), grid_of(dtype)[None], low, high)
        np.testing.assert_array_equal(low, expected.low)
        np.testing.assert_array_equal(high, expected.high)


@dataclass(frozen=True)
class Block:
    """What the compiled loops take: `(n, rows, in)` entries and what is known of them."""

    low: np.ndarray
    high: np.ndarray
    m: np.ndarray
    known: Known

    @classmethod
    def of(cls, sample: Sample, own: float = 0.4) -> "Block":
        """One row of entries, of whose variances a share is the rows' own."""
        n = sample.m.shape[1]
        ones, columns = np.ones((n, 1)), np.ascontiguousarray(sample.v.T)
        known = Known(ones, (1 - own) * ones, columns, own * columns, np.zeros(n), grid_of(GRID))
        ends = (np.ascontiguousarray(end.T)[:, None] for end in (sample.low, sample.high))
        return cls(*ends, np.ascontiguousarray(sample.m.T)[:, None].astype(np.float32), known)

    def scaled(self, factor: float) -> "Block":
        known = self.known._replace(
            q_rows=self.known.q_rows * factor**2, p_rows=self.known.p_rows * factor**2, lack=self.known.lack * factor**2
        )
        return Block(self.low * factor, self.high * factor, self.m * np.float32(factor), known)

    @cached_property
    def variance(self) -> np.ndarray:
        k = self.known
        return (
            k.q_rows[:, :, None] * k.p_columns[:, None]
            + k.p_rows[:, :, None] * k.q_columns[:, None]
            + k.lack[:, None, None]
        )

    def measured(self, for_rows: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradient, precision and pull."""
        parts = tuple(np.empty(self.m.shape, dtype=np.float32) for _ in range(3))
        measure(self.low, self.high, self.m, self.known, for_rows, *parts)
        return parts

    def decoded(self, widened: float = 4.0, most_doubt: float = 1e-9) -> "Decoded":
        weight, certain = np.empty(self.m.shape[1:]), np.empty(self.m.shape[1:], dtype=np.bool_)
        n, rows, columns = self.m.shape
        wrong, strained = np.zeros(256), (np.zeros((n, rows)), np.zeros((n, columns)))
        sums = decode(self.low, self.high, self.m, self.known, widened, most_doubt, weight, certain, wrong, *strained)
        return Decoded(weight, certain, wrong, strained[0], strained[1], sums)


@dataclass(frozen=True)
class Decoded:
    """What `decode` fills in and returns."""

    weight: np.ndarray
    certain: np.ndarray
    wrong: np.ndarray
    strained_rows: np.ndarray
    strained_columns: np.ndarray
    sums: tuple[float, float, float]


class TestMeasure:
    @pytest.mark.parametrize(("n", "std", "merge"), REGIMES, ids=str)
    def test_is_the_slope_and_curvature_of_the_log_likelihood(self, n, std, merge):
        """By finite differences of its sum over all grid points, in units of what a known W would say of an `M_i`."""
        sample = Sample.draw(n, std, merge, entries=100)
        gradient, precision, pull = (part[:, 0].astype(np.float64) for part in Block.of(sample).measured())
        compared = 0
        for e, W in enumerate(sample.W):
            points, deviation = all_points(W), np.sqrt(sample.v[e])
            here = sample.by_sum(e, points)
            if found(sample, e).doubt == 1 or here.likelihoods.max() < 1e-25:
                continue

            def log_likelihood(x: np.ndarray, e: int = e, points: np.ndarray = points) -> float:
                return math.log(sample.by_sum(e, points, x).likelihoods.sum())

            steps, middle = 1e-3 * np.diag(deviation), log_likelihood(0 * deviation)
            around = [(log_likelihood(step), log_likelihood(-step)) for step in steps]
            slope = np.array([(up - down) / 2e-3 for up, down in around])
            # Points beyond four deviations are left out.
            assert np.abs(gradient[:, e] * deviation - slope).max() < 0.05
            curvature = np.array([2 * middle - up - down for up, down in around]) / 1e-6
            # Where the logarithm is convex its curvature is that of next to no information.
            alone = 1 - (here.left - here.pull**2) / sample.v[e]
            if (here.pull**2 / sample.v[e] / alone).sum() > MOST_PULL - 0.05:
                continue
            compared += 1
            found_curvature = np.diag(precision[:, e]) - np.outer(pull[:, e], pull[:, e])
            found_curvature *= np.outer(deviation, deviation)
            assert np.abs(np.diag(found_curvature) - curvature).max() < 0.05
            likely = np.sort(here.likelihoods)[::-1]
            if likely[2:].sum() < 1e-3 * likely.sum():
                # Two points leave one way for W to be open, and what models say of each other is of rank one.
                apart = -here.between / np.outer(deviation, deviation)
                assert np.abs((found_curvature - apart)[~np.eye(n, dtype=bool)]).max(initial=0) < 0.05
        assert compared > (0 if n == 1 else 40)

    @pytest.mark.parametrize("own", [0.1, 0.5, 0.9])
    @pytest.mark.parametrize(("n", "std", "merge"), REGIMES[2:9], ids=str)
    def test_for_rows_their_own_variance_is_no_noise(self, n, std, merge, own):
        """`K' = (K^-1 - diag(own))^-1`, and the gradient at m of what the entry says by itself is `K' K^-1 g`."""
        block = Block.of(Sample.draw(n, std, merge), own)
        gradient, precision, pull = (part[:, 0].astype(np.float64) for part in block.measured())
        found_gradient, found_precision, found_pull = (part[:, 0] for part in block.measured(for_rows=True))
        for e in range(gradient.shape[1]):
            K = np.diag(precision[:, e]) - np.outer(pull[:, e], pull[:, e])
            if not K.any():
                assert not found_precision[:, e].any()
                continue
            cavity = np.linalg.inv(np.linalg.inv(K) - np.diag(own * block.variance[:, 0, e]))
            expected = cavity @ np.linalg.solve(K, gradient[:, e])
            found_K = np.diag(found_precision[:, e]) - np.outer(found_pull[:, e], found_pull[:, e])
            scale = np.sqrt(np.outer(np.diag(cavity), np.diag(cavity)))
            assert np.abs((found_K - cavity) / scale).max() < 2e-3
            assert np.abs(found_gradient[:, e] - expected).max() <= 2e-3 * np.abs(expected).max()

    def test_nothing_is_said_where_one_point_lies_well_inside_all_intervals(self):
        block = Block.of(Sample.draw(3, 0.05, torch.bfloat16))
        gradient, precision, pull = (part[:, 0] for part in block.measured())
        silent = ~precision.any(axis=0)
        assert 0.02 < silent.mean() < 0.5
        assert not gradient[:, silent].any()
        assert not pull[:, silent].any()

    @pytest.mark.parametrize(("n", "std", "merge"), REGIMES, ids=str)
    def test_curvatures_are_positive(self, n, std, merge):
        for for_rows in (False, True):
            _, precision, pull = Block.of(Sample.draw(n, std, merge, entries=1000)).measured(for_rows)
            assert (precision >= 0).all()
            some = precision.all(axis=0)
            assert (pull[:, some].astype(float) ** 2 / precision[:, some]).sum(axis=0).max() < 1


class TestDecode:
    @pytest.mark.parametrize(("n", "std", "merge"), REGIMES, ids=str)
    def test_is_the_most_likely_point(self, n, std, merge):
        sample = Sample.draw(n, std, merge)
        answer = Block.of(sample).decoded()
        for e, W in enumerate(answer.weight[0]):
            one = found(sample, e)
            # A point that is alone is not weighed against others.
            assert one.weight == W or (answer.certain[0, e] and sample.W[e] == W)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize(("n", "std", "merge"), REGIMES, ids=str)
    def test_nothing_certain_is_wrong(self, n, std, merge, seed):
        sample = Sample.draw(n, std, merge, seed, entries=5000)
        answer = Block.of(sample).decoded()
        assert not (answer.certain[0] & (answer.weight[0] != sample.W)).any()

    def test_some_entries_are_certain(self):
        assert Block.of(Sample.draw(3, 1e-3, torch.bfloat16)).decoded().certain.mean() > 0.5
        assert Block.of(Sample.draw(1, 0.03, torch.float32)).decoded().certain.all()

    @pytest.mark.parametrize(("n", "std", "merge"), [(1, 0.3, torch.float32), (3, 0.3, torch.bfloat16)], ids=str)
    def test_wrong_entries_are_as_many_as_expected_and_as_large(self, n, std, merge):
        sample = Sample.draw(n, std, merge, entries=20000)
        answer = Block.of(sample).decoded()
        off = answer.weight[0] - sample.W
        assert (off != 0).sum() == pytest.approx(answer.wrong.sum(), rel=0.1)
        squares = (answer.wrong * np.exp2(2 * (np.arange(256.0) - 127))).sum()
        assert (off**2).sum() == pytest.approx(squares, rel=0.2)

    def test_an_m_far_outside_its_interval_strains_its_row_and_column(self):
        block = Block.of(Sample.draw(3, 1e-3, torch.bfloat16))
        calm = block.decoded()
        wild = replace(block, m=block.m.copy())
        wild.m[1, 0, 7] += 40 * np.sqrt(block.variance[1, 0, 7]) + block.high[1, 0, 7] - block.low[1, 0, 7]
        found = wild.decoded()
        assert found.strained_columns[1, 7] > 100 + calm.strained_columns[1, 7]
        np.testing.assert_allclose(found.strained_rows[:, 0], found.strained_columns.sum(axis=1))
        others = np.delete(np.arange(200), 7)
        np.testing.assert_array_equal(found.strained_columns[:, others], calm.strained_columns[:, others])

    def test_without_a_grid_it_is_the_mean(self):
        sample = Sample.draw(3, 0.1, torch.bfloat16, entries=2000, off=True)
        block = Block.of(sample)
        answer = replace(block, known=block.known._replace(grid=np.zeros(2))).decoded()
        assert not answer.certain.any()
        assert answer.weight[0, 7] == found(sample, 7, None).weight
        assert ((answer.weight[0] - sample.W) ** 2).sum() == pytest.approx(answer.wrong[0], rel=0.2)
        assert not answer.wrong[1:].any()

    def test_sums_are_residual_rounding_and_spread(self):
        block = Block.of(Sample.draw(3, 0.1, torch.bfloat16))
        answer, middle = block.decoded(), (block.low + block.high) / 2
        expected = (
            ((middle - answer.weight - block.m) ** 2).sum(),
            ((block.high - block.low) ** 2 / 12).sum(),
            ((middle - middle.mean(axis=0)) ** 2).sum(),
        )
        assert answer.sums == pytest.approx(expected, rel=1e-9)


class TestScaling:
    """Powers of two change exponents alone: all answers keep every bit."""

    @pytest.mark.parametrize("factor", [2.0**-12, 0.5, 2.0**13])
    @pytest.mark.parametrize("for_rows", [False, True])
    @pytest.mark.parametrize(("n", "std", "merge"), REGIMES, ids=str)
    def test_measurements(self, n, std, merge, for_rows, factor):
        block = Block.of(Sample.draw(n, std, merge))
        gradient, precision, pull = block.measured(for_rows)
        scaled = block.scaled(factor).measured(for_rows)
        np.testing.assert_array_equal(scaled[0], gradient / np.float32(factor))
        np.testing.assert_array_equal(scaled[1], precision / np.float32(factor) ** 2)
        np.testing.assert_array_equal(scaled[2], pull / np.float32(factor))

    @pytest.mark.parametrize("factor", [2.0**-12, 0.5, 2.0**13])
    @pytest.mark.parametrize(("n", "std", "merge"), REGIMES, ids=str)
    def test_answers(self, n, std, merge, factor):
        block = Block.of(Sample.draw(n, std, merge))
        answer, scaled = block.decoded(), block.scaled(factor).decoded()
        np.testing.assert_array_equal(scaled.weight, answer.weight * factor)
        np.testing.assert_array_equal(scaled.certain, answer.certain)
        np.testing.assert_array_equal(scaled.wrong, np.roll(answer.wrong, round(math.log2(factor))))
        assert scaled.sums == tuple(part * factor**2 for part in answer.sums)

    @pytest.mark.parametrize(("n", "std", "merge"), REGIMES, ids=str)
    def test_signs(self, n, std, merge):
        """Halfway between two points another one is in the middle of those that are looked at."""
        block = Block.of(Sample.draw(n, std, merge))
        turned = Block(-block.high, -block.low, -block.m, block.known)
        gradient, precision, _ = block.measured()
        found_gradient, found_precision, _ = turned.measured()
        unit = np.sqrt(block.variance)
        np.testing.assert_allclose(-found_gradient * unit, gradient * unit, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found_precision * unit**2, precision * unit**2, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(turned.decoded().certain, block.decoded().certain)


class TestLogRatios:
    @staticmethod
    def of(sample: Sample, grid: torch.dtype = GRID) -> np.ndarray:
        ratios = np.empty(len(sample.W))
        log_ratios(sample.low.T, sample.high.T, sample.m.T, sample.v.T, grid_of(grid), ratios)
        return ratios

    @pytest.mark.parametrize(("n", "std", "merge"), REGIMES, ids=str)
    def test_off_the_grid_their_expectation_is_at_most_one(self, n, std, merge):
        """Across powers of two, too: next to these one step is half of the other."""
        generator = np.random.default_rng(0)
        W, m = generator.uniform(0.9, 2.3, (20000, 1)), generator.normal(size=(20000, n)) / 128
        s = np.full(m.shape, std / 128)
        ends = float_grid.interval(torch.from_numpy(W + m + s * generator.normal(size=m.shape)).to(merge))
        ratios = np.exp(self.of(Sample(W[:, 0], m, ends.low.numpy(), ends.high.numpy(), m, s**2)))
        assert ratios.mean() < 1 + 4 * ratios.std() / math.sqrt(len(ratios))

    @pytest.mark.parametrize(("n", "std", "merge"), [r for r in REGIMES if r[1] < 0.3 or r[:2] == (2, 0.3)], ids=str)
    def test_on_the_grid_they_add_up(self, n, std, merge):
        on, off = (self.of(Sample.draw(n, std, merge, entries=4000, off=off)) for off in (False, True))
        assert on.sum() > 10 > off.sum()

    def test_are_the_sum_over_grid_points_against_the_integral(self):
        sample = Sample.draw(2, 0.3, torch.bfloat16, entries=40)
        ratios = self.of(sample)
        compared = 0
        for e, W in enumerate(sample.W):
            points = all_points(W)
            nodes = W + 12 * sample.step[e] * np.linspace(-1, 1, 1201)
            # A point stands for the numbers that round to it.
            widths = np.subtract(*map(np.asarray, reversed(float_grid.interval(torch.from_numpy(points).to(GRID)))))
            on = (widths * sample.by_sum(e, points).likelihoods).sum()
            off = (nodes[1] - nodes[0]) * sample.by_sum(e, nodes).likelihoods.sum()
            if ratios[e] == 0 or off < 1e-6 * sample.step[e]:
                continue
            compared += 1
            contaminated = math.log((1 - CONTAMINATED) * on / off + CONTAMINATED)
            assert ratios[e] == pytest.approx(contaminated, abs=0.05)
        assert compared > 25

    def test_no_entry_decides_alone(self):
        """A wild one, between two points, says no more against the grid than a constant."""
        wild = Sample.draw(1, 0.01, torch.float32, entries=1)
        ends = replace(wild, low=wild.low + wild.step / 2, high=wild.high + wild.step / 2)
        assert self.of(ends) == pytest.approx(math.log(CONTAMINATED))

    def test_points_too_many_to_tell_say_nothing(self):
        assert not self.of(Sample.draw(1, 40.0, torch.float32)).any()


def test_weigh_is_a_product_with_a_diagonal_and_a_rank_one_matrix():
    generator = np.random.default_rng(0)
    precision, pull, y = generator.random((3, 4, 5, 6)).astype(np.float32)
    expected = precision * y - pull * (pull * y).sum(axis=0)
    weigh(precision, pull, y)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
