"""The look of progress: bars with the time left, and the bars of the Hub's client."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from detune.cli.terminal import duration
from detune.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress, Task

__all__ = ["clients_bars", "progress_bar"]

# The part of the past that an estimate of the time left looks at.
AVERAGED_SECONDS = 1800


@contextmanager
def progress_bar(*, unit: Literal["bytes", "parts"], quiet: bool = False, stderr: bool = True) -> "Iterator[Progress]":
    """A bar of a terminal only; gone when done. Descriptions pass through `printable`.

    Args:
        unit: What it counts. A task has a field `describe`, which is called whenever the bar is drawn.
        quiet: Whether there is to be none, and nothing printed to its console.
        stderr: Whether it is drawn on stderr, or on stdout.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column
    from rich.text import Text

    class Description(TextColumn):
        def render(self, task: "Task") -> Text:
            return Text(printable(task.fields["describe"]()))

    class Amount(TextColumn):
        def render(self, task: "Task") -> Text:
            if task.total is None:
                return Text()
            if unit == "parts":
                return Text(f"{task.completed:.0f} of {task.total:.0f}")
            return Text(f"{_size(task.completed)} of {_size(task.total)}")

    class Left(TextColumn):
        def render(self, task: "Task") -> Text:
            left = task.time_remaining
            return Text("" if left is None or task.finished else f"about {duration(left)} left")

    console = Console(stderr=stderr, quiet=quiet, highlight=False)
    # Where a terminal is narrow, the name of what is in work is cut, and nothing else.
    description = Description("", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    # The estimate is by the average: tensors that are copied and tensors that are computed take turns.
    with Progress(
        *(SpinnerColumn(), BarColumn(12), Amount(""), TimeElapsedColumn(), Left(""), description),
        console=console,
        transient=True,
        expand=True,
        disable=quiet or not console.is_terminal,
        speed_estimate_period=AVERAGED_SECONDS,
    ) as bar:
        yield bar


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


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
