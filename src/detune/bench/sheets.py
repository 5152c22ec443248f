"""Tables as CSV files, whose texts a spreadsheet shows and does not compute."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detune.errors import printable

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["cell", "write_sheet"]

# Characters that begin a formula, in the wide forms of Chinese and Japanese keyboards too; OWASP, "CSV Injection".
_FORMULA = frozenset("=+-@＝＋－＠")


def cell(text: str) -> str:
    r"""Text as a cell that is no formula: one line, behind an apostrophe where a spreadsheet would compute it.

    Args:
        text: Any text, as of a method, a subset or a metric.

    Example:
        >>> print(cell("=cmd|' /C calc'!A0"), cell("\t=1+1"), cell("spectral"))
        '=cmd|' /C calc'!A0 \t=1+1 spectral
    """
    shown = printable(text)
    return f"'{shown}" if shown.lstrip()[:1] in _FORMULA else shown


def write_sheet(frame: "pd.DataFrame", file: Path) -> None:
    """Write a table; texts are quoted, so that no separator in them begins a cell.

    Args:
        frame: Its columns may be called anything.
        file: The CSV file.
    """

    def guarded(value: Any) -> Any:
        return cell(value) if isinstance(value, str) else value

    # Numbers are left alone: minus one is no formula.
    frame.map(guarded).rename(columns=guarded).to_csv(file, index=False, quoting=csv.QUOTE_NONNUMERIC)
