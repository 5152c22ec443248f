"""The scale of the variances from entries held out, and a test for the grid that off-grid bases do not pass."""

import math
from dataclasses import replace

import pytest
import torch

from detune.lattice import HALVES, LatticeSearch, NoGrid
from detune.lattice.holdout import HeldOut, calibrated, log10_false_positive, misfit
from detune.lattice.message_passing import Estimate
from detune.methods import Auto
from detune.problem import Stack
from detune.problem.low_rank import LowRank
from tests.cases import normal, seeded
from tests.lattice.problems import LatticeProblem


def estimates(problem: LatticeProblem, std: float, claimed: float) -> tuple[Estimate, ...]:
    """The true deltas with an error of `std` steps, taken for `claimed` steps; the error has rank 1 and signs."""
    generator = seeded(9)
    out, columns = problem.W.shape
    found = []
    for L, R in problem.factors:
        error = std * problem.step * normal(generator, out, 1).sign()
        low_rank = LowRank(torch.cat([L, error], 1), torch.cat([R, normal(generator, columns, 1).sign()], 1))
        found.append(Estimate.of(low_rank, (claimed * problem.step) ** 2))
    return tuple(found)


class TestHeldOut:
    def test_is_an_eighth_and_not_used(self):
        problem = LatticeProblem((96, 80), merge=torch.bfloat16)
        held = HeldOut.of(problem.stack, seed=0)
        count = int((~held.used).sum())
        assert 0.1 < count / held.used.numel() < 0.125
        assert len(held.rows) == count
        assert not held.used[held.rows, held.columns].any()
        stored = torch.stack([W_i[held.rows, held.columns].double() for W_i in problem.stack.matrices])
        assert ((held.low < stored) & (stored < held.high)).all()

    def test_other_seeds_choose_others(self):
        stack = LatticeProblem((96, 80)).stack
        assert not torch.equal(HeldOut.of(stack, 0).used, HeldOut.of(stack, 1).used)


@pytest.mark.parametrize("factor", [1 / 16, 1 / 4, 1, 4, 16])
@pytest.mark.parametrize("merge", [torch.float32, torch.bfloat16], ids=str)
def test_calibration_finds_a_wrong_scale(merge, factor):
    """The tries are powers of two: the factor that remains is below that, and what the sample leaves open."""
    problem = LatticeProblem((128, 96), n=3, delta=2.0, merge=merge)
    held = HeldOut.of(problem.stack, 0)
    found = estimates(problem, std=0.1, claimed=0.1 * math.sqrt(factor))
    for _ in range(3):
        found, _ = calibrated(held, found, problem.grid)
    scales = {e.scale for e in found}
    assert len(scales) == 1
    assert 1 / 3 < scales.pop() * factor < 3


def test_rows_in_which_all_models_are_off_together_are_told():
    """Eight rows are off by half a step, all models by the same; the others, each by itself, by a twentieth."""
    problem = LatticeProblem((96, 80), n=5, delta=2.0, merge=torch.bfloat16)
    held = HeldOut.of(problem.stack, 0)
    generator = seeded(9)
    together = torch.zeros(96, 1, dtype=torch.float64)
    together[:8] = 0.5 * problem.step
    column = normal(generator, 80, 1).sign()
    found = tuple(
        replace(e, left=torch.cat([e.left, together], dim=1), right=torch.cat([e.right, column], dim=1))
        for e in estimates(problem, std=0.05, claimed=0.05)
    )
    calibrated_ones, _ = calibrated(held, found, problem.grid)
    for estimate in calibrated_ones:
        assert float(estimate.shared_rows[:8].median()) > 4
        assert float(estimate.shared_rows[8:].median()) <= 1
        assert not estimate.shared_columns.any()
    turned = HeldOut.of(problem.stack.transposed, 0)
    by_columns, _ = calibrated(turned, [e.transposed for e in found], problem.grid)
    assert float(by_columns[0].shared_columns[:8].median()) > 4


def test_evidence_is_larger_on_the_right_deltas():
    problem = LatticeProblem((96, 80), merge=torch.bfloat16, delta=2.0)
    held = HeldOut.of(problem.stack, 0)
    right, wrong = (calibrated(held, estimates(problem, std, std), problem.grid)[1] for std in (0.02, 0.3))
    assert right > wrong


class TestFalsePositives:
    @pytest.mark.parametrize("n", [3, 4, 5])
    @pytest.mark.parametrize("delta", [2.0, 10.0, 60.0])
    @pytest.mark.parametrize("merge", [*HALVES, torch.float32], ids=str)
    def test_a_base_off_the_grid_does_not_pass(self, merge, delta, n):
        """In float32, deltas are in steps of bf16, which is the grid that they might show."""
        grid = merge if merge in HALVES else torch.bfloat16
        seed = n * 100 + int(delta)
        problem = LatticeProblem((128, 96), 3, n, delta, merge, grid, seed, off=True)
        start = Auto(lattice=None).solve(problem.stack)
        assert Auto().solve(problem.stack).bits is None
        with pytest.raises(NoGrid, match=f"no grid of the base shows in {n} models"):
            LatticeSearch().refine(problem.stack, start)

    @pytest.mark.parametrize("merge", HALVES, ids=str)
    def test_a_base_off_the_grid_does_not_pass_with_deltas_within_the_rounding(self, merge):
        problem = LatticeProblem((128, 96), 3, 3, 0.7, merge, merge, off=True)
        assert Auto().solve(problem.stack).bits is None

    @pytest.mark.parametrize("delta", [2.0, 10.0, 60.0])
    @pytest.mark.parametrize("merge", [*HALVES, torch.float32], ids=str)
    def test_a_base_on_the_grid_passes(self, merge, delta):
        grid = merge if merge in HALVES else torch.bfloat16
        for n in (3, 5):
            problem = LatticeProblem((128, 96), 3, n, delta, merge, grid)
            recovery = Auto().solve(problem.stack)
            assert recovery.bits is not None
            assert recovery.bits.grid is grid
            assert recovery.bits.log10_false_positive < -9

    def test_the_bound_is_one_of_a_probability_and_falls_with_entries(self):
        bounds = []
        for shape in ((24, 24), (48, 48), (96, 96)):
            problem = LatticeProblem(shape, merge=torch.bfloat16, delta=3.0)
            held = HeldOut.of(problem.stack, 0)
            bounds.append(log10_false_positive(held, estimates(problem, 0.01, 0.01), problem.grid))
        assert 0 >= bounds[0] > bounds[1] > bounds[2]
        # Four times the entries say four times as much.
        assert bounds[2] / bounds[1] == pytest.approx(4, rel=0.3)

    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("merge", [*HALVES, torch.float32], ids=str)
    def test_even_the_true_deltas_show_no_grid_where_there_is_none(self, merge, seed):
        """The hardest case: every arc is where it is taken to be."""
        grid = merge if merge in HALVES else torch.bfloat16
        problem = LatticeProblem((128, 96), 3, 3, 20.0, merge, grid, seed, off=True)
        held = HeldOut.of(problem.stack, seed)
        assert log10_false_positive(held, estimates(problem, 1e-3, 1e-3), grid) > -3


class TestMisfit:
    def test_none_where_the_deltas_are_known(self):
        problem = LatticeProblem((96, 80), delta=2.0)
        held = HeldOut.of(problem.stack, 0)
        assert misfit(held, estimates(problem, 0.01, 0.01), problem.grid) == 0

    def test_many_where_they_are_wrong_and_taken_for_right(self):
        problem = LatticeProblem((96, 80), delta=2.0)
        held = HeldOut.of(problem.stack, 0)
        assert misfit(held, estimates(problem, 0.3, 1e-3), problem.grid) > 0.3

    def test_none_where_they_are_wrong_and_known_to_be(self):
        problem = LatticeProblem((96, 80), delta=2.0)
        held = HeldOut.of(problem.stack, 0)
        assert misfit(held, estimates(problem, 0.3, 0.3), problem.grid) == 0


def test_a_larger_scale_is_a_larger_variance():
    problem = LatticeProblem((24, 24))
    held = HeldOut.of(problem.stack, 0)
    found = estimates(problem, 0.1, 0.1)
    _, v = held.entries(found)
    _, wider = held.entries([replace(e, scale=4.0) for e in found])
    assert torch.allclose(wider, 4 * v)
    assert v.shape == (3, len(held.rows))
    assert isinstance(problem.stack, Stack)
