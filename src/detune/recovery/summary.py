"""A report for people, in the terminal and on the card: a line for each kind of tensor, and what became of the rest."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain, zip_longest
from operator import itemgetter

from detune.certificate.verdict import Verdict
from detune.compatibility.name_patterns import by_pattern, counted, spans
from detune.recovery.report import Report, TensorResult, w_error_range

__all__ = ["Doubt", "doubts", "report_table"]

# The chance that a base off the grid looks as if it were on it: one in billions at most, whatever the power of ten is.
OFF_GRID = re.compile(r"; off that grid with a probability below 1e-?\d+")
# A measured number: with a point, an exponent or a per cent sign. Counts and the models' numbers are none.
FIGURE = re.compile(r"-?\b\d+(?:\.\d+(?:e[-+]?\d+)?|e[-+]?\d+|(?= %))")


@dataclass(frozen=True)
class Doubt:
    """A reason why tensors are not to be trusted.

    Attributes:
        name: The first of them.
        others: How many more there are.
        reason: In one sentence.
    """

    name: str
    others: int
    reason: str

    def __str__(self) -> str:
        more = f" and {self.others} more" if self.others else ""
        return f"{self.name}{more}: {self.reason}"


def report_table(report: Report) -> tuple[list[str], list[tuple[str, ...]]]:
    """The tensors that differ between the models, by kind.

    Args:
        report: Report of `recover` or `inspect`.

    Returns:
        The names of the columns, and a row for each kind; no row where no tensor differs.
    """
    changed = [row for row in report.tensors if row.verdict is not Verdict.SHARED]
    columns = ["tensor", "shape", "verdict", "W-Error", "method", "ranks", "residual", "× noise"]
    on_grid = any(row.grid for row in changed)
    lines = [
        (
            counted(pattern, rows),
            "×".join(map(str, rows[0].shape)),
            str(rows[0].verdict),
            _expected(rows),
            rows[0].method,
            _ranks(rows),
            _largest(row.relative_residual for row in rows),
            _largest(row.noise_ratio for row in rows),
            *[_certain(rows)] * on_grid,
        )
        for (pattern, _), rows in by_pattern(changed, lambda row: row.verdict).items()
    ]
    return [*columns, *["certain bits"] * on_grid], lines


def doubts(report: Report) -> list[Doubt]:
    """The reasons why tensors are approximate or not determined: each once, with the span of its figures.

    How a tensor was found is left out, where the report tells it from how far it can be trusted. The most common first.
    """
    rows: dict[tuple[str, ...], list[TensorResult]] = {}
    for row in report.tensors:
        if row.verdict in (Verdict.NOT_DETERMINED, Verdict.APPROXIMATE):
            rows.setdefault(tuple(FIGURE.split(_why(row))), []).append(row)
    return [
        Doubt(alike[0].name, len(alike) - 1, _spanned(words, [_why(row) for row in alike]))
        for words, alike in sorted(rows.items(), key=lambda each: -len(each[1]))
    ]


def _why(row: TensorResult) -> str:
    return OFF_GRID.sub("", row.trust or row.reason)


def _spanned(words: tuple[str, ...], reasons: list[str]) -> str:
    """A sentence of these words, between which stands the span of the figures that the reasons have there."""
    figures = zip(*(FIGURE.findall(reason) for reason in reasons), strict=True)
    ends = [sorted(set(found), key=Decimal) for found in figures]
    spans = [found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}" for found in ends]
    return "".join(chain.from_iterable(zip_longest(words, spans, fillvalue="")))


def _ranks(rows: list[TensorResult]) -> str:
    found = spans(rows)
    return found[0] if found and len(set(found)) == 1 else ", ".join(found)


def _expected(rows: Sequence[TensorResult]) -> str:
    """The W-Error to expect, the worst of a kind; a range where no more is known. An exact tensor has none."""
    known = [(row.worst_w_error, row) for row in rows if row.worst_w_error is not None]
    if not known:
        return "none" if rows[0].verdict is Verdict.EXACT else ""
    end, worst = max(known, key=itemgetter(0))
    if worst.verdict is Verdict.APPROXIMATE:
        return w_error_range(worst.best_w_error, end)
    return f"{worst.predicted_w_error:.2f}"


def _certain(rows: Sequence[TensorResult]) -> str:
    """The least share of entries that are certain on the base's grid, cut so that only all is 100 %."""
    shares = [row.certain if row.grid else None for row in rows]
    if None in shares:
        return "-"
    grids = "/".join(dict.fromkeys(row.grid or "" for row in rows))
    return f"{math.floor(10000 * min(share or 0.0 for share in shares)) / 100:g} % {grids}"


def _largest(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.2g}" if known else ""
