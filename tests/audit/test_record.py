"""What an audit says of an error that nobody measured."""

import pytest

from detune.audit.record import CurvePoint, Outcome
from detune.origin import Origin


@pytest.mark.parametrize(
    ("verdict", "errors", "shown"),
    [
        ("to the storage floor", (-16.123, -16.423, -15.823), "-16.12"),
        ("approximate", (-6.6, -6.9, -4.14), "-6.9 to -4.1"),
        ("approximate", (-34.0, None, -33.06), "up to -33.1"),
        ("exact", (None, None, None), ""),
    ],
)
def test_a_tensor_has_a_range_where_no_more_is_known(verdict, errors, shown):
    predicted, best, worst = errors
    outcome = Outcome(
        models=3,
        verdict=verdict,
        method="intersect",
        reason="why",
        origin=Origin.SOLVED,
        predicted_w_error=predicted,
        best_w_error=best,
        worst_w_error=worst,
        given_away=False,
        seconds=1.0,
    )
    assert outcome.expected == shown


@pytest.mark.parametrize(
    ("errors", "shown"),
    [
        ((-16.1, -16.4, -15.8), "-16.10"),
        ((-16.1, -16.9, -15.0), "-16.9 to -15.0"),
        ((-16.1, None, -15.0), "up to -15.0"),
        ((None, None, None), ""),
    ],
)
def test_so_have_all_together(errors, shown):
    predicted, best, worst = errors
    point = CurvePoint(models=3, given_away=0, predicted_w_error=predicted, best_w_error=best, worst_w_error=worst)
    assert point.expected == shown
