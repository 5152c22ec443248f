"""The fit on one grid: it ends where nothing new comes, in a block first where the matrix is large."""

from dataclasses import replace

import torch

from detune.lattice import fit
from detune.lattice.estimate import Estimate
from detune.lattice.fit import Sweeps
from detune.lattice.holdout import held_out
from tests.lattice.problems import LatticeProblem

SWEEPS = Sweeps(most=16, least_gain=0.97, patience=2, seed=0)
GRID = torch.bfloat16


def nothing(problem: LatticeProblem, delta: float) -> list[Estimate]:
    return [Estimate.nothing(problem.stack.shape, (delta * problem.step) ** 2)] * problem.stack.n


class TestUntilSettled:
    problem = LatticeProblem((128, 96), rank=2, delta=0.5, merge=torch.bfloat16)
    held = held_out((128, 96), 0)

    def test_stops_before_the_last_sweep(self):
        found, sweeps = SWEEPS.until_settled(self.problem.entries, nothing(self.problem, 0.5), GRID, self.held, None)
        assert 1 < sweeps < SWEEPS.most
        assert [e.rank for e in found] == [2, 2, 2]
        assert max(self.problem.off(found)) < 0.2

    def test_sweeps_no_more_than_it_may(self):
        few = replace(SWEEPS, most=2)
        _, sweeps = few.until_settled(self.problem.entries, nothing(self.problem, 0.5), GRID, self.held, None)
        assert sweeps == 2

    def test_no_delta_needs_no_sweep(self):
        same = replace(self.problem.entries, matrices=(self.problem.W.bfloat16(),) * 3)
        _, sweeps = SWEEPS.until_settled(same, nothing(self.problem, 0.1), GRID, self.held, None)
        assert sweeps == 0

    def test_no_model_has_more_directions_than_the_rank(self):
        found, _ = SWEEPS.until_settled(self.problem.entries, nothing(self.problem, 0.5), GRID, self.held, 1)
        assert [e.rank for e in found] == [1, 1, 1]


class TestFit:
    def test_what_is_known_to_a_thousandth_of_a_step_is_not_swept(self):
        problem = LatticeProblem((128, 96), rank=2, delta=2.0)
        found = SWEEPS.fit(problem.entries, problem.estimates(1e-4), GRID, None, None)
        assert found is not None
        assert found.sweeps == 0
        assert found.log10_false_positive < -100

    def test_deltas_on_no_grid_are_refused_at_once(self):
        problem = LatticeProblem((128, 96), rank=2, delta=2.0, off=True)
        assert SWEEPS.fit(problem.entries, problem.estimates(0.05), GRID, None, None) is None

    def test_a_block_gives_all_rows_and_columns(self, monkeypatch):
        monkeypatch.setattr(fit, "BLOCK", 96)
        problem = LatticeProblem((256, 192), rank=2, delta=2.0, merge=torch.bfloat16)
        found = SWEEPS.fit(problem.entries, nothing(problem, 2.0), GRID, None, None)
        assert found is not None
        assert found.estimates[0].left.shape == (256, 2)
        assert found.estimates[0].right.shape == (192, 2)
        assert max(problem.off(found.estimates)) < 0.3
