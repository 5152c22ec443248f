"""`detune bench leaderboard`: each subcommand parses and calls one public function of `detune.bench.leaderboard`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from detune.cli.loading import load_torch
from detune.cli.output import quiet_option
from detune.cli.progress_bars import status
from detune.cli.signals import keeping_finished
from detune.cli.terminal import say

if TYPE_CHECKING:
    from detune.bench.defences import RowResult

rows_argument = click.argument("rows", nargs=-1, metavar="[ROW...]")
entries_option = click.option(
    "--entries",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("docs/leaderboard/entries"),
    show_default=True,
    help="The folder of entries, one JSON file each.",
)
out_option = click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="The directory of `detune bench defences`; rows that it has are not run again.",
)


@click.group()
def leaderboard() -> None:
    """The leaderboard of defences: make entries, verify them, build the page.

    A ROW is one of the table of `detune bench defences`; none means all.
    """


@leaderboard.command()
@rows_argument
@out_option
@entries_option
@click.option("--by", "authors", multiple=True, required=True, metavar="NAME", help="Who answers for it; repeatable.")
@click.option("--link", metavar="URL", help="A paper, or the code.")
@quiet_option
def add(
    rows: tuple[str, ...], out: Path, entries: Path, authors: tuple[str, ...], link: str | None, quiet: bool
) -> None:
    """Attack the defences of ROWs, and write what came of it as claimed entries."""
    results = _run(rows, out, quiet)
    from detune.bench.leaderboard import add as add_entries

    for file in add_entries(results, entries, authors, _command(rows), link):
        if not quiet:
            say(f"wrote {file}")


@leaderboard.command()
@rows_argument
@out_option
@entries_option
@quiet_option
def verify(rows: tuple[str, ...], out: Path, entries: Path, quiet: bool) -> None:
    """Attack the defences of ROWs again, and mark their entries as verified if the same comes of it."""
    results = _run(rows, out, quiet)
    from detune.bench.leaderboard import verify as verify_entries

    for file in verify_entries(results, entries, _command(rows)):
        if not quiet:
            say(f"verified {file}")


@leaderboard.command()
@entries_option
@click.option(
    "--page",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("docs/leaderboard.md"),
    show_default=True,
    help="The page; the part between its marks is replaced.",
)
def build(entries: Path, page: Path) -> None:
    """Write the entries into the page, ranked."""
    load_torch()
    from detune.bench.leaderboard import read_entries, write_page

    found = read_entries(entries)
    write_page(found, page)
    say(f"wrote {len(found)} entries into {page}")


def _run(rows: tuple[str, ...], out: Path, quiet: bool) -> "tuple[RowResult, ...]":
    load_torch()
    from detune.bench.defences import bench_defences

    with status("starting", quiet=quiet) as tell, keeping_finished(out):
        return bench_defences(out, only=rows, on_step=tell)


def _command(rows: tuple[str, ...]) -> str:
    return shlex.join(["detune", "bench", "defences", *(word for row in rows for word in ("--only", row))])
