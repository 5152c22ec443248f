"""The one way to the terminal: nothing that stands in a file reaches it raw, as control characters or as markup."""

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import click

from detune.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress, Task
    from rich.table import Column

__all__ = [
    "Branch",
    "Formatter",
    "clients_bars",
    "duration",
    "progress_bar",
    "say",
    "say_json",
    "show_table",
    "show_tree",
    "status",
]

# How much of the past an estimate of the time left looks at.
AVERAGED_SECONDS = 1800


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
    table = Table(
        # Where a terminal is narrow, what a row is about is folded and not cut.
        Column(name, overflow="fold") if isinstance(name, str) else name,
        *others,
        title=Text(printable(title)) if title else None,
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(markup=False, highlight=False, emoji=False).print(table)


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


@contextmanager
def progress_bar(*, unit: Literal["steps", "bytes"], quiet: bool = False) -> "Iterator[Progress]":
    """A bar on stderr, of a terminal only; gone when done. Descriptions pass through `printable`.

    Args:
        unit: What it counts. A task in bytes has a field `describe`, which is called whenever the bar is drawn.
        quiet: Whether there is to be none.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Description(TextColumn):
        def render(self, task: "Task") -> Text:
            describe = task.fields.get("describe")
            return Text(printable(describe() if describe else task.description))

    class Amount(TextColumn):
        def render(self, task: "Task") -> Text:
            return Text("" if task.total is None else f"{_size(task.completed)} of {_size(task.total)}")

    class Left(TextColumn):
        def render(self, task: "Task") -> Text:
            left = task.time_remaining
            return Text("" if left is None or task.finished else f"about {duration(left)} left")

    columns = {
        "steps": (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Left(""), Description("")),
        "bytes": (SpinnerColumn(), BarColumn(20), Amount(""), TimeElapsedColumn(), Left(""), Description("")),
    }[unit]
    console = Console(stderr=True)
    shown = not quiet and console.is_terminal
    # The estimate is by the average: tensors that are copied and tensors that are computed take turns.
    with Progress(
        *columns, console=console, transient=True, disable=not shown, speed_estimate_period=AVERAGED_SECONDS
    ) as bar:
        yield bar


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


@contextmanager
def status(first: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show what is done on stderr, in words; in a terminal they are gone when done.

    Args:
        first: The words until others come.
        quiet: Whether there are to be none.

    Yields:
        What takes the words.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda text: None if quiet else say(text, err=True)
        return
    with console.status(Text(printable(first))) as shown:
        yield lambda text: shown.update(Text(printable(text)))


@contextmanager
def clients_bars(*, quiet: bool) -> Iterator[None]:
    """Bars of the Hub's client in the block, on stderr, of a terminal only.

    Args:
        quiet: Whether there are to be none.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or (sys.stderr.isatty() and not quiet):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


class Formatter(logging.Formatter):
    """Log records whose message is one line, whatever names are in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        record.message = printable(record.message)
        return super().formatMessage(record)
