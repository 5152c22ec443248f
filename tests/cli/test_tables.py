"""What the tables say of an error."""

import pytest

from detune.certificate.verdict import Verdict
from detune.cli.tables import show_report
from detune.origin import Origin
from detune.recovery.report import Report, TensorResult


def row(verdict: Verdict, *errors: float | None) -> TensorResult:
    predicted, best, worst = errors
    return TensorResult(
        "w",
        (4, 4),
        "float32",
        verdict,
        "intersect",
        "why",
        Origin.SOLVED,
        predicted_w_error=predicted,
        best_w_error=best,
        worst_w_error=worst,
    )


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (row(Verdict.FLOOR, -16.12, -16.42, -15.82), "-16.12"),
        (row(Verdict.APPROXIMATE, -6.6, -6.9, -4.14), "-6.9 to -4.1"),
        (row(Verdict.APPROXIMATE, -34.0, None, -33.06), "up to -33.1"),
        (row(Verdict.APPROXIMATE, None, None, -33.06), "up to -33.1"),
        (row(Verdict.EXACT, None, None, None), "none"),
    ],
)
def test_a_range_is_shown_where_no_more_is_known(given, shown, capsys):
    show_report(Report({}, (), (given,), 1.0))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("w "))
    assert f" {shown} " in line


def test_the_worst_of_a_kind_is_shown(capsys):
    rows = tuple(
        TensorResult(
            f"w.{i}", (4, 4), "float32", Verdict.APPROXIMATE, "polish", "why", Origin.SOLVED, (), *[None] * 3, *errors
        )
        for i, errors in enumerate([(-7.0, -7.3, -6.0), (-6.6, -6.9, -4.1), (None, None, -5.0)])
    )
    show_report(Report({}, (), rows, 1.0))
    assert "-6.9 to -4.1" in capsys.readouterr().out


def test_a_reason_that_several_have_is_told_once(capsys):
    rows = tuple(
        TensorResult(f"w.{i}", (4, 4), "float32", Verdict.APPROXIMATE, "polish", reason, Origin.SOLVED)
        for i, reason in enumerate(["why", "because", "why", "why"])
    )
    show_report(Report({}, (), rows, 1.0))
    assert capsys.readouterr().out.splitlines()[-2:] == ["  w.0 and 2 more: why", "  w.1: because"]


def test_reasons_that_differ_in_figures_are_told_with_their_span(capsys):
    reasons = [
        "4 sweeps; 97.5 % at 1e-432",
        "4 sweeps; 9 % at 1e-91",
        "3 sweeps; 9 % at 1e-91",
        "4 sweeps; 97.5 % at 0.5",
    ]
    rows = tuple(
        TensorResult(f"w.{i}", (4, 4), "float32", Verdict.APPROXIMATE, "polish", reason, Origin.SOLVED)
        for i, reason in enumerate(reasons)
    )
    show_report(Report({}, (), rows, 1.0))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "  w.0 and 2 more: 4 sweeps; 9 to 97.5 % at 1e-432 to 0.5",
        "  w.2: 3 sweeps; 9 % at 1e-91",
    ]


def test_the_summary_has_the_end_of_of_the_worst():
    report = Report({}, (), (row(Verdict.APPROXIMATE, -6.6, -6.9, -4.1), row(Verdict.FLOOR, -9, -9.3, -8.7)), 1.0)
    assert report.summary["worst_w_error"] == -4.1
