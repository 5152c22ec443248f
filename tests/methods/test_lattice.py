"""Which start the method takes, and what it answers where no grid shows."""

import pytest
import torch

from detune.lattice import NoGrid
from detune.methods import Auto, Lattice
from tests.lattice.problems import LatticeProblem


def test_three_models_without_a_grid_get_the_answer_of_auto_and_the_reason():
    problem = LatticeProblem((48, 40), rank=2, n=3, delta=2.0, off=True)
    recovery, auto = Lattice().solve(problem.stack), Auto(lattice=None).solve(problem.stack)
    assert recovery.bits is None
    assert torch.equal(recovery.weight, auto.weight)
    assert recovery.reason.startswith(auto.reason)
    assert "no grid of the base shows in 3 models" in recovery.reason


def test_one_model_without_a_grid_is_refused():
    problem = LatticeProblem((48, 40), rank=2, n=1, delta=0.2, off=True)
    with pytest.raises(NoGrid, match="no grid of the base shows in 1 model "):
        Lattice().solve(problem.stack)


def test_models_that_agree_are_unchanged():
    problem = LatticeProblem((48, 40), rank=2, n=3, delta=0.0)
    assert Lattice().solve(problem.stack).method == "unchanged"
