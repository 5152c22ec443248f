"""Bases that lie on no grid: the mean between the intervals against least squares, and against the truth."""

import math

import pytest
import torch

from detune.certificate.certify import Verdict, certify
from detune.lattice import LatticeSearch
from detune.methods import Auto
from detune.metrics import w_error
from detune.problem.recovery import Recovery
from tests.lattice.problems import LatticeProblem

LEAST_SQUARES = Auto(lattice=None)


def both(problem: LatticeProblem) -> tuple[Recovery, Recovery]:
    """By least squares, and what comes of it."""
    start = LEAST_SQUARES.solve(problem.stack)
    return start, LatticeSearch().without_grid(problem.stack, start)


@pytest.mark.parametrize("n", [3, 8])
@pytest.mark.parametrize("merge", [torch.bfloat16, torch.float16], ids=str)
def test_closer_than_an_average_by_what_intervals_have_in_common(n, merge):
    """With the M_i known the mean of n has `step^2 / 12 n`, the middle of what is left `step^2 / 2 (n + 1) (n + 2)`."""
    problem = LatticeProblem((128, 96), rank=2, n=n, delta=30.0, merge=merge, off=True)
    start, found = both(problem)
    known = math.log10((n + 1) * (n + 2) / (6 * n))
    assert w_error(start.weight, problem.W) - w_error(found.weight, problem.W) > 0.7 * known
    assert found.method.endswith("+intervals")
    assert found.ranks == start.ranks == (2,) * n


def test_a_model_stored_finely_counts_for_more():
    """Two of three are float32: least squares has a ninth of the bf16 model's noise, W itself far less."""
    merges = (torch.bfloat16, torch.float32, torch.float32)
    problem = LatticeProblem((128, 96), rank=2, n=3, delta=30.0, merge=merges, off=True)
    start, found = both(problem)
    assert w_error(found.weight, problem.W) < w_error(start.weight, problem.W) - 0.3


@pytest.mark.parametrize(("shape", "rank", "n"), [((128, 96), 2, 8), ((96, 96), 8, 3), ((64, 96), 8, 5)])
def test_the_certificate_knows_what_was_gained(shape, rank, n):
    problem = LatticeProblem(shape, rank=rank, n=n, delta=30.0, merge=torch.bfloat16, off=True)
    start, found = both(problem)
    before, after = (certify(problem.stack, recovery, torch.float32) for recovery in (start, found))
    assert before.verdict is after.verdict is Verdict.FLOOR
    assert after.predicted_w_error < before.predicted_w_error
    assert after.predicted_w_error == pytest.approx(w_error(found.weight, problem.W), abs=0.3)


class TestLeavesAlone:
    def test_float32_models(self):
        start, found = both(LatticeProblem((64, 48), rank=2, n=3, delta=30.0, off=True))
        assert found is start

    def test_deltas_that_least_squares_does_not_see(self):
        start, found = both(LatticeProblem((96, 64), rank=1, n=4, delta=0.4, merge=torch.bfloat16, off=True))
        assert found is start

    def test_a_start_that_does_not_explain_the_models(self):
        problem = LatticeProblem((64, 48), rank=4, n=3, delta=30.0, merge=torch.bfloat16, off=True)
        start = LEAST_SQUARES.solve(problem.stack, rank=2)
        assert LatticeSearch().without_grid(problem.stack, start) is start
