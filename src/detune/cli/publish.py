"""`push`, and the options by which other commands push what they made."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import detune
from detune.cli.loading import load_torch
from detune.cli.options import dry_run_option
from detune.cli.output import Output, output_options
from detune.cli.progress_bars import clients_bars
from detune.cli.signals import Interrupted, keeping
from detune.cli.terminal import say

if TYPE_CHECKING:
    from detune.checkpoints import Pushed

__all__ = ["publishing", "push", "push_options", "show_pushed"]

SENT = "large files that have arrived are kept on the Hub: the same command does not send them again"

public_option = click.option("--public", is_flag=True, help="Let everybody see it; by default it is private.")


def push_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--push` and `--public`."""
    option = click.option("--push", "repository", metavar="REPO", help="Push OUT to the Hub, as `detune push` does.")
    return option(public_option(function))


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, readable=False))
@click.argument("repository", metavar="REPO")
@public_option
@click.option("--message", help="Of the commit.")
@dry_run_option
@output_options
def push(directory: Path, repository: str, public: bool, message: str | None, dry_run: bool, output: Output) -> None:
    """Publish what recover or extract made in DIR on the Hub, as the private repository REPO, org/name.

    Any model or PEFT adapter will do. Its card, detune.json and what a loader reads go along, and nothing else.
    """
    load_torch()
    if dry_run:
        from detune.plan import plan_push

        output.plan(lambda: plan_push(directory, repository, public=public))
        return
    with clients_bars(quiet=output.still), keeping(SENT):
        pushed = detune.push(directory, repository, public=public, message=message)
    output.show(pushed.to_json, lambda: show_pushed(pushed))


@contextmanager
def publishing(out: Path, repository: str | None, public: bool, quiet: bool) -> Iterator[None]:
    """Push what the block makes, if that is asked for; what the Hub would refuse is said before.

    Args:
        out: What it makes.
        repository: Where to; None pushes nothing.
        public: Whether everybody is to see it.
        quiet: Without bars, and without a word.

    Raises:
        UsageError: `public` without a repository.
        OutputError: The Hub refuses.
    """
    if repository is None:
        if public:
            raise click.UsageError("--public is for what is pushed: give --push REPO as well")
        yield
        return
    from detune.checkpoints import check_repository

    check_repository(repository, public)
    yield
    try:
        with clients_bars(quiet=quiet):
            pushed = detune.push(out, repository, public=public)
    except (detune.DetuneError, Interrupted) as error:
        error.add_note(f"{out} is finished: `detune push` takes it from there")
        raise
    if not quiet:
        show_pushed(pushed)


def show_pushed(pushed: "Pushed") -> None:
    """Print what was pushed where, and what stayed."""
    if pushed.left_out:
        listed = ", ".join(pushed.left_out[:4]) + " ..." * (len(pushed.left_out) > 4)
        say(f"not pushed, as no loader reads it: {listed}")
    say(
        f"pushed {pushed.kind} to {pushed.url} ({'private' if pushed.private else 'public'}): {pushed.files} files, "
        f"{pushed.total_bytes / 1e6:.1f} MB, in {pushed.seconds:.1f} s; commit {pushed.commit[:12]}"
    )
