"""Text in Markdown that stays text: no tags, links, code, cells or comments of its own."""

import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from detune.errors import printable

__all__ = ["code", "fenced", "link", "table", "text"]

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKS = frozenset("\\`*_[]|~#$")
# Marks that begin a list or a heading where they stand first.
_LEADING = frozenset("-+=")


def text(plain: str) -> str:
    r"""Text as Markdown shows it: one line, in a cell, a heading or a paragraph.

    Args:
        plain: Any text.

    Example:
        >>> print(text("a|b <!-- [x](https://example.org) *c*"))
        a\|b &lt;!-- \[x\](https:&#47;&#47;example.org) \*c\*
    """
    shown = "".join(f"\\{each}" if each in _MARKS else _ENTITIES.get(each, each) for each in printable(plain))
    # A bare address would become a link.
    shown = shown.replace("://", ":&#47;&#47;").replace("www.", "www&#46;")
    return f"\\{shown}" if shown[:1] in _LEADING else shown


def code(plain: str) -> str:
    """Text as code; backquotes in it become apostrophes.

    Args:
        plain: Any text.

    Example:
        >>> code("layer.0.`weight`")
        "`layer.0.'weight'`"
    """
    shown = printable(plain).replace("`", "'")
    return f"`{shown or ' '}`"


def link(plain: str, target: str) -> str:
    """A link.

    Args:
        plain: What is shown.
        target: A path or an address.

    Example:
        >>> link("a", "entries/a b).json")
        '[a](entries/a%20b%29.json)'
    """
    return f"[{text(plain)}]({quote(target, safe=':/?#@!&+,;=%~.-_')})"


def fenced(lines: Iterable[str], language: str = "") -> str:
    """Lines as a block of code, behind a fence that none of them can close.

    Args:
        lines: Any text, each a line.
        language: Language of the code; ours.

    Example:
        >>> print(fenced(["detune recover a b c --out base"]))
        ```
        detune recover a b c --out base
        ```
        <BLANKLINE>
    """
    shown = [printable(line) for line in lines]
    longest = max((len(run) for line in shown for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join((f"{fence}{language}", *shown, fence, ""))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""A table of texts.

    Args:
        columns: Their names.
        rows: The cells of each.

    Example:
        >>> print(table(("name", "rank"), [("layer.*", "8")]))
        | name | rank |
        | --- | --- |
        | layer.\* | 8 |
        <BLANKLINE>
    """
    cells = [[text(cell) for cell in row] for row in (columns, *rows)]
    cells.insert(1, ["---"] * len(columns))
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)
