"""Estimates of a recovery's deltas: the same deltas, as uncertain as the models' rounding makes them."""

from dataclasses import replace

import pytest
import torch

from detune.lattice.start import from_least_squares, from_some
from detune.methods import Auto
from tests.cases import rms
from tests.lattice.problems import LatticeProblem


@pytest.mark.parametrize("merge", [torch.bfloat16, torch.float32], ids=str)
def test_estimates_are_as_far_off_as_they_say(merge):
    problem = LatticeProblem((128, 96), delta=8.0, merge=merge, off=True)
    found = Auto(lattice=None).solve(problem.stack)
    for e, M_i in zip(from_least_squares(problem.stack, found), problem.deltas, strict=True):
        assert e.rank == 4
        error = rms(e.low_rank.dense() - M_i)
        assert error / 4 < e.variance**0.5 < 4 * error


def test_a_model_that_differs_by_more_than_its_delta_lacks_it():
    problem = LatticeProblem((128, 96), delta=8.0, merge=torch.bfloat16, off=True)
    found = Auto(lattice=None).solve(problem.stack)
    rank_zero = replace(found.deltas[2], left=found.deltas[2].left[:, :0], right=found.deltas[2].right[:, :0])
    missing = replace(found, deltas=(*found.deltas[:2], rank_zero))
    first, _, last = from_some(problem.stack, missing)
    assert last.lack**0.5 == pytest.approx(rms(problem.deltas[2]), rel=0.2)
    assert first.lack == from_least_squares(problem.stack, found)[0].lack
