"""Progress of a command: the tensors in work, what is left of them, and in the end what has taken longest."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from detune.cli.loading import load_torch
from detune.cli.progress_bars import progress_bar
from detune.cli.terminal import duration, say

__all__ = ["Progress", "progress"]

OPENING, FINISHING = "opening the models", "finishing"
# The number that are named in the end, where the whole took that long.
LONGEST = 3
WORTH_TELLING_SECONDS = 10.0


class Bar(Protocol):
    """The part of a bar of `progress_bar` that is used here."""

    @property
    def console(self) -> Any:
        """The console that it is drawn on."""

    def add_task(self, description: str, *, total: None, **fields: Any) -> Any:
        """Add a task of a size that is not known yet."""

    def reset(self, task_id: Any, *, total: float, **fields: Any) -> None:
        """Begin the task anew, with its size."""

    def advance(self, task_id: Any, advance: float) -> None:
        """Take it that so much more is done."""


class Progress:
    """A bar of a command's tensors or other parts. Called with a name when one is begun, and with what it became.

    Args:
        bar: The bar.
        in_words: Whether each part is also told in a line of its own when it is begun: where no bar is seen.

    Attributes:
        console: Where the bar is drawn: what is printed there meanwhile stands above it.
    """

    def __init__(self, bar: Bar, in_words: bool = False) -> None:
        self._bar, self._in_words = bar, in_words
        self.console = bar.console
        self._sizes: Mapping[str, int] = {}
        self._left: set[str] = set()
        # The tensors in work, and when each was begun.
        self._began: dict[str, float] = {}
        self._stage, self._stage_began = OPENING, time.monotonic()
        self._seconds: dict[str, float] = {}
        # Last: it is drawn at once.
        self._task = bar.add_task("", total=None, describe=self._describe)

    def start(self, sizes: Mapping[str, int]) -> None:
        """Take the parts that are still to come, with the size of each; after them there may be others."""
        self.stage(FINISHING)
        self._sizes, self._left = sizes, set(sizes)
        if sizes:
            self._bar.reset(self._task, total=sum(sizes.values()), describe=self._describe)

    def __call__(self, name: str, became: object = None) -> None:
        """Take it that a part was begun, or what became of it: with the time, if that is known."""
        if became is None:
            self._began[name] = time.monotonic()
            if self._in_words:
                total = len(self._sizes)
                say(f"{name} ({total - len(self._left) + 1} of {total})", err=True)
            return
        since = time.monotonic() - self._began.pop(name, time.monotonic())
        # Tensors that were complete before are told before the start.
        if name in self._left:
            self._left.remove(name)
            self._seconds[name] = self._seconds.get(name, 0.0) + (getattr(became, "seconds", None) or since)
            self._bar.advance(self._task, self._sizes[name])
            if not self._left:
                self._stage_began = time.monotonic()

    def stage(self, name: str) -> None:
        """Take it that something else has begun, of no size; without a name, that all is done."""
        now = time.monotonic()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._stage_began
        self._stage, self._stage_began = name, now

    def _describe(self) -> str:
        """The parts in work, and for how long: a long one is seen to live."""
        now, began = time.monotonic(), list(self._began.items())
        if began:
            name, since = began[0]
            others = f" and {len(began) - 1} more" if len(began) > 1 else ""
            return f"{duration(round(now - since))}: {name}{others}"
        if self._left or not self._stage:
            return "computing" if self._left else ""
        return f"{duration(round(now - self._stage_began))}: {self._stage}"

    @property
    def longest(self) -> str:
        """The parts that took longest; empty where all were quick."""
        if sum(self._seconds.values()) < WORTH_TELLING_SECONDS:
            return ""
        longest = sorted(self._seconds.items(), key=lambda item: -item[1])[:LONGEST]
        return ", ".join(f"{name} {duration(seconds)}" for name, seconds in longest)


@contextmanager
def progress(
    quiet: bool, unit: Literal["bytes", "parts"] = "bytes", *, in_words: bool = False, among_output: bool = False
) -> Iterator[Progress]:
    """A bar with the current tensor or part, on stderr; gone when done.

    Args:
        quiet: Whether there is to be none.
        unit: What the bar counts.
        in_words: Whether parts are told in lines where there is no terminal.
        among_output: Whether output is printed meanwhile, to the bar's console: it is then that of the output.
    """
    load_torch()
    with progress_bar(unit=unit, quiet=quiet, stderr=not among_output) as bar:
        shown = Progress(bar, in_words and not quiet and not bar.console.is_terminal)
        yield shown
        shown.stage("")
