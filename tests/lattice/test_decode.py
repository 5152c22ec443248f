"""The last pass: right, as often as it says, and silent where lines of the matrix have locked onto wrong points."""

from dataclasses import replace

import pytest
import torch

from detune.lattice import entries as entries_module
from detune.lattice.decode import decoded
from detune.lattice.entries import grid_of
from detune.lattice.estimate import Estimate
from tests.cases import rms
from tests.lattice.problems import LatticeProblem

GRID = grid_of(torch.bfloat16)
REGIMES = [
    (1, 0.3, torch.float32),
    (2, 1.0, torch.float32),
    (3, 2.0, torch.bfloat16),
    (5, 0.3, torch.bfloat16),
    (3, 3.0, torch.float16),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "delta", "merge"), REGIMES, ids=str)
def test_certain_entries_are_right(n, delta, merge, seed):
    problem = LatticeProblem((128, 96), n=n, delta=delta, merge=merge, seed=seed)
    found = decoded(problem.entries, problem.estimates(0.05, seed), GRID)
    wrong = found.weight != problem.W
    assert not (wrong & found.certain).any()
    assert found.certain.double().mean() > 0.3
    assert problem.right(found.weight) > 0.9


def test_known_deltas_give_every_bit():
    problem = LatticeProblem((128, 96), n=1, delta=5.0)
    found = decoded(problem.entries, problem.estimates(1e-6), GRID)
    assert torch.equal(found.weight, problem.W)
    assert found.certain.all()
    assert found.expected.mse == 0
    assert found.foreseeable == 1


@pytest.mark.parametrize("std", [0.1, 0.3])
@pytest.mark.parametrize(("n", "merge"), [(3, torch.bfloat16), (1, torch.float32)], ids=str)
def test_the_error_is_what_is_expected(n, merge, std):
    problem = LatticeProblem((256, 192), n=n, delta=1.0, merge=merge)
    found = decoded(problem.entries, problem.estimates(std), GRID)
    error = rms(found.weight - problem.W) ** 2
    assert error > 0
    assert found.expected.least / 1.3 < error < 1.3 * found.expected.most
    assert 0 <= found.foreseeable <= 1


@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_is_certain_in_a_line_that_has_locked_onto_wrong_points(transposed):
    """A direction of equal numbers moves a whole line by one step: most of its entries fit another point as well."""
    problem = LatticeProblem((96, 128), n=1, delta=0.0)
    left = torch.zeros(96, 1)
    left[7] = problem.step
    locked = Estimate(left, torch.ones(128, 1), torch.full((96,), (1e-3 * problem.step) ** 2), torch.zeros(128))
    entries, W, estimate = problem.entries, problem.W, locked
    if transposed:
        entries, W, estimate = entries.transposed, W.mT, locked.transposed
    found = decoded(entries, [estimate], GRID)
    wrong, certain = (each.mT if transposed else each for each in (found.weight != W, found.certain))
    assert wrong[7].double().mean() > 0.8
    assert not wrong[torch.arange(96) != 7].any()
    assert not certain[7].any()
    # It strains the lines that it crosses, too, where no other point is as far away.
    assert certain[torch.arange(96) != 7].double().mean() > 0.8


def test_without_a_grid_nothing_is_certain_and_the_mean_is_as_near_as_it_says():
    problem = LatticeProblem((128, 96), n=3, delta=1.0, merge=torch.bfloat16, off=True)
    found = decoded(problem.entries, problem.estimates(0.02), grid_of(None))
    assert not found.certain.any()
    assert rms(found.weight - problem.W) ** 2 == pytest.approx(found.expected.mse, rel=0.15)
    assert found.noise_ratio == pytest.approx(1, abs=0.25)


def test_rows_are_read_in_blocks_to_the_same_end(monkeypatch):
    problem = LatticeProblem((100, 96), n=3, delta=1.0, merge=torch.bfloat16)
    estimates = [replace(e, lack=1e-9) for e in problem.estimates(0.1)]
    whole = decoded(problem.entries, estimates, GRID)
    monkeypatch.setattr(entries_module, "TOGETHER", 1)
    found = decoded(problem.entries, estimates, GRID)
    assert torch.equal(found.weight, whole.weight)
    assert torch.equal(found.certain, whole.certain)
    assert found.expected.mse == pytest.approx(whole.expected.mse)
    assert found.relative_residual == pytest.approx(whole.relative_residual)


@pytest.mark.parametrize("off", [0.0, 0.002])
def test_an_entry_of_the_base_that_is_off_the_grid_is_not_certain(off):
    problem = LatticeProblem((64, 64), n=3, delta=2.0, merge=torch.float32)
    W = problem.W.clone()
    moved = off * float(torch.finfo(torch.bfloat16).eps * W[5, 7].abs())
    shifted = tuple(W_i.clone() for W_i in problem.entries.matrices)
    for W_i in shifted:
        W_i[5, 7] += moved
    found = decoded(replace(problem.entries, matrices=shifted), problem.estimates(1e-6), GRID)
    assert bool(found.certain[5, 7]) is (off == 0)
    assert int(found.certain.logical_not().sum()) == (off > 0)
