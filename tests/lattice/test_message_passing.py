"""Sweeps: nearer to the truth, as near as they say, and told by entries that they have not seen where they are not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from detune.lattice import message_passing
from detune.lattice.entries import StoredEntries, grid_of
from detune.lattice.estimate import Estimate
from detune.lattice.message_passing import Measurements, stepped, sweep
from tests.cases import normal, seeded
from tests.lattice.problems import LatticeProblem

GRID = grid_of(torch.bfloat16)


def held_out(shape: tuple[int, int], share: float = 1 / 16) -> torch.Tensor:
    return torch.rand(shape, generator=seeded(5)) < share


@pytest.mark.parametrize(
    ("n", "delta", "merge"),
    [(3, 2.0, torch.bfloat16), (3, 0.3, torch.bfloat16), (2, 0.5, torch.float32), (4, 3.0, torch.float16)],
    ids=str,
)
def test_sweeps_come_nearer_and_know_how_near(n, delta, merge):
    problem = LatticeProblem((128, 96), n=n, delta=delta, merge=merge)
    found, held = problem.estimates(0.2), held_out((128, 96))
    for _ in range(8):
        found = sweep(problem.entries, found, GRID, held)
    # All entries say a little more than those that are not held out.
    last = sweep(problem.entries, found, GRID)
    for estimates in (found, last):
        for e, off in zip(estimates, problem.off(estimates), strict=True):
            assert off < 0.1
            # What few models lack falls slowly, so that they are sure of nothing too early.
            assert (0.6 if problem.stack.n > 2 else 0.0) < off / (e.variance**0.5 / problem.step) < 1.2
    assert max(problem.off(last)) < 1.05 * max(problem.off(found))


def test_a_step_solves_the_rows_equations(monkeypatch):
    """Against dense linear algebra, the rows of all models at once."""
    monkeypatch.setattr(message_passing, "REST", 1e-5)
    monkeypatch.setattr(message_passing, "MOST_STEPS", 200)
    problem = LatticeProblem((12, 64), rank=2, n=3, delta=1.0, merge=torch.bfloat16)
    estimates = problem.estimates(0.3)
    said = Measurements.of(problem.entries, estimates, GRID, slice(None), for_rows=True)
    found = stepped(problem.entries, estimates, GRID)
    R = [e.right.double() for e in estimates]
    prior = torch.cat([1 / e.left.double().square().mean(dim=0) for e in estimates])
    at = torch.cat([e.left.double() for e in estimates], dim=1)
    for a in range(12):
        own = [(R_i.mT * p) @ R_i for R_i, p in zip(R, said.precision[:, a].double(), strict=True)]
        common = torch.cat([(R_i.mT * u) for R_i, u in zip(R, said.pull[:, a].double(), strict=True)])
        gradient = torch.cat([R_i.mT @ g for R_i, g in zip(R, said.gradient[:, a].double(), strict=True)])
        matrix = torch.block_diag(*own) - common @ common.mT + prior.diag()
        step = torch.linalg.solve(matrix, gradient - prior * at[a])
        moved = torch.cat([e.left[a] - start.left[a] for e, start in zip(found, estimates, strict=True)])
        torch.testing.assert_close(moved.double(), step, rtol=2e-3, atol=2e-3 * float(step.abs().max()))


def test_a_missing_direction_is_seen_as_lack():
    problem = LatticeProblem((128, 128), n=3, delta=2.0, merge=torch.bfloat16)
    held = held_out((128, 128))
    whole = problem.estimates(0.05)
    short = [replace(e, left=e.left[:, :3], right=e.right[:, :3]) for e in whole]
    missing = [float((e.left[:, 3:] @ e.right[:, 3:].mT).square().mean()) for e in whole]
    complete = stepped(problem.entries, whole, GRID, held)
    for _ in range(8):
        short = stepped(problem.entries, short, GRID, held)
    for e, none, size in zip(short, complete, missing, strict=True):
        assert none.lack < 0.01 * size
        assert size / 2.5 < e.lack < 2.5 * size


def test_lack_that_is_none_goes_away():
    problem = LatticeProblem((128, 128), n=3, delta=2.0, merge=torch.bfloat16)
    much = (0.3 * problem.step) ** 2
    found = [replace(e, lack=much) for e in problem.estimates(0.05)]
    for _ in range(4):
        found = stepped(problem.entries, found, GRID, held_out((128, 128)))
    assert all(e.lack < 0.02 * much for e in found)


@pytest.mark.parametrize("much", [0.3, 0.01], ids=["open", "resolved"])
def test_what_one_fine_model_lacks_beside_coarse_ones_falls_slowly_while_it_is_open(much):
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    problem = LatticeProblem((128, 128), n=3, delta=2.0, merge=kinds)
    start = [replace(e, lack=(much * problem.step) ** 2) for e in problem.estimates(0.01)]
    found = stepped(problem.entries, start, GRID, held_out((128, 128)), careful=True)
    kept = [e.lack / before.lack for e, before in zip(found, start, strict=True)]
    assert kept[0] < 0.3
    assert all(share == pytest.approx(0.7) if much > 0.1 else share < 0.69 for share in kept[1:])
    hasty = stepped(problem.entries, start, GRID, held_out((128, 128)))
    assert all(e.lack < 0.3 * before.lack for e, before in zip(hasty, start, strict=True))


def test_a_row_that_its_held_entries_contradict_is_not_taken_for_known():
    problem = LatticeProblem((96, 128), n=1, delta=0.5)
    estimates = problem.estimates(0.01)
    estimates[0].left[7] += 0.3 * problem.step
    found = stepped(problem.entries, estimates, GRID, held_out((96, 128)))[0]
    assert found.rows[7] > 5 * found.rows.median()


def test_what_is_held_out_changes_no_factor():
    problem = LatticeProblem((64, 48), n=2, delta=0.5)
    held = held_out((64, 48))
    noise = torch.where(held, 0.05 * normal(seeded(3), 64, 48), 0.0)
    spoilt = StoredEntries(tuple((W_i + noise).to(W_i.dtype) for W_i in problem.stack.matrices))
    estimates = problem.estimates(0.1)
    found, other = (stepped(entries, estimates, GRID, held) for entries in (problem.entries, spoilt))
    for e, also in zip(found, other, strict=True):
        assert torch.equal(e.left, also.left)
        assert also.lack > e.lack


def test_models_without_directions_stay_without():
    problem = LatticeProblem((64, 48), n=2, delta=0.5)
    found = sweep(problem.entries, [Estimate.nothing((64, 48), problem.step**2)] * 2, GRID)
    assert [e.rank for e in found] == [0, 0]
    assert not np.isnan([e.variance for e in found]).any()
