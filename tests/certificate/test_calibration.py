"""From a predicted error to a range and a verdict, by the bins of a corpus."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from detune.certificate import calibration, grid_error
from detune.certificate.calibration import Assessment, Band, band
from detune.certificate.certify import assess, calibrated
from detune.certificate.verdict import BAND, Verdict
from detune.methods import Auto
from detune.problem import Stack
from tests.cases import Regime, make_problem, seeded

MADE_UP = {
    "least squares": {
        "seen": {"x": [0.0, 10.0]},
        "tree": {
            "covariate": "x",
            "at": 1.0,
            "below": {"problems": 50, "log10": [-0.1, 0.0, 0.2]},
            "above": {"problems": 40, "log10": [None, -2.0, 1.5]},
        },
    }
}
LEAST_SQUARES = {
    "least squares",
    "least squares, steep storing",
    "least squares, steep storing of float64",
    "held down",
    "least squares, in doubt",
    "least squares, deltas below a step",
}
KNOWN = Assessment("least squares", 1e-8, {"x": 0.5}, (), True, "storage noise is all that is left")


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_calibration", lambda: MADE_UP)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (0.5, Band(-0.1, 0.0, 0.2, 50)),
        (1.0, Band(-math.inf, -2.0, 1.5, 40)),
        (11.0, Band(-math.inf, -2.0, 1.5, 40, seen=False)),
    ],
)
def test_finds_the_bin(made_up, x, expected):
    assert band(replace(KNOWN, covariates={"x": x})) == expected


def test_a_narrow_range_is_the_floor(made_up):
    found = calibrated(KNOWN)
    assert found.verdict is Verdict.FLOOR
    assert (found.best_w_error, found.predicted_w_error, found.worst_w_error) == (-8 - BAND, -8.0, -8 + BAND)
    assert found.reason == "storage noise is all that is left"
    assert found.undetermined == 0


def test_a_wide_range_is_approximate(made_up):
    found = calibrated(replace(KNOWN, covariates={"x": 2.0}))
    assert found.verdict is Verdict.APPROXIMATE
    assert (found.best_w_error, found.predicted_w_error, found.worst_w_error) == (None, -10.0, -6.5)
    assert "known to a factor only" in found.reason


def test_an_answer_that_is_not_the_best_is_approximate_however_well_known(made_up):
    found = calibrated(replace(KNOWN, at_floor=False, doubts=("the solver stopped short", "and more")))
    assert found.verdict is Verdict.APPROXIMATE
    assert found.reason == "the solver stopped short; and more"


def test_what_parts_disagree_by_is_in_the_range(made_up):
    found = calibrated(replace(KNOWN, agreement=1e-6))
    assert found.agreement == found.worst_w_error == pytest.approx(-6)
    assert found.verdict is Verdict.APPROXIMATE


def test_says_where_no_problem_of_the_corpus_was_like_it(made_up):
    assert "the calibration has seen no problem like it" in calibrated(replace(KNOWN, covariates={"x": -1.0})).reason


def leaves(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "covariate" in tree:
        yield from leaves(tree["below"])
        yield from leaves(tree["above"])
    else:
        yield tree


def test_every_bin_is_shipped():
    shipped = calibration._calibration()
    assert set(shipped) >= LEAST_SQUARES
    for alike, finer, expected in product((True, False), repeat=3):
        assert grid_error._basis(alike, finer, expected) in shipped
    for bin_ in shipped.values():
        for leaf in leaves(bin_["tree"]):
            low, middle, high = (-math.inf if end is None else end for end in leaf["log10"])
            assert low <= middle <= high < math.inf


@pytest.mark.parametrize(("grid", "basis"), [(True, "grid"), (False, "least squares")])
def test_bins_ask_for_what_an_assessment_has(grid, basis):
    given = make_problem(Regime(shape=(64, 48), ranks=(3, 3, 3), scale=1e-2), seeded())
    W = given.W_star.bfloat16() if grid else given.W_star
    models = torch.stack([(W + M_i).to(torch.bfloat16 if grid else torch.float32) for M_i in given.deltas])
    stack = Stack.of(models)
    found = assess(stack, Auto(lattice=Auto().lattice if grid else None).solve(stack), models.dtype)
    assert isinstance(found, Assessment)
    assert found.basis.startswith(basis)
    assert all(math.isfinite(value) for value in found.covariates.values())
    for name, bin_ in calibration._calibration().items():
        if name.startswith(basis):
            assert set(bin_["seen"]) <= set(found.covariates)
    assert calibrated(found).worst_w_error is not None
