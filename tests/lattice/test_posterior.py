"""The posterior of single entries against plain sums over all grid points."""

import math

import numpy as np
import pytest
import torch

from detune.lattice.entries import grid_of
from detune.lattice.posterior import SETTLED, sort, strip_of
from detune.numerics import float_grid
from tests.lattice.entries import GRID, REGIMES, Sample, all_points, found


def settled(sample: Sample, e: int, grid: torch.dtype | None) -> tuple[bool, float, float]:
    """Whether one grid point alone is possible by five deviations, which, and how far inside all intervals it lies."""
    low, high, m, v = sample.at(e)
    strip, memory = strip_of(len(low), 1), np.empty((2, 1))
    strip.low[:, 0], strip.high[:, 0], strip.mean[:, 0], strip.variance[:, 0] = low, high, m, v
    sort(strip, 5.0, 0.0, 0.0, grid_of(grid), *memory)
    W = float(strip.W[0])
    return bool(strip.kind[0] == SETTLED), W, min(W - float((low - m).max()), float((high - m).min()) - W)


class TestEntry:
    @pytest.mark.parametrize(("n", "std", "merge"), REGIMES, ids=str)
    def test_equals_the_sum_over_all_grid_points(self, n, std, merge):
        sample = Sample.draw(n, std, merge)
        discrete = 0
        for e, W in enumerate(sample.W):
            one = found(sample, e)
            if one.doubt == 1:
                continue
            discrete += 1
            other, deviation, step = sample.by_sum(e, all_points(W)), np.sqrt(sample.v[e]), sample.step[e]
            # Four deviations to each side leave out 6e-5 of each model.
            assert one.doubt == pytest.approx(other.doubt, abs=3e-3)
            if other.doubt < 0.4:
                assert one.weight == other.weight
                assert one.error == pytest.approx(other.error, abs=0.02 * step**2)
            assert np.abs(one.shift - other.shift).max() < 0.05 * deviation.max()
            assert np.abs(one.left - other.left).max() < 0.05 * sample.v[e].max()
            # What is lost as W is not known, as a share of what would be known.
            assert np.abs(one.pull**2 - other.pull**2).max() < 0.05 * sample.v[e].max()
        assert discrete > 0.9 * len(sample.W)

    @pytest.mark.parametrize(("n", "std"), [(1, 2.0), (1, 6.0), (2, 5.0)])
    def test_among_many_points_w_is_as_good_as_continuous(self, n, std):
        sample = Sample.draw(n, std, torch.float32)
        open_ = 0
        for e, W in enumerate(sample.W):
            one, deviation = found(sample, e), np.sqrt(sample.v[e])
            # At a power of two points lie closer on one side, and for once not every number is as likely.
            if one.doubt < 1 or not 0.6 < math.frexp(abs(W))[0] < 0.9 or abs(W) < 0.5:
                continue
            open_ += 1
            other = sample.by_sum(e, all_points(W, 200))
            assert float_grid.lies_on(torch.tensor(one.weight, dtype=torch.float64), GRID)
            assert np.abs(one.shift - other.shift).max() < 0.05 * deviation.max()
            assert np.abs(one.left - other.left).max() < 0.05 * sample.v[e].max()
        assert open_ > 0.2 * len(sample.W)

    @pytest.mark.parametrize(
        ("n", "std", "merge"), [(1, 0.5, torch.bfloat16), (2, 1.0, torch.float16), (3, 3.0, torch.bfloat16)]
    )
    def test_without_a_grid_w_is_any_number(self, n, std, merge):
        sample = Sample.draw(n, std, merge, off=True)
        answers = [found(sample, e, None) for e in range(len(sample.W))]
        assert all(answer.doubt == 1 for answer in answers)
        errors = [
            ((answer.weight - W) / step) ** 2 for answer, W, step in zip(answers, sample.W, sample.step, strict=True)
        ]
        claimed = [answer.error / step**2 for answer, step in zip(answers, sample.step, strict=True)]
        assert np.mean(errors) == pytest.approx(np.mean(claimed), rel=0.3)
        for e, one in enumerate(answers[:30]):
            deviation = np.sqrt(sample.v[e])
            nodes = sample.W[e] + 8 * max(1.0, std) * sample.step[e] * np.linspace(-1, 1, 801)
            other = sample.by_sum(e, nodes)
            assert one.weight == pytest.approx(
                nodes @ other.likelihoods / other.likelihoods.sum(), abs=0.02 * sample.step[e]
            )
            assert np.abs(one.shift - other.shift).max() < 0.1 * deviation.max()
            assert np.abs(one.left - other.left).max() < 0.1 * sample.v[e].max()
            assert np.abs(one.pull - other.pull).max() < 0.1 * deviation.max()

    def test_doubts_are_probabilities(self):
        """As many weights are wrong as the doubts add up to."""
        doubts, wrong = [], []
        for seed in range(5):
            sample = Sample.draw(1, 0.25, torch.float32, seed)
            answers = [found(sample, e) for e in range(len(sample.W))]
            doubts += [answer.doubt for answer in answers]
            wrong += [answer.weight != W for answer, W in zip(answers, sample.W, strict=True)]
        doubt, wrong = np.array(doubts), np.array(wrong)
        for low, high in ((0, 0.02), (0.02, 0.2), (0.2, 0.6)):
            chosen = (doubt >= low) & (doubt < high)
            expected = doubt[chosen].sum()
            assert wrong[chosen].sum() == pytest.approx(expected, abs=4 * math.sqrt(expected))

    def test_models_that_contradict_each_other_leave_their_mean(self):
        ends, little = np.array([0.0, 1.0]), np.full(2, 1e-6)
        sample = Sample(np.array([0.55]), *(part[None] for part in (ends, ends, ends + 0.1, 0 * ends, little)))
        answer = found(sample, 0)
        assert answer.weight == pytest.approx(0.55, abs=2**-9)
        assert np.isfinite([*answer.shift, *answer.left, *answer.pull]).all()


class TestSettled:
    @pytest.mark.parametrize(("n", "merge"), [(1, torch.float32), (3, torch.bfloat16), (2, torch.float16)], ids=str)
    def test_one_point_alone_is_the_base(self, n, merge):
        sample, alone_ones = Sample.draw(n, 1e-6, merge, entries=1000), 0
        for e, W in enumerate(sample.W):
            low, high, m, v = sample.at(e)
            alone, point, inside = settled(sample, e, GRID)
            ends = float((low - m).max()), float((high - m).min())
            others = [
                g for g in all_points(W) if ends[0] - 5 * math.sqrt(v.max()) < g < ends[1] + 5 * math.sqrt(v.max())
            ]
            if alone:
                alone_ones += 1
                assert others == [point] == [W]
                assert inside == min(point - ends[0], ends[1] - point)
            else:
                # At a power of two, and next to an end, one point may not be told to be alone.
                assert len(others) > 1 or inside < 0 or len(others) == 0 or math.frexp(W)[0] == 0.5
        assert alone_ones > 0.1 * len(sample.W)

    def test_never_without_a_grid(self):
        assert not settled(Sample.draw(3, 1e-6, torch.bfloat16), 0, None)[0]
