"""Half sweeps against least squares row by row, and sweeps against the truth."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from detune.lattice import intervals as module
from detune.lattice import joint_rows as joint
from detune.lattice.estimate import Estimate
from detune.lattice.intervals import views
from detune.lattice.message_passing import half_sweep, sweep, sweep_each
from detune.methods import Auto
from detune.problem import Stack
from detune.problem.low_rank import LowRank
from tests.cases import normal, rms, seeded
from tests.lattice.problems import SCALE, LatticeProblem


def entries(estimate: Estimate) -> tuple[Tensor, Tensor]:
    """Mean and variance of all entries, by the definition."""
    (q, q_weight), (p, p_weight) = estimate.rows, estimate.columns
    variance = estimate.scale * (torch.outer(q, p_weight) + torch.outer(q_weight, p))
    return estimate.left @ estimate.right.mT, variance


def uneven(estimate: Estimate, generator: torch.Generator) -> Estimate:
    """The same estimate, some of its rows and columns known better than others."""
    out, columns = estimate.left.shape[0], estimate.right.shape[0]
    rows = estimate.rows * torch.exp(normal(generator, 2, out) / 4)
    return replace(estimate, rows=rows, columns=estimate.columns * torch.exp(normal(generator, 2, columns) / 4))


def row_by_row(estimate: Estimate, target: Tensor, used: Tensor) -> Tensor:
    """`min_L sum_ab used_ab (target_ab - L_a . R_b)^2 / v_ab`, one row after another; returns `L R^T`."""
    _, v = entries(estimate)
    rows = []
    for a in range(len(target)):
        weight = (used[a] / v[a]).sqrt()
        solution = torch.linalg.lstsq(weight[:, None] * estimate.right, (weight * target[a])[:, None]).solution
        rows.append(estimate.right @ solution[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("n", [1, 2])
def test_half_sweep_is_weighted_least_squares_where_every_entry_is_a_point(n):
    """The `M_i` are known to a twentieth of a step: each entry has one grid point, and is a float32 number."""
    problem = LatticeProblem((40, 30), rank=3, n=n, delta=1.0)
    generator = seeded(1)
    estimates = [
        uneven(
            Estimate.of(LowRank(L * (1 + 0.01 * normal(generator, *L.shape)), R), (0.05 * problem.step) ** 2), generator
        )
        for L, R in problem.factors
    ]
    # Next to zero the grid is so fine that no entry is sure of its point.
    used = (torch.rand(40, 30, generator=generator) < 0.8) & (problem.W.abs() > SCALE / 4)
    (found,) = half_sweep(problem.stack, estimates, problem.grid, [used])
    for before, after, W_i in zip(estimates, found, problem.stack.matrices, strict=True):
        expected = row_by_row(before, W_i.double() - problem.W, used)
        # The prior of a row's coordinates pulls by the variance of an entry over M_i's squares in some 20 of them.
        assert rms(after.low_rank.dense() - expected) < 1e-3 * rms(expected)


def test_half_sweep_says_how_well_it_knows_the_rows():
    """The variance of a row's fit, for entries known up to v: `v r / in` for one, on average."""
    problem = LatticeProblem((40, 30), rank=3, n=1, delta=1.0)
    v = (0.05 * problem.step) ** 2
    ((L, R),) = problem.factors
    ((after,),) = half_sweep(problem.stack, [Estimate.of(LowRank(L, R), v)], problem.grid)
    _, variance = entries(replace(after, columns=after.columns * torch.tensor([[0.0], [1.0]])))
    assert float(variance.mean()) == pytest.approx(v * 3 / 30, rel=0.02)


class TestEstimate:
    def test_transposed_twice_is_the_same(self):
        estimate = self.estimate()
        twice = estimate.transposed.transposed
        assert all(torch.equal(getattr(twice, field), getattr(estimate, field)) for field in ("left", "right", "rows"))
        assert torch.equal(twice.columns, estimate.columns)
        assert torch.equal(estimate.transposed.shared_rows, estimate.shared_columns)
        assert twice.scale == estimate.scale

    def test_directions_that_are_gone_are_not_significant(self):
        estimate = self.estimate()
        small = 1e-3 * torch.ones(7, 1, dtype=torch.float64), 1e-3 * torch.ones(5, 1, dtype=torch.float64)
        more = replace(
            estimate, left=torch.cat([estimate.left, small[0]], 1), right=torch.cat([estimate.right, small[1]], 1)
        )
        known = replace(more, scale=1e-3)
        assert known.significant.rank == 2
        assert torch.allclose(known.significant.dense(), known.low_rank.dense(), atol=1e-4)
        assert replace(more, scale=1e-12).significant.rank == 3

    def test_transposed_is_of_the_transposed_matrix(self):
        estimate = self.estimate()
        for one, other in zip(entries(estimate), entries(estimate.transposed), strict=True):
            assert torch.allclose(one, other.mT, rtol=1e-14)

    def test_single_entries_are_those_of_the_matrix(self):
        estimate = self.estimate()
        rows, columns = torch.tensor([0, 3, 6]), torch.tensor([4, 0, 2])
        for some, all_of_them in zip(estimate.at(rows, columns), entries(estimate), strict=True):
            assert torch.allclose(some, all_of_them[rows, columns])

    def test_starts_with_one_variance_everywhere(self):
        generator = seeded()
        _, variance = entries(Estimate.of(LowRank(normal(generator, 7, 2), normal(generator, 5, 2)), 0.3))
        assert torch.allclose(variance, torch.full((7, 5), 0.3, dtype=torch.float64))

    @staticmethod
    def estimate() -> Estimate:
        generator = seeded()
        factors = normal(generator, 7, 2), normal(generator, 5, 2)
        profiles = normal(generator, 2, 7).abs(), normal(generator, 2, 5).abs()
        return Estimate(*factors, *profiles, *(profile[0] for profile in profiles), scale=3.0)


def starting(problem: LatticeProblem) -> tuple[Estimate, ...]:
    """From least squares, with the variances that its errors have."""
    recovery = Auto(lattice=None).solve(problem.stack, problem.rank)
    errors = [rms(M.dense() - true) for M, true in zip(recovery.deltas, problem.deltas, strict=True)]
    return tuple(Estimate.of(M, error**2) for M, error in zip(recovery.deltas, errors, strict=True))


def errors(problem: LatticeProblem, estimates: tuple[Estimate, ...]) -> list[float]:
    return [rms(e.low_rank.dense() - true) for e, true in zip(estimates, problem.deltas, strict=True)]


class TestSweep:
    def test_brings_the_deltas_of_bf16_merges_closer(self):
        problem = LatticeProblem((96, 80), rank=3, n=5, delta=2.0, merge=torch.bfloat16)
        estimates = starting(problem)
        first = errors(problem, estimates)
        for _ in range(4):
            estimates = sweep(problem.stack, estimates, problem.grid)
        assert all(after < 0.7 * before for before, after in zip(first, errors(problem, estimates), strict=True))

    def test_undoes_an_error_that_all_models_share(self):
        """In the row space of one seed. Rows fitted model by model had two fifths of it left after two sweeps."""
        problem = LatticeProblem((96, 80), rank=3, n=5, delta=2.0, merge=torch.bfloat16, shared=0.9)
        estimates = starting(problem)
        first = errors(problem, estimates)
        for _ in range(2):
            estimates = sweep(problem.stack, estimates, problem.grid)
        assert all(after < 0.35 * before for before, after in zip(first, errors(problem, estimates), strict=True))

    def test_claims_the_accuracy_it_has(self):
        problem = LatticeProblem((96, 80), rank=3, n=5, delta=2.0, merge=torch.bfloat16)
        estimates = starting(problem)
        for _ in range(4):
            estimates = sweep(problem.stack, estimates, problem.grid)
        claimed = [float(entries(e)[1].mean().sqrt()) for e in estimates]
        ratios = [error / claim for error, claim in zip(errors(problem, estimates), claimed, strict=True)]
        assert all(0.5 < ratio < 2 for ratio in ratios)

    def test_does_nothing_to_speak_of_with_entries_that_it_may_not_use(self):
        """Garbage there changes nothing."""
        problem = LatticeProblem((40, 30), rank=2, n=3, delta=1.0)
        used = torch.rand(40, 30, generator=seeded(2)) < 0.7
        spoilt = tuple(torch.where(used, W_i, 1.0) for W_i in problem.stack.matrices)
        found = [
            sweep(stack, starting(problem), problem.grid, used)
            for stack in (problem.stack, Stack.of(torch.stack(spoilt)))
        ]
        for one, other in zip(*found, strict=True):
            assert torch.allclose(one.low_rank.dense(), other.low_rank.dense(), rtol=0, atol=1e-6 * problem.step)

    @pytest.mark.parametrize("together", [1, 1 << 20])
    def test_several_choices_of_entries_at_once_are_as_many_sweeps(self, monkeypatch, together):
        problem = LatticeProblem((40, 30), rank=2, n=3, delta=1.0, merge=torch.bfloat16)
        start = starting(problem)
        uses = [None, *(torch.rand(40, 30, generator=seeded(seed)) < 0.7 for seed in range(2))]
        expected = [sweep(problem.stack, start, problem.grid, used) for used in uses]
        monkeypatch.setattr(joint, "TOGETHER", together)
        monkeypatch.setattr(module, "BLOCK_ENTRIES", 7 * 3 * 30)
        for ones, others in zip(expected, sweep_each(problem.stack, start, problem.grid, uses), strict=True):
            for one, other in zip(ones, others, strict=True):
                assert torch.allclose(one.low_rank.dense(), other.low_rank.dense(), rtol=0, atol=1e-6 * problem.step)
                assert torch.allclose(one.rows, other.rows, rtol=1e-5)

    def test_blocks_of_rows_change_nothing(self, monkeypatch):
        problem = LatticeProblem((40, 30), rank=2, n=3, delta=1.0, merge=torch.bfloat16)
        start = starting(problem)
        whole = sweep(problem.stack, start, problem.grid)
        monkeypatch.setattr(module, "BLOCK_ENTRIES", 7 * 3 * 30)
        assert [view.rows.stop - view.rows.start for view in views(problem.stack, start)] == [7, 7, 7, 7, 7, 5]
        for one, other in zip(whole, sweep(problem.stack, start, problem.grid), strict=True):
            assert torch.allclose(one.low_rank.dense(), other.low_rank.dense(), rtol=1e-9)
