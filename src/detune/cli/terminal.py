"""The one way to the terminal: nothing that stands in a file reaches it raw, as control characters or as markup."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from detune.errors import printable

if TYPE_CHECKING:
    from rich.table import Column

__all__ = [
    "Branch",
    "Formatter",
    "duration",
    "say",
    "say_json",
    "show_table",
    "show_tree",
]


@dataclass(frozen=True)
class Branch:
    """A branch of a tree to print.

    Attributes:
        label: Its text.
        branches: What hangs from it.
    """

    label: str
    branches: "tuple[Branch, ...]" = ()


def say(text: str = "", *, err: bool = False, bold: bool = False) -> None:
    """Print one line."""
    text = printable(text)
    click.echo(click.style(text, bold=True) if bold else text, err=err)


def say_json(text: str) -> None:
    """Print JSON as it is, but for characters that a terminal would obey, which JSON can write in letters."""
    shown = (each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text)
    click.echo("".join(shown), nl=False)


def show_table(columns: "Sequence[str | Column]", rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table.

    Args:
        columns: Their names, or rich's columns.
        rows: The cells of each.
        title: What stands above it.
    """
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    name, *others = columns
    shown = [tuple(map(printable, row)) for row in rows]
    table = Table(
        # Where a terminal is narrow, what a row is about is folded and not cut; all else stands in whole words.
        Column(name, overflow="fold") if isinstance(name, str) else name,
        *(
            Column(each, min_width=_longest_word(shown, i)) if isinstance(each, str) else each
            for i, each in enumerate(others, 1)
        ),
        title=Text(printable(title)) if title else None,
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for row in shown:
        table.add_row(*map(Text, row))
    Console(markup=False, highlight=False, emoji=False).print(table)


def _longest_word(rows: "Sequence[Sequence[str]]", column: int) -> int:
    """The length of the longest word in a column."""
    return max((len(word) for row in rows for word in row[column].split()), default=0)


def terminal_width() -> int:
    """The number of characters in a line."""
    from rich.console import Console

    return Console().width


def show_tree(label: str, branches: "Iterable[Branch]") -> None:
    """Print a tree.

    Args:
        label: What stands at its root.
        branches: What hangs from it: labels with their own branches.
    """
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    def grow(tree: Tree, branches: "Iterable[Branch]") -> Tree:
        for branch in branches:
            grow(tree.add(Text(printable(branch.label))), branch.branches)
        return tree

    Console(markup=False, highlight=False, emoji=False).print(grow(Tree(Text(printable(label))), branches))


def duration(seconds: float) -> str:
    """A time as people say it.

    Example:
        >>> [duration(seconds) for seconds in (0.2, 42, 150, 7300, 200_000)]
        ['0.2 s', '42 s', '2.5 min', '2 h 2 min', '55 h 33 min']
    """
    if seconds < 100:
        return f"{seconds:.2g} s"
    if seconds < 5400:
        return f"{seconds / 60:.2g} min"
    return f"{int(seconds // 3600)} h {round(seconds % 3600 / 60)} min"


class Formatter(logging.Formatter):
    """Log records whose message is one line, whatever names are in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        record.message = printable(record.message)
        return super().formatMessage(record)
