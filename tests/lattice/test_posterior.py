"""The posterior of an entry against the sum over every point that it could be."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from detune.lattice.posterior import Posterior, feasible, log_evidence, posterior
from detune.lattice.truncated_normal import truncated_normal
from detune.numerics.float_grid import interval, lies_on, nearest, spacing
from tests.cases import normal, seeded

ENTRIES = 300
GRID = torch.bfloat16


@dataclass(frozen=True)
class Entries:
    """Entries of W, on the grid, and of models whose `M_i` are known up to `std` steps.

    Attributes:
        W: `(entries,)`.
        M: `(n, entries)`.
        low: Ends of the models' intervals, `(n, entries)`.
        high: The same.
        m: Means of the `M_i`.
        v: Variances.
    """

    W: Tensor
    M: Tensor
    low: Tensor
    high: Tensor
    m: Tensor
    v: Tensor

    @classmethod
    def draw(cls, n: int, std: float, merge: torch.dtype, seed: int = 0, binade: bool = False) -> "Entries":
        """In one binade all steps are alike."""
        generator = seeded(seed)
        W = normal(generator, ENTRIES)
        W = nearest(1.3 + 0.1 * W if binade else W, GRID)
        step = spacing(W, GRID)
        m = step * normal(generator, n, ENTRIES)
        s = (std * step).expand_as(m)
        M = m + s * normal(generator, n, ENTRIES)
        low, high = interval((W + M).to(merge))
        return cls(W, M, low, high, m, s.square())

    def find(self, grid: torch.dtype | None, least_reach: int = 0) -> Posterior:
        return posterior(self.low, self.high, self.m, self.v, grid, least_reach)

    def by_sum(self, points: Tensor) -> Posterior:
        """The sum over all `points`, `(candidates, entries)`, equally likely."""
        std = self.v.sqrt()
        parts = truncated_normal((self.low - points[:, None] - self.m) / std, (self.high - self.low) / std)
        p = torch.softmax(parts.log_probability.sum(dim=1), dim=0)
        weight = points.gather(0, p.argmax(dim=0, keepdim=True))[0]
        doubt = 1 - p.amax(dim=0)
        variance = (p * (points - weight).square()).sum(dim=0)
        delta = (p[:, None] * parts.mean).sum(dim=0)
        delta_variance = (p[:, None] * (parts.variance + (parts.mean - delta).square())).sum(dim=0)
        deviations = points - (p * points).sum(dim=0)
        pull = (p[:, None] * deviations[:, None] * parts.mean).sum(dim=0)
        pull /= (p * deviations.square()).sum(dim=0).sqrt().clamp(min=1e-300)
        return Posterior(weight, doubt, variance, self.m + std * delta, self.v * delta_variance, std * pull)

    def all_points(self, grid: torch.dtype, reach: int = 60) -> Tensor:
        """The grid around every entry, by bit patterns: W's own spacing holds on neither side of a power of two."""
        integer = torch.int16 if grid.itemsize == 2 else torch.int32
        patterns = self.W.to(grid).abs().view(integer) + torch.arange(-reach, reach + 1)[:, None].to(integer)
        return patterns.view(grid).double() * self.W.sign()


def worst(found: Tensor, expected: Tensor, unit: Tensor | float = 1.0) -> float:
    return float(((found - expected) / unit).abs().max())


CASES = [
    (1, 0.05, torch.float32),
    (1, 0.2, torch.float32),
    (1, 0.6, torch.float32),
    (2, 0.3, torch.float32),
    (3, 0.7, torch.float32),
    (1, 0.3, torch.bfloat16),
    (2, 0.2, torch.bfloat16),
    (3, 0.1, torch.bfloat16),
    (3, 0.02, torch.float16),
]


@pytest.mark.parametrize(("n", "std", "merge"), CASES, ids=str)
def test_equals_the_sum_over_all_grid_points(n, std, merge):
    entries = Entries.draw(n, std, merge)
    found, expected = entries.find(GRID, least_reach=1), entries.by_sum(entries.all_points(GRID))
    discrete = found.doubt < 1
    assert float(discrete.double().mean()) > 0.9
    step, deviation = spacing(entries.W, GRID), entries.v.sqrt()
    # Four deviations to each side leave out a share of 6e-5, of each model.
    assert worst(found.doubt[discrete], expected.doubt[discrete]) < 3e-3
    sure = (expected.doubt < 0.4) & discrete
    assert torch.equal(found.weight[sure], expected.weight[sure])
    assert worst(found.variance[sure], expected.variance[sure], step[sure].square()) < 0.02
    assert worst(found.delta[:, discrete], expected.delta[:, discrete], deviation[:, discrete]) < 0.05
    variance = found.delta_variance[:, discrete]
    assert worst(variance, expected.delta_variance[:, discrete], entries.v[:, discrete]) < 0.05
    # What is lost as W is not known, as a share of what would be known.
    lost = found.pull[:, discrete].square()
    assert worst(lost, expected.pull[:, discrete].square(), entries.v[:, discrete]) < 0.05


@pytest.mark.parametrize(("n", "std"), [(1, 2.0), (1, 6.0), (2, 5.0)])
def test_more_points_than_are_looked_at_are_as_good_as_continuous(n, std):
    entries = Entries.draw(n, std, torch.float32, binade=True)
    found, expected = entries.find(GRID), entries.by_sum(entries.all_points(GRID))
    continuous = found.doubt == 1
    assert float(continuous.double().mean()) > 0.9
    assert lies_on(found.weight, GRID)
    far = (entries.W - 1.5).abs() < 0.3
    chosen = continuous & far
    assert worst(found.delta[:, chosen], expected.delta[:, chosen], entries.v.sqrt()[:, chosen]) < 0.05
    assert worst(found.delta_variance[:, chosen], expected.delta_variance[:, chosen], entries.v[:, chosen]) < 0.1


@pytest.mark.parametrize(
    ("n", "std", "merge"), [(1, 0.5, torch.bfloat16), (2, 1.0, torch.float16), (3, 3.0, torch.bfloat16)]
)
@pytest.mark.parametrize("grid", [None, torch.float32], ids=str)
def test_a_fine_grid_or_none_is_continuous(n, std, merge, grid):
    entries = Entries.draw(n, std, merge)
    found = entries.find(grid)
    reach = 12 * spacing(entries.W, GRID) * max(1.0, std)
    expected = entries.by_sum(entries.W + reach * torch.linspace(-1, 1, 1201, dtype=torch.float64)[:, None])
    assert (found.doubt == 1).all()
    assert worst(found.delta, expected.delta, entries.v.sqrt()) < 0.1
    assert worst(found.delta_variance, expected.delta_variance, entries.v) < 0.1
    assert worst(found.pull, expected.pull, entries.v.sqrt()) < 0.1
    assert float(found.variance.mean()) == pytest.approx(float((found.weight - entries.W).square().mean()), rel=0.3)


def test_doubt_is_the_share_of_wrong_weights():
    """Doubts are probabilities: as many weights are wrong as they add up to."""
    entries = [Entries.draw(1, 0.25, torch.float32, seed) for seed in range(10)]
    found = [e.find(GRID, least_reach=1) for e in entries]
    doubt = torch.cat([f.doubt for f in found])
    wrong = torch.cat([(f.weight != e.W).double() for f, e in zip(found, entries, strict=True)])
    assert ((doubt >= 0) & (doubt <= 1)).all()
    for low, high in ((0, 0.02), (0.02, 0.2), (0.2, 0.6)):
        chosen = (doubt >= low) & (doubt < high)
        expected = doubt[chosen].sum()
        assert float(wrong[chosen].sum()) == pytest.approx(float(expected), abs=4 * float(expected) ** 0.5)


def test_intervals_around_the_true_deltas_leave_the_true_points():
    """Without doubt about `M_i`, what is certain is right."""
    entries = Entries.draw(3, 1e-4, torch.bfloat16)
    found = entries.find(GRID, least_reach=1)
    certain = found.doubt < 1e-9
    assert float(certain.double().mean()) > 0.2
    assert torch.equal(found.weight[certain], entries.W[certain])


class TestLeastReach:
    def test_zero_takes_a_lone_point_as_it_is(self):
        found = Entries.draw(1, 0.12, torch.float32).find(GRID)
        assert (found.doubt == 0).any()

    def test_one_asks_its_neighbours(self):
        entries = Entries.draw(1, 0.12, torch.float32, binade=True)
        lone, asked = entries.find(GRID), entries.find(GRID, least_reach=1)
        assert torch.equal(lone.weight, asked.weight)
        assert (asked.doubt > 0).all()
        # Alone is a point whose neighbours are more than four deviations beyond what is feasible.
        assert float(asked.doubt[lone.doubt == 0].max()) < 1e-3


@pytest.mark.parametrize("common", [0.0, 0.01, 0.25])
@pytest.mark.parametrize("power", [128.0, 32.0, 8.0])
def test_evidence_is_the_mean_probability_of_the_intervals(power, common):
    """Against sampling: a share of drawn `M_i` puts W + M_i into the stored interval. Steps are 1, 1/4 and 1/16."""
    low = torch.tensor([[power + 1.9], [power + 2.1]], dtype=torch.float64)
    high = torch.tensor([[power + 2.5], [power + 2.7]], dtype=torch.float64)
    m, v = torch.tensor([[0.1], [0.3]], dtype=torch.float64), torch.tensor([[0.04], [0.02]], dtype=torch.float64)
    points = torch.arange(power, power + 5, power / 128, dtype=torch.float64)
    generator = seeded()
    M = m + v.sqrt() * normal(generator, 2, 100_000) + common**0.5 * normal(generator, 1, 100_000)
    shares = [float(((low < W + M) & (high > W + M)).all(dim=0).double().mean()) for W in points]
    found = log_evidence(low, high, m, v, torch.tensor([[common]], dtype=torch.float64), GRID)
    assert float(found.exp()) == pytest.approx(sum(shares) * power / 128, rel=0.1)


def test_a_shared_error_says_of_the_models_together_where_the_grid_is():
    """All `M_i` are off by a third of a step: the gradient of each is what a change of all by that makes zero."""
    W = torch.full((1,), 130.0, dtype=torch.float64)
    M = normal(seeded(), 12, 1)
    low, high = interval((W + M).bfloat16())
    m, v = M + 1 / 3, torch.full_like(M, 0.01)
    found = posterior(low, high, m, v, GRID, common=torch.full_like(W, 0.04))
    gradient = ((found.delta - m) / v).sum()
    precision = ((1 - (found.delta_variance - found.pull.square()) / v) / v).sum() - (found.pull / v).sum().square()
    assert float(gradient / precision) == pytest.approx(-1 / 3, rel=0.25)
    # Of an error that may be several steps it says next to nothing.
    open_ = posterior(low, high, m, v, GRID, common=torch.full_like(W, 4.0))
    assert abs(float(((open_.delta - m) / v).sum())) < 0.02 * abs(float(gradient))


class TestFeasible:
    def test_holds_the_base(self):
        entries = Entries.draw(3, 0.3, torch.bfloat16)
        low, high = feasible(entries.low, entries.high, entries.m, entries.v)
        inside = (low <= entries.W) & (high >= entries.W)
        # All but the M_i beyond four deviations.
        assert inside[((entries.M - entries.m).square() < 16 * entries.v).all(dim=0)].all()

    def test_models_that_contradict_each_other_leave_an_interval_around_their_mean(self):
        low, high = torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.tensor([[0.1], [1.1]], dtype=torch.float64)
        zero, little = torch.zeros_like(low), torch.full_like(low, 1e-6)
        ends = feasible(low, high, zero, little)
        assert float(ends.mean()) == pytest.approx(0.55)
        assert ends[0] < ends[1]
        found = posterior(low, high, zero, little, GRID)
        assert all(torch.isfinite(part).all() for part in found)
