"""The base's bits end to end: all of them, or a refusal, and nothing certain that is wrong."""

from dataclasses import replace

import pytest
import torch

from detune.lattice import LatticeSearch, NoGrid
from detune.methods import Auto, Lattice
from detune.numerics.float_grid import lies_on, nearest
from detune.problem import Stack
from detune.problem.low_rank import LowRank
from tests.cases import normal, rms, seeded
from tests.lattice.problems import LatticeProblem


class TestFloat32Merges:
    @pytest.mark.parametrize("delta", [0.3, 1.0, 10.0])
    def test_three_models_give_every_bit(self, delta):
        problem = LatticeProblem((128, 128), rank=4, n=3, delta=delta)
        recovery = Lattice().solve(problem.stack)
        assert recovery.bits is not None
        assert recovery.bits.grid is torch.bfloat16
        assert problem.right(recovery.weight) == 1
        assert recovery.bits.share == 1
        assert recovery.method == "intersect+polish+lattice"
        assert recovery.ranks == (4, 4, 4)

    @pytest.mark.parametrize(("n", "delta"), [(1, 0.2), (2, 0.4)])
    def test_fewer_give_every_bit_where_deltas_are_small(self, n, delta):
        problem = LatticeProblem((192, 192), rank=4, n=n, delta=delta)
        recovery = Lattice().solve(problem.stack)
        assert recovery.bits is not None
        assert problem.right(recovery.weight) == 1
        assert recovery.bits.share > 0.999
        assert recovery.method == "lattice"
        for found, true in zip(recovery.deltas, problem.deltas, strict=True):
            assert rms(found.dense() - true) < 1e-3 * rms(true)

    @pytest.mark.parametrize(("n", "delta"), [(1, 3.0), (2, 30.0)])
    def test_larger_deltas_are_refused(self, n, delta):
        problem = LatticeProblem((56, 48), n=n, delta=delta)
        with pytest.raises(NoGrid, match=r"deltas are too large against its steps.*three need no grid"):
            Lattice().solve(problem.stack)


class TestHalfMerges:
    def test_float16_of_a_bf16_base(self):
        problem = LatticeProblem((128, 128), n=3, delta=2.0, merge=torch.float16)
        recovery = Lattice().solve(problem.stack)
        assert recovery.bits is not None
        assert recovery.bits.grid is torch.bfloat16
        assert problem.right(recovery.weight) > 0.99
        assert problem.certain_and_wrong(recovery) == 0

    def test_is_closer_than_least_squares_as_expected(self):
        problem = LatticeProblem((128, 128), n=3, delta=2.0, merge=torch.bfloat16)
        recovery, start = Lattice().solve(problem.stack), Auto(lattice=None).solve(problem.stack)
        assert recovery.bits is not None
        error = rms(recovery.weight - problem.W)
        assert error < 0.5 * rms(start.weight - problem.W)
        assert recovery.bits.expected.mse == pytest.approx(error**2, rel=1)
        assert recovery.noise_ratio == pytest.approx(1, abs=0.05)
        assert lies_on(recovery.weight, torch.bfloat16)

    def test_float32_files_may_hold_bf16_numbers(self):
        problem = LatticeProblem((128, 128), n=3, delta=2.0, merge=torch.bfloat16)
        plain = Lattice().solve(problem.stack)
        widened = Lattice().solve(Stack.of([W_i.float() for W_i in problem.stack.matrices]))
        assert torch.equal(plain.weight, widened.weight)

    def test_bf16_beside_float32(self):
        problem = LatticeProblem((128, 128), n=3, delta=3.0, merge=(torch.bfloat16, torch.float32, torch.bfloat16))
        recovery = Lattice().solve(problem.stack)
        assert recovery.bits is not None
        assert problem.right(recovery.weight) > 0.95
        assert problem.certain_and_wrong(recovery) == 0


class TestOneSeed:
    """Row spaces that nearly coincide: what all deltas have wrong together hardly shows."""

    problem = LatticeProblem((160, 128), rank=4, n=5, delta=6.0, merge=torch.bfloat16, shared=0.98)

    def test_least_squares_leads_to_the_bits(self):
        recovery = Auto().solve(self.problem.stack)
        assert recovery.bits is not None
        assert self.problem.right(recovery.weight) > 0.97
        assert self.problem.certain_and_wrong(recovery) == 0
        assert recovery.ranks == (4,) * 5

    def test_auto_searches_for_no_ranks_where_the_fit_finds_them(self, monkeypatch):
        monkeypatch.setattr("detune.methods.auto.select_ranks", None)
        recovery = Auto().solve(self.problem.stack)
        assert recovery.method == "relevance+lattice"
        assert recovery.ranks == (4,) * 5
        assert self.problem.right(recovery.weight) > 0.97
        assert self.problem.certain_and_wrong(recovery) == 0

    def test_auto_searches_for_ranks_where_there_is_no_grid(self):
        off = LatticeProblem((96, 80), rank=3, n=4, delta=6.0, merge=torch.bfloat16, shared=0.98, off=True)
        recovery = Auto().solve(off.stack)
        assert recovery.bits is None
        assert recovery.ranks == (3,) * 4

    def test_a_start_that_lost_a_direction_is_not_the_only_one(self):
        recovery = Auto(lattice=None).solve(self.problem.stack)
        short = [LowRank(M_i.left[:, :3], M_i.right[:, :3]) for M_i in recovery.deltas]
        lost = replace(recovery, deltas=tuple(short), ranks=(3,) * 5)
        with pytest.raises(NoGrid):
            LatticeSearch().refine_from(self.problem.stack, lost)
        found = LatticeSearch().refine(self.problem.stack, lost)
        assert found.method == "relevance+lattice"
        assert found.ranks == (4,) * 5
        assert self.problem.right(found.weight) > 0.97
        assert self.problem.certain_and_wrong(found) == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("n", "delta", "merge"),
    [
        (1, 0.25, torch.float32),
        (2, 0.6, torch.float32),
        (3, 2.0, torch.bfloat16),
        (5, 3.0, torch.float16),
    ],
    ids=str,
)
def test_nothing_certain_is_wrong(n, delta, merge, seed):
    grid = merge if merge.itemsize == 2 else torch.bfloat16
    problem = LatticeProblem((128, 128), n=n, delta=delta, merge=merge, grid=grid, seed=seed)
    try:
        recovery = Lattice().solve(problem.stack)
    except NoGrid:
        return
    if recovery.bits is not None:
        assert problem.certain_and_wrong(recovery) == 0


@pytest.mark.parametrize("delta", [3.0, 30.0])
def test_merges_that_were_rounded_twice(delta):
    """PEFT's safe_merge rounds the delta to bf16 before the sum: what it adds is taken for an error of the `M_i`."""
    problem = LatticeProblem((128, 96), rank=2, n=4, delta=delta, merge=torch.bfloat16)
    twice = Stack.of([(problem.W + M_i.bfloat16().double()).bfloat16() for M_i in problem.deltas])
    recovery = Auto().solve(twice)
    assert recovery.bits is not None
    assert problem.right(recovery.weight) > 0.93
    assert problem.certain_and_wrong(recovery) == 0


class TestUntouched:
    W = nearest(0.02 * normal(seeded(), 64, 48), torch.bfloat16)

    def test_a_float32_model_on_the_bf16_grid_has_the_base(self):
        recovery = Lattice().solve(Stack.of([self.W.float()]))
        assert recovery.method == "unchanged"
        assert "model 0 has every entry on the bfloat16 grid" in recovery.reason
        assert torch.equal(recovery.weight, self.W)

    def test_so_has_one_of_two(self):
        merged = (self.W + 1e-3 * normal(seeded(1), 64, 1) @ normal(seeded(2), 1, 48)).float()
        recovery = Lattice().solve(Stack.of([merged, self.W.float()]))
        assert recovery.method == "unchanged"
        assert torch.equal(recovery.weight, self.W)

    @pytest.mark.parametrize("other", [torch.float32, torch.bfloat16], ids=str)
    def test_a_bf16_model_is_on_its_grid_however_it_was_changed(self, other):
        """It lies on the float32 grid too, which says nothing."""
        problem = LatticeProblem((64, 48), n=2, delta=0.4, merge=(torch.bfloat16, other))
        assert LatticeSearch().untouched(problem.stack) is None

    def test_nor_has_a_bf16_model_in_a_float32_file_beside_another(self):
        problem = LatticeProblem((64, 48), n=2, delta=2.0, merge=torch.bfloat16)
        first, second = problem.stack.matrices
        assert LatticeSearch().untouched(Stack.of([first, second.float()])) is None


def test_no_grid_is_found_finer_than_the_models():
    problem = LatticeProblem((96, 80), n=4, delta=3.0, merge=torch.bfloat16)
    with pytest.raises(NoGrid, match=r"no grid of the base shows in 4 models \(tried: float16, float32\).*auto"):
        LatticeSearch(grids=(torch.float16, torch.float32)).refine(
            problem.stack, Auto(lattice=None).solve(problem.stack)
        )
