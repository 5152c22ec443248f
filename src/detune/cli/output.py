"""The output of a command: a bar meanwhile, then tables, JSON, or nothing at all."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

import click

from detune.cli.progress import Progress, progress
from detune.cli.terminal import say, say_json

if TYPE_CHECKING:
    from detune.plan import Plan

__all__ = ["Output", "output_options", "quiet_option"]

quiet_option = click.option(
    "-q", "--quiet", is_flag=True, help="Show no bar and print no table: errors alone, and what --json prints."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")


@dataclass(frozen=True)
class Output:
    """The output that was asked for on the command line.

    Attributes:
        quiet: Whether nothing is to be printed but errors and JSON.
        as_json: Whether JSON is to stand for tables.
    """

    quiet: bool
    as_json: bool

    @property
    def still(self) -> bool:
        """Whether neither bars nor tables are to be seen."""
        return self.quiet or self.as_json

    def progress(
        self, unit: Literal["bytes", "parts"] = "bytes", *, in_words: bool = False, among_output: bool = False
    ) -> AbstractContextManager[Progress]:
        """The bar for the time until there is a result; see `detune.cli.progress.progress`."""
        return progress(self.still, unit, in_words=in_words, among_output=among_output)

    def plan(self, make: "Callable[[], Plan]") -> None:
        """Print what a command would do, with the time that this one took to start.

        Args:
            make: Lays the plan out.
        """
        from detune.cli.tables import show_plan
        from detune.plan import Spent

        starting = Spent("starting", time.process_time(), "processor time of this command, before it opened a model")
        with self.progress() as shown:
            shown.stage("timing what would be done")
            plan = make()
        plan = replace(plan, time=(starting, *plan.time))
        self.show(plan.to_json, lambda: show_plan(plan))

    def show(self, to_json: Callable[[], str], table: Callable[[], None], shown: Progress | None = None) -> None:
        """Print a result.

        Args:
            to_json: Makes JSON of it, by the schema of its format.
            table: Prints it for people.
            shown: The bar that there was: what took longest is told too.
        """
        if self.as_json:
            say_json(to_json())
        elif not self.quiet:
            table()
            if shown is not None and shown.longest:
                say(f"took longest: {shown.longest}")


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--quiet` and `--json`; the function gets both as its argument `output`."""

    @wraps(function)
    def run(*args: Any, quiet: bool, as_json: bool, **options: Any) -> Any:
        return function(*args, output=Output(quiet, as_json), **options)

    return quiet_option(json_option(run))
