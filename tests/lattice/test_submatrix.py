"""A part of a large matrix, and the rows that follow from it."""

import pytest
import torch

from detune.lattice.entries import grid_of
from detune.lattice.submatrix import Submatrix, all_or, extended
from tests.lattice.problems import LatticeProblem

GRID = grid_of(torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "rows", "columns"), [((90, 60), None, None), ((91, 60), 60, None), ((60, 400), None, 60)], ids=str
)
def test_a_side_is_cut_from_half_as_large_again(shape, rows, columns):
    block = Submatrix.draw(shape, 60, seed=0)
    for some, count, size in ((block.rows, rows, shape[0]), (block.columns, columns, shape[1])):
        assert (some is None) == (count is None)
        if some is not None:
            assert len(some) == len(some.unique()) == count
            assert torch.equal(some, some.sort().values)
            assert int(some.max()) < size
    assert block.is_whole == (rows is None and columns is None)


def test_entries_and_estimates_are_of_the_same_places():
    problem = LatticeProblem((128, 96), rank=2, delta=2.0)
    block = Submatrix.draw((128, 96), 40, seed=1)
    part, estimates = block.entries(problem.entries), block.estimates(problem.estimates(0.0))
    assert part.shape == (40, 40)
    for W_i, W_whole, e, M_i in zip(part.matrices, problem.stack.matrices, estimates, problem.deltas, strict=True):
        assert torch.equal(W_i, W_whole[block.rows][:, block.columns])
        assert torch.allclose(e.low_rank.dense(), M_i[block.rows][:, block.columns], atol=1e-6 * problem.step)


def test_the_whole_is_not_copied():
    problem = LatticeProblem((32, 24))
    assert Submatrix.draw((32, 24), 40, seed=1).entries(problem.entries).matrices == problem.entries.matrices


def test_rows_follow_from_those_that_are_known():
    """Nothing is known of the others at first."""
    problem = LatticeProblem((256, 128), rank=2, delta=2.0, merge=torch.bfloat16)
    true = problem.estimates(0.05)
    rows = torch.arange(0, 256, 4)
    begun = [e.part(slice(None), slice(None)).wider(0.0) for e in true]
    begun = [type(e).nothing((256, 128), 0.0) for e in begun]
    found = extended(problem.entries, begun, [e.part(rows, all_or(None)) for e in true], rows, GRID)
    assert max(problem.off(found)) < 0.3
    others = torch.ones(256, dtype=torch.bool)
    others[rows] = False
    for e, M_i in zip(found, problem.deltas, strict=True):
        rest = (e.low_rank.dense() - M_i)[others] / problem.step
        assert float(rest.square().mean()) ** 0.5 < 0.3
