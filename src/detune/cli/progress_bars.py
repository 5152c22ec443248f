"""How progress looks: bars with the time left, a line of words, and the bars of the Hub's client. All are on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from detune.cli.terminal import duration, say
from detune.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress, Task

__all__ = ["clients_bars", "progress_bar", "status"]

# How much of the past an estimate of the time left looks at.
AVERAGED_SECONDS = 1800


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
