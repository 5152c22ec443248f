"""The table of executors, an option for each, and the headings that help lists options under."""

from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click

from detune.cli.options import device_of
from detune.errors import DetuneError

__all__ = ["EXECUTORS", "Execution", "Sectioned", "execution_options"]


@dataclass(frozen=True)
class _Kind:
    """A kind of executor.

    Attributes:
        open: Makes one, from what was given for the option and the device that workers will use; a context manager.
        elsewhere: Whether workers may be on other machines, whose devices cannot be tried here.
        option: How click reads the option.
    """

    open: Callable[[Any, str], AbstractContextManager[Executor]]
    elsewhere: bool
    option: dict[str, Any]


def _processes(workers: int, device: str) -> AbstractContextManager[Executor]:
    if device != "cpu":
        raise DetuneError(
            f"--workers {workers} and --device {device} do not go together",
            "processes of one machine would share its GPU's memory",
            "leave --workers out, or start Dask workers with a GPU each and use --scheduler",
        )
    from detune.recovery.execution import Processes

    return Processes(workers)


def _dask(scheduler: str, device: str) -> AbstractContextManager[Executor]:
    from detune.recovery.execution import dask_workers

    return dask_workers(scheduler)


def _slurm(jobs: int, device: str) -> AbstractContextManager[Executor]:
    from detune.recovery.execution import slurm_workers

    return slurm_workers(jobs)


EXECUTORS = {
    "workers": _Kind(
        _processes, False, {"type": click.IntRange(min=1), "help": "Number of worker processes on this machine."}
    ),
    "scheduler": _Kind(_dask, True, {"metavar": "ADDRESS", "help": "Compute on a Dask cluster: tcp://host:8786."}),
    "slurm": _Kind(
        _slurm,
        True,
        {"type": click.IntRange(min=1), "metavar": "JOBS", "help": "Number of Slurm jobs to compute in."},
    ),
}
"""The executors that `detune recover` can compute with beside its own process, by option."""


@dataclass(frozen=True)
class Execution:
    """The place where a command is to compute.

    Attributes:
        kind: One of `EXECUTORS`; None is this process.
        value: What was given for its option.
    """

    kind: str | None = None
    value: Any = None

    @property
    def elsewhere(self) -> bool:
        """Whether others compute, who may have what this machine has not."""
        return self.kind is not None and EXECUTORS[self.kind].elsewhere

    def executor(self, device: str) -> AbstractContextManager[Executor | None]:
        """The executor that was asked for, ready for use in the block; None computes in this process.

        Args:
            device: Where workers will compute.

        Raises:
            DetuneError: It cannot be had.
        """
        return nullcontext() if self.kind is None else EXECUTORS[self.kind].open(self.value, device)

    def device(self, name: str) -> Any:
        """The torch device of a name, tried out if it is this machine's.

        Args:
            name: The device.

        Raises:
            DetuneError: There is no such device.
        """
        if not self.elsewhere:
            return device_of(name)
        import torch

        try:
            return torch.device(name)
        except RuntimeError as error:
            raise DetuneError(f"no device {name!r}", str(error).split("\n")[0], "use cpu, cuda or cuda:1") from None


def execution_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each executor; the function gets what was chosen as its argument `execution`."""

    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        given = {kind: options.pop(kind) for kind in EXECUTORS}
        chosen = [Execution(kind, value) for kind, value in given.items() if value is not None]
        if len(chosen) > 1:
            *others, last = (f"--{kind}" for kind in EXECUTORS)
            raise click.UsageError(f"give one of {', '.join(others)} and {last}.")
        return function(*args, execution=chosen[0] if chosen else Execution(), **options)

    for kind in reversed(EXECUTORS):
        run = click.option(f"--{kind}", **EXECUTORS[kind].option)(run)
    return run


class Sectioned(click.Command):
    """A command whose help lists options under headings.

    Args:
        sections: Names of parameters, by heading; the rest come first, under "Options".
    """

    def __init__(self, *args: Any, sections: dict[str, tuple[str, ...]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options."""
        headings = {name: heading for heading, names in self._sections.items() for name in names}
        listed: dict[str, list[tuple[str, str]]] = {key: [] for key in ("Options", *self._sections)}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):
                heading = headings.get(param.name or "", "Options")
                listed[heading].append(record)
        for heading, records in listed.items():
            with formatter.section(heading):
                formatter.write_dl(records)
