"""Certificates say an error as a range of W-Error."""

import math

import pytest

from detune.certificate.verdict import BAND, Certificate, Trust, Verdict
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


def test_scales_with_the_weight():
    certificate = Certificate.of_error(Verdict.APPROXIMATE, "why", PredictedError(1e-8, 0.0, 1e-6))
    scaled = certificate.times_power_of_two(-600)
    shift = 1200 * math.log10(2)
    assert scaled.predicted_w_error == pytest.approx(-8 - shift)
    assert scaled.best_w_error is None
    assert scaled.worst_w_error == pytest.approx(-6 - shift)


@pytest.mark.parametrize(
    ("certificate", "verdict", "worst"),
    [
        (Certificate(Verdict.EXACT, "why"), Verdict.APPROXIMATE, -6.0),
        (Certificate.of_error(Verdict.FLOOR, "why", 1e-16), Verdict.APPROXIMATE, -6.0),
        (Certificate.of_error(Verdict.APPROXIMATE, "why", PredictedError(0.0, 0.0, 1e-6)), Verdict.APPROXIMATE, -5.7),
        (Certificate(Verdict.NOT_DETERMINED, "why", 3), Verdict.NOT_DETERMINED, None),
    ],
)
def test_one_more_doubt_adds_to_the_upper_end(certificate, verdict, worst):
    doubted = certificate.but("and more", -6.0)
    assert doubted.verdict is verdict
    assert doubted.reason == "why; and more"
    assert doubted.predicted_w_error == certificate.predicted_w_error
    assert doubted.worst_w_error == (None if worst is None else pytest.approx(worst, abs=0.01))


def test_a_doubt_that_adds_nothing_is_none():
    certificate = Certificate.of_error(Verdict.FLOOR, "why", 1e-16)
    assert certificate.but("and more", -18.0) is certificate


@pytest.mark.parametrize(
    ("certificate", "verdict", "ends"),
    [
        (Certificate(Verdict.EXACT, "why"), Verdict.FLOOR, (-6.3, -6.0, -5.7)),
        (Certificate.of_error(Verdict.FLOOR, "why", 1e-16), Verdict.FLOOR, (-6.3, -6.0, -5.7)),
        (
            Certificate.of_error(Verdict.APPROXIMATE, "why", PredictedError(1e-6, 0.0, 1e-4)),
            Verdict.APPROXIMATE,
            (-6.0, -5.7, -4.0),
        ),
    ],
)
def test_what_its_dtype_does_not_hold_is_lost(certificate, verdict, ends):
    rounded = certificate.rounded("bfloat16", 1e-6)
    assert rounded.verdict is verdict
    assert rounded.reason == "why; then rounded to bfloat16, which does not hold it"
    found = (rounded.best_w_error, rounded.predicted_w_error, rounded.worst_w_error)
    assert found == pytest.approx(ends, abs=0.01)


def test_what_its_dtype_holds_stays_as_it_is():
    certificate = Certificate(Verdict.EXACT, "why")
    assert certificate.rounded("float32", 0.0) is certificate


def test_every_verdict_is_put_in_words():
    for verdict in Verdict:
        assert verdict.trust in Trust
        assert not verdict.summary.endswith(".")
        assert verdict.meaning.endswith(".")
