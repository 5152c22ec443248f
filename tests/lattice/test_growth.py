"""Directions that grow out of the score of every entry, and sizes of deltas that nobody knows yet."""

from dataclasses import replace

import pytest
import torch

from detune.lattice import message_passing
from detune.lattice.entries import StoredEntries, grid_of
from detune.lattice.estimate import Estimate
from detune.lattice.growth import grown
from detune.lattice.message_passing import sweep
from tests.cases import normal, rms, seeded
from tests.lattice.problems import LatticeProblem

GRID = grid_of(torch.bfloat16)


def nothing(problem: LatticeProblem, delta: float) -> list[Estimate]:
    return [Estimate.nothing(problem.stack.shape, (delta * problem.step) ** 2)] * problem.stack.n


@pytest.mark.parametrize(
    ("n", "delta", "merge"), [(3, 0.3, torch.bfloat16), (1, 0.2, torch.float32), (2, 0.3, torch.float32)], ids=str
)
def test_planted_directions_are_found(n, delta, merge):
    problem = LatticeProblem((256, 256), rank=2, n=n, delta=delta, merge=merge)
    found, came = grown(problem.entries, nothing(problem, delta), GRID, None)
    assert came == 2 * n
    for e, M_i in zip(found, problem.deltas, strict=True):
        assert e.rank == 2
        # By their angles, and by their size.
        cosines = torch.linalg.svdvals(torch.linalg.qr(e.left.double()).Q.mT @ torch.linalg.svd(M_i).U[:, :2])
        assert cosines.min() > 0.75
        assert rms(e.low_rank.dense()) == pytest.approx(rms(M_i), rel=0.4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "merge"), [(3, torch.bfloat16), (1, torch.float32)], ids=str)
def test_none_are_found_in_noise(n, merge, seed):
    """Deltas of the same size and of full rank."""
    problem, generator = LatticeProblem((128, 128), delta=0.0, seed=seed), seeded(seed + 100)
    noisy = [(problem.W + 0.3 * problem.step * normal(generator, 128, 128)).to(merge) for _ in range(n)]
    begun = [Estimate.nothing((128, 128), (0.3 * problem.step) ** 2)] * n
    assert grown(StoredEntries(tuple(noisy)), begun, GRID, None)[1] == 0


def test_nothing_grows_beyond_the_rank_or_where_nothing_is_missing(monkeypatch):
    # What is left unsolved of the equations has a score, too.
    monkeypatch.setattr(message_passing, "REST", 1e-3)
    monkeypatch.setattr(message_passing, "MOST_STEPS", 60)
    problem = LatticeProblem((256, 256), rank=2, n=3, delta=0.3, merge=torch.bfloat16)
    found, came = grown(problem.entries, nothing(problem, 0.3), GRID, None, rank=1)
    assert (came, [e.rank for e in found]) == (3, [1, 1, 1])
    assert grown(problem.entries, found, GRID, None, rank=1)[1] == 0
    fitted = problem.estimates(0.1)
    for _ in range(3):
        fitted = sweep(problem.entries, fitted, GRID, torch.rand(256, 256, generator=seeded()) < 1 / 16)
    assert grown(problem.entries, fitted, GRID, None)[1] == 0


def test_the_one_direction_that_is_missing_comes_to_its_model():
    problem = LatticeProblem((128, 128), rank=2, n=3, delta=1.0, merge=torch.bfloat16)
    estimates = problem.estimates(0.02)
    lacks = float((estimates[1].left[:, 1:] @ estimates[1].right[:, 1:].mT).square().mean())
    estimates[1] = replace(estimates[1], left=estimates[1].left[:, :1], right=estimates[1].right[:, :1], lack=lacks)
    found, came = grown(problem.entries, estimates, GRID, None)
    assert came == 1
    assert [e.rank for e in found] == [2, 2, 2]
    assert problem.off(found)[1] < 0.5 * problem.off(estimates)[1]
