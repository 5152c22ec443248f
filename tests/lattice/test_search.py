"""The base's bits end to end: nearly all of them, or a refusal, and nothing certain that is wrong."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from detune.lattice import LatticeSearch, NoGrid, fit
from detune.methods import Auto, Lattice
from detune.numerics.float_grid import lies_on, nearest
from detune.problem import Stack
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

    @pytest.mark.parametrize("shape", [(192, 192), (320, 64), (64, 320)])
    @pytest.mark.parametrize(("n", "delta", "right"), [(1, 0.2, 0.99), (2, 0.4, 0.98)])
    def test_fewer_give_nearly_every_bit_where_deltas_are_small(self, n, delta, right, shape):
        problem = LatticeProblem(shape, rank=4, n=n, delta=delta)
        recovery = Lattice().solve(problem.stack)
        assert recovery.bits is not None
        assert problem.right(recovery.weight) > right
        # One model leaves every second entry of a long matrix in doubt, and takes what it has wrong for directions.
        assert recovery.bits.share > (0.4 if n == 1 else 0.9)
        assert all(4 <= rank <= (8 if n == 1 else 4) for rank in recovery.ranks)
        assert problem.certain_and_wrong(recovery) <= (0.002 * problem.W.numel() if n == 1 else 0)
        assert recovery.method == "lattice"

    @pytest.mark.parametrize(("size", "delta", "seed"), [(192, 0.2, 1), (192, 0.2, 3), (256, 0.2, 3)])
    def test_a_direction_that_nothing_determines_is_not_followed(self, size, delta, seed):
        """Its curvature is rounding, and may be negative."""
        problem = LatticeProblem((size, size), rank=4, n=1, delta=delta, seed=seed)
        assert problem.right(Lattice().solve(problem.stack).weight) > 0.99

    @pytest.mark.parametrize(("n", "delta"), [(1, 3.0), (2, 30.0)])
    def test_larger_deltas_are_refused(self, n, delta):
        problem = LatticeProblem((56, 48), n=n, delta=delta)
        with pytest.raises(NoGrid, match=r"deltas are too large against its steps.*three need no grid"):
            Lattice().solve(problem.stack)


class TestHalfMerges:
    @pytest.mark.parametrize("merge", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("n", [3, 5])
    @pytest.mark.parametrize("delta", [2.0, 10.0])
    def test_ordinary_deltas(self, delta, n, merge):
        """Models as coarse as the base, and deltas of some steps."""
        problem = LatticeProblem((128, 128), n=n, delta=delta, merge=merge, grid=merge, seed=1)
        recovery = Lattice().solve(problem.stack)
        assert recovery.bits is not None
        assert recovery.bits.grid is merge
        assert recovery.ranks == (4,) * n
        assert problem.right(recovery.weight) > 0.97
        assert recovery.bits.share > 0.75
        assert problem.certain_and_wrong(recovery) == 0

    @pytest.mark.parametrize(("delta", "margin"), [(0.1, 0.05), (0.3, 0.2)])
    def test_light_deltas_show_in_what_rounding_leaves(self, delta, margin):
        """Most entries of most models are the base's own: the median of three is right in most of the rest."""
        problem = LatticeProblem((192, 160), n=3, delta=delta, merge=torch.bfloat16)
        median = torch.stack(problem.stack.matrices).double().median(dim=0).values
        recovery = Lattice().solve(problem.stack)
        assert recovery.bits is not None
        assert recovery.ranks == (4, 4, 4)
        assert problem.right(recovery.weight) > problem.right(median) + margin
        assert problem.right(recovery.weight) > 0.98
        assert problem.certain_and_wrong(recovery) == 0

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

    def test_most_bits_are_right_and_nothing_certain_is_wrong(self):
        recovery = Auto().solve(self.problem.stack)
        assert recovery.bits is not None
        assert self.problem.right(recovery.weight) > 0.93
        assert self.problem.certain_and_wrong(recovery) == 0
        # Errors that all models share are taken for directions, too.
        assert all(4 <= rank <= 8 for rank in recovery.ranks)

    def test_auto_searches_for_ranks_where_there_is_no_grid(self):
        off = LatticeProblem((96, 80), rank=3, n=4, delta=6.0, merge=torch.bfloat16, shared=0.98, off=True)
        recovery = Auto().solve(off.stack)
        assert recovery.bits is None
        assert recovery.ranks == (3,) * 4


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
    assert recovery.bits is not None
    wrong = problem.certain_and_wrong(recovery)
    if n == 1:
        # One model alone can lock a row onto wrong points unseen: no other model contradicts it.
        assert wrong <= 0.002 * recovery.bits.certain.sum()
    else:
        assert wrong == 0


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


class TestLargeMatrices:
    """Fitted in some rows and columns; the others follow."""

    @pytest.mark.parametrize("shape", [(320, 256), (400, 96), (96, 400)])
    @pytest.mark.parametrize(
        ("n", "rank", "delta", "merge"),
        [(3, 4, 2.0, torch.bfloat16), (3, 2, 0.3, torch.bfloat16), (2, 2, 0.4, torch.float32)],
        ids=str,
    )
    def test_all_rows_and_columns_are_right(self, n, rank, delta, merge, shape, monkeypatch):
        monkeypatch.setattr(fit, "BLOCK", 128)
        problem = LatticeProblem(shape, rank=rank, n=n, delta=delta, merge=merge)
        recovery = Lattice().solve(problem.stack)
        assert recovery.bits is not None
        right = recovery.weight.double() == problem.W
        assert right.double().mean() > 0.98
        assert right.double().mean(dim=0).min() > 0.9
        assert right.double().mean(dim=1).min() > 0.9
        assert recovery.ranks == (rank,) * n
        assert problem.certain_and_wrong(recovery) == 0


class TestOffEveryGrid:
    """A base that was stored more finely: no bits are claimed."""

    @pytest.mark.parametrize("merge", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("delta", [1.0, 10.0])
    def test_three_models_keep_the_answer_of_least_squares(self, delta, merge):
        problem = LatticeProblem((96, 80), n=3, delta=delta, merge=merge, off=True)
        recovery = Lattice().solve(problem.stack)
        assert recovery.bits is None
        assert recovery.method.startswith("intersect+polish")
        assert not LatticeSearch().shows_on(problem.stack, Auto(lattice=None).solve(problem.stack))

    @pytest.mark.parametrize("n", [1, 2])
    @pytest.mark.parametrize("delta", [0.2, 3.0])
    def test_fewer_are_refused(self, n, delta):
        problem = LatticeProblem((96, 80), n=n, delta=delta, off=True)
        with pytest.raises(NoGrid, match="no grid of the base shows"):
            Lattice().solve(problem.stack)

    def test_a_base_on_the_grid_shows_at_once(self):
        problem = LatticeProblem((96, 80), n=3, delta=3.0, merge=torch.bfloat16)
        assert LatticeSearch().shows_on(problem.stack, Auto(lattice=None).solve(problem.stack))


def test_two_threads_get_the_same_bits_as_one():
    problems = [LatticeProblem((96, 80), n=3, delta=delta, merge=torch.bfloat16) for delta in (0.3, 2.0)]
    alone = [Lattice().solve(problem.stack) for problem in problems]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda problem: Lattice().solve(problem.stack), problems * 2))
    for one, other in zip(alone * 2, together, strict=True):
        assert other.bits is not None
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.bits.certain, other.bits.certain)


@pytest.mark.parametrize("factor", [2.0**-6, 2.0**5])
@pytest.mark.parametrize(
    ("n", "delta", "merge"), [(3, 0.3, torch.bfloat16), (3, 2.0, torch.bfloat16), (2, 0.4, torch.float32)], ids=str
)
def test_powers_of_two_change_no_bit(n, delta, merge, factor):
    problem = LatticeProblem((96, 80), rank=2, n=n, delta=delta, merge=merge)
    recovery = Lattice().solve(problem.stack)
    scaled = Lattice().solve(Stack.of([W_i * factor for W_i in problem.stack.matrices]))
    assert recovery.bits is not None
    assert scaled.bits is not None
    assert torch.equal(scaled.weight, recovery.weight * factor)
    assert torch.equal(scaled.bits.certain, recovery.bits.certain)
    assert scaled.bits.expected.mse == pytest.approx(recovery.bits.expected.mse * factor**2)


def test_no_grid_is_found_finer_than_the_models():
    problem = LatticeProblem((96, 80), n=4, delta=3.0, merge=torch.bfloat16)
    with pytest.raises(NoGrid, match=r"no grid of the base shows in 4 models \(tried: float16, float32\).*auto"):
        LatticeSearch(grids=(torch.float16, torch.float32)).refine(
            problem.stack, Auto(lattice=None).solve(problem.stack)
        )
