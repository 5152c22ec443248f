"""The compiled loops against plain transcriptions: quadrature, sums over all grid points, dense linear algebra."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from detune.lattice import kernels
from detune.lattice.entries import grid_of
from detune.lattice.kernels import NODES, Known, decode, entry, intervals, log_ratios, measure, settled
from detune.numerics import float_grid

GRID = torch.bfloat16
POINTS, WEIGHTS = np.polynomial.legendre.leggauss(100)


def truncated(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probability, mean and variance of `N(0, 1)` between a and b, by Gauss-Legendre quadrature.

    The density is taken relative to its largest value, over the part that holds the mass.
    """
    a, b = np.broadcast_arrays(a, b)
    peak = np.clip(0.0, a, b)
    reach = np.minimum(12.0, 40 / np.maximum(1e-3, np.abs(peak)))
    a, b = np.maximum(a, peak - reach)[..., None], np.minimum(b, peak + reach)[..., None]
    t = a - peak[..., None] + (b - a) * (POINTS + 1) / 2
    mass = WEIGHTS * (b - a) / 2 * np.exp(-t * (t / 2 + peak[..., None]))
    total = mass.sum(axis=-1)
    mean = (mass * t).sum(axis=-1) / total
    variance = (mass * (t - mean[..., None]) ** 2).sum(axis=-1) / total
    return total * np.exp(-(peak**2) / 2) / math.sqrt(2 * math.pi), peak + mean, variance


class TestTruncatedNormal:
    @given(st.floats(-87, 0))
    def test_exponential(self, x):
        assert kernels.exp(x) == pytest.approx(math.exp(x), rel=1e-8)

    @given(st.floats(0, 1e6))
    def test_tail(self, z):
        assert kernels.tail(z) == pytest.approx(float(special.erfcx(z)), rel=1e-8)

    @pytest.mark.parametrize("sign", [-1, 1])
    @pytest.mark.parametrize("x", [0.0, 1e-3, 1.0, 7.0, 13.0])
    def test_edge(self, x, sign):
        density, beyond = kernels.edge(sign * x)
        assert density == pytest.approx(math.exp(-x * x / 2) / math.sqrt(2 * math.pi), rel=1e-7)
        assert beyond == pytest.approx(float(special.ndtr(-x)), rel=1e-7)

    @given(st.floats(-9, 9), st.floats(-6, 2))
    def test_moments(self, low, log10_width):
        width = 10**log10_width
        expected = truncated(np.array(low), np.array(low + width))
        found = kernels.truncated_normal(low, width)
        # Beyond nine deviations nothing is decided by what is left; see the next test.
        probability, mean, variance = map(float, expected)
        if low < 9 and low + width > -9:
            assert found[0] == pytest.approx(probability, rel=1e-5)
            assert found[1] == pytest.approx(mean, abs=1e-3 * math.sqrt(variance))
            assert found[2] == pytest.approx(variance, rel=0.01)

    @pytest.mark.parametrize("width", [1e-4, 0.02, 0.3, 1.0, 50.0])
    @pytest.mark.parametrize("distance", [9.5, 11.0, 13.5, 40.0, 1e5])
    def test_far_intervals_are_nearly_right_or_out_of_sight(self, distance, width):
        probability, mean, variance = kernels.truncated_normal(distance, width)
        expected = truncated(np.array(distance), np.array(distance + width))
        mirrored = kernels.truncated_normal(-distance - width, width)
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
        thin = kernels.THIN / max(1.0, abs(start) / 6)
        below, above = (kernels.truncated_normal(start, factor * thin) for factor in (0.9999, 1.0001))
        assert above[0] == pytest.approx(1.0002 * below[0], rel=1e-3)
        assert above[1] == pytest.approx(below[1], abs=1e-3 * thin)
        assert above[2] == pytest.approx(below[2], rel=0.01)

    def test_probabilities_of_a_partition_add_up_to_one(self):
        cuts = np.linspace(-9, 9, 401)
        found = np.array([kernels.truncated_normal(a, b - a) for a, b in pairwise(cuts)])
        assert found[:, 0].sum() == pytest.approx(1, abs=1e-7)
        assert (found[:, 0] * found[:, 1]).sum() == pytest.approx(0, abs=1e-7)
        assert (found[:, 0] * (found[:, 2] + found[:, 1] ** 2)).sum() == pytest.approx(1, abs=1e-4)


class TestGrid:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_intervals_are_the_numbers_that_round_to_the_stored_ones(self, dtype):
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

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @given(st.floats(-60000, 60000, width=32))
    def test_spacing_and_nearest(self, dtype, value):
        number = torch.tensor(value, dtype=torch.float64)
        step = kernels.spacing(value, *grid_of(dtype))
        assert step == float(float_grid.spacing(number, dtype))
        # Half a step away either neighbour is the nearest.
        assert abs(kernels.nearest(value, *grid_of(dtype)) - value) == abs(
            float(float_grid.nearest(number, dtype)) - value
        )


# --- single entries ---


@dataclass(frozen=True)
class Sample:
    """Entries of W, on the bf16 grid, and of models whose `M_i` are known up to `std` steps.

    Attributes:
        W: `(entries,)`.
        M: `(entries, n)`, as all others.
        low: Lower ends of the models' intervals.
        high: Upper ends.
        m: Means of the `M_i`.
        v: Variances.
    """

    W: np.ndarray
    M: np.ndarray
    low: np.ndarray
    high: np.ndarray
    m: np.ndarray
    v: np.ndarray

    @classmethod
    def draw(
        cls, n: int, std: float, merge: torch.dtype, seed: int = 0, entries: int = 200, off: bool = False
    ) -> "Sample":
        """Weights of one grid point or of none, `M_i` of about a step."""
        generator = np.random.default_rng(seed)
        W = torch.from_numpy(generator.normal(size=(entries, 1)))
        W = W if off else float_grid.nearest(W, GRID)
        step = float_grid.spacing(W, GRID).numpy()
        # The M_i are what the rest says up to float32, as in the fit.
        m = (step * generator.normal(size=(entries, n))).astype(np.float32).astype(np.float64)
        s = np.broadcast_to(std * step, m.shape)
        M = m + s * generator.normal(size=m.shape)
        ends = float_grid.interval((W + torch.from_numpy(M)).to(merge))
        return cls(W[:, 0].numpy(), M, ends.low.numpy(), ends.high.numpy(), m, s**2)

    @property
    def step(self) -> np.ndarray:
        return float_grid.spacing(torch.from_numpy(self.W), GRID).numpy()

    def at(self, e: int) -> tuple[np.ndarray, ...]:
        return self.low[e], self.high[e], self.m[e], self.v[e]

    def by_sum(self, e: int, points: np.ndarray, change: np.ndarray | float = 0.0) -> "Posterior":
        """Every point is as likely as the others; the `M_i` are expected to be off by `change`."""
        low, high, m, v = self.at(e)
        std = np.sqrt(v)
        a, b = ((end - points[:, None] - m - change) / std for end in (low, high))
        Z, mean, variance = truncated(a, b)
        likelihood = Z.prod(axis=1)
        p = likelihood / likelihood.sum()
        best = int(p.argmax())
        shift = p @ mean
        away = points - p @ points
        spread = float(p @ away**2)
        between = np.einsum("k,ki,kj->ij", p, mean - shift, mean - shift)
        return Posterior(
            points[best],
            1 - p[best],
            float(p @ (points - points[best]) ** 2),
            std * shift,
            v * (p @ variance) + v * np.diag(between),
            std * ((p * away) @ (mean - shift)) / math.sqrt(spread) if spread else 0 * std,
            std[:, None] * std * between,
            likelihood,
        )


@dataclass(frozen=True)
class Posterior:
    """One entry's posterior: as `entry` gives it, then the covariance of means between points and all likelihoods."""

    weight: float
    doubt: float
    error: float
    shift: np.ndarray
    left: np.ndarray
    pull: np.ndarray
    between: np.ndarray | None = None
    likelihoods: np.ndarray | None = None


def found(sample: Sample, e: int, grid: torch.dtype | None = GRID, least: float = 1.0) -> Posterior:
    n = sample.low.shape[1]
    shift, left, pull = np.empty(n), np.empty(n), np.empty(n)
    memory = np.empty((NODES, 2 + 2 * n)), np.empty((n, 3))
    W, doubt, error = entry(*sample.at(e), grid_of(grid), least, shift, left, pull, *memory)
    return Posterior(W, doubt, error, shift, left, pull)


def all_points(W: float, reach: int = 40) -> np.ndarray:
    """The bf16 numbers around W by their bit patterns: W's own spacing holds on neither side of a power of two."""
    pattern = int(torch.tensor(abs(W)).bfloat16().view(torch.int16))
    patterns = torch.arange(max(0, pattern - reach), pattern + reach + 1).to(torch.int16)
    return patterns.view(torch.bfloat16).double().numpy() * math.copysign(1, W)


REGIMES = [
    (1, 0.05, torch.float32),
    (1, 0.2, torch.float32),
    (1, 0.5, torch.float32),
    (2, 0.3, torch.float32),
    (3, 0.7, torch.float32),
    (1, 0.3, torch.bfloat16),
    (2, 0.2, torch.bfloat16),
    (3, 0.1, torch.bfloat16),
    (2, 0.3, torch.float16),
    (3, 0.02, torch.float16),
]


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
            alone, point, inside = settled(low, high, m, 5 * math.sqrt(v.max()), grid_of(GRID))
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
        assert not settled(np.array([1.0]), np.array([1.001]), np.zeros(1), 0.0, np.zeros(2))[0]


# --- whole blocks ---


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
            if (here.pull**2 / sample.v[e] / alone).sum() > kernels.MOST_PULL - 0.05:
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
        log_ratios(sample.low, sample.high, sample.m, sample.v, grid_of(grid), ratios)
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
            contaminated = math.log((1 - kernels.CONTAMINATED) * on / off + kernels.CONTAMINATED)
            assert ratios[e] == pytest.approx(contaminated, abs=0.05)
        assert compared > 25

    def test_no_entry_decides_alone(self):
        """A wild one, between two points, says no more against the grid than a constant."""
        wild = Sample.draw(1, 0.01, torch.float32, entries=1)
        ends = replace(wild, low=wild.low + wild.step / 2, high=wild.high + wild.step / 2)
        assert self.of(ends) == pytest.approx(math.log(kernels.CONTAMINATED))

    def test_points_too_many_to_tell_say_nothing(self):
        assert not self.of(Sample.draw(1, 40.0, torch.float32)).any()
