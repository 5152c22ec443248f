"""Certificates say an error as a range of W-Error."""

import pytest

from detune.certificate.verdict import BAND, Certificate, Verdict
from detune.problem import PredictedError


def test_an_error_that_is_known_has_the_band_on_either_side():
    certificate = Certificate.of_error(Verdict.FLOOR, "why", 1e-16)
    assert certificate.predicted_w_error == pytest.approx(-16)
    assert certificate.best_w_error == pytest.approx(-16 - BAND)
    assert certificate.worst_w_error == pytest.approx(-16 + BAND)
    assert certificate.agreement is None
    assert certificate.undetermined == 0


def test_a_range_reaches_as_far_as_it_is_told_but_no_less_than_the_band():
    certificate = Certificate.of_error(Verdict.APPROXIMATE, "why", PredictedError(1e-8, 0.9e-8, 1e-6), 1e-7)
    assert certificate.best_w_error == pytest.approx(-8 - BAND)
    assert certificate.worst_w_error == pytest.approx(-6)
    assert certificate.agreement == pytest.approx(-7)


def test_an_error_that_may_be_none_has_no_lower_end():
    certificate = Certificate.of_error(Verdict.APPROXIMATE, "why", PredictedError(0.0, 0.0, 1e-9))
    assert certificate.predicted_w_error is None
    assert certificate.best_w_error is None
    assert certificate.worst_w_error == pytest.approx(-9)
