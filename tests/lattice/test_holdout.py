"""The test for a grid: strong where the base is on it, against it where it is not, and fair to uncertain estimates."""

import pytest
import torch

from detune.lattice.entries import grid_of
from detune.lattice.holdout import HELD, calibrated, held_out, log10_ratio
from tests.lattice.problems import LatticeProblem

GRID = grid_of(torch.bfloat16)
ALL = held_out((96, 80), 0)


def problem(*, off: bool = False) -> LatticeProblem:
    return LatticeProblem((96, 80), rank=2, n=2, delta=0.5, off=off)


def test_a_share_of_the_entries_is_held_out():
    held = held_out((400, 300), 3)
    assert float(held.double().mean()) == pytest.approx(HELD, rel=0.05)
    assert torch.equal(held, held_out((400, 300), 3))
    assert not torch.equal(held, held_out((400, 300), 4))


def test_entries_tell_a_grid_from_none():
    on, off = problem(), problem(off=True)
    assert log10_ratio(on.entries, on.estimates(0.02), GRID, ALL) > 100
    assert log10_ratio(off.entries, off.estimates(0.02), GRID, ALL) < -100


def test_estimates_that_know_nothing_tell_nothing():
    on = problem()
    assert abs(log10_ratio(on.entries, on.estimates(3.0), GRID, ALL)) < 1


def test_variances_that_promise_too_much_are_corrected():
    """The true errors are four times as large as the estimates say."""
    on = problem()
    promised = [e.wider(1 / 16) for e in on.estimates(0.2)]
    found = calibrated(on.entries, promised, GRID, ALL)
    assert found is not None
    factors = [after.variance / before.variance for after, before in zip(found, promised, strict=True)]
    assert factors == pytest.approx([16.0, 16.0])


def test_no_grid_shows_under_any_variance_where_there_is_none():
    off = problem(off=True)
    assert calibrated(off.entries, off.estimates(0.1), GRID, ALL) is None
