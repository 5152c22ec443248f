"""Options that say where the work is done, and the executor that they mean."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

import click

from detune.cli.options import device_of
from detune.errors import DetuneError

__all__ = ["Sectioned", "device_at", "execution_options", "executor_of"]

_OPTIONS = (
    click.option("--workers", type=click.IntRange(min=1), help="Number of worker processes on this machine."),
    click.option("--scheduler", metavar="ADDRESS", help="Compute on a Dask cluster: tcp://host:8786."),
    click.option("--slurm", type=click.IntRange(min=1), metavar="JOBS", help="Number of Slurm jobs to compute in."),
)


def execution_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--workers`, `--scheduler` and `--slurm`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


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


@contextmanager
def executor_of(
    workers: int | None, scheduler: str | None, slurm: int | None, device: str
) -> Iterator[Executor | None]:
    """The executor that was asked for; None computes in this process.

    Args:
        workers: Processes of this machine.
        scheduler: Address of a Dask scheduler.
        slurm: Number of jobs.
        device: Where workers will compute.

    Yields:
        The executor, ready for use.

    Raises:
        UsageError: More than one was asked for.
        DetuneError: It cannot be had.
    """
    if sum(option is not None for option in (workers, scheduler, slurm)) > 1:
        raise click.UsageError("give one of --workers, --scheduler and --slurm.")
    if workers is not None and device != "cpu":
        raise DetuneError(
            f"--workers {workers} and --device {device} do not go together",
            "processes of one machine would share its GPU's memory",
            "leave --workers out, or start Dask workers with a GPU each and use --scheduler",
        )
    if workers is None and scheduler is None and slurm is None:
        yield None
        return
    from detune.recovery.execution import Processes, dask_workers, slurm_workers

    if workers is not None:
        with Processes(workers) as processes:
            yield processes
    else:
        with dask_workers(scheduler) if scheduler else slurm_workers(slurm or 1) as executor:
            yield executor


def device_at(name: str, elsewhere: bool) -> Any:
    """The torch device of a name, tried out if it is this machine's.

    Args:
        name: The device.
        elsewhere: Whether others compute, who may have what this machine has not.

    Raises:
        DetuneError: There is no such device.
    """
    if not elsewhere:
        return device_of(name)
    import torch

    try:
        return torch.device(name)
    except RuntimeError as error:
        raise DetuneError(f"no device {name!r}", str(error).split("\n")[0], "use cpu, cuda or cuda:1") from None
