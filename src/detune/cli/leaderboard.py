"""`detune bench leaderboard`: each subcommand parses and calls one public function of `detune.bench.leaderboard`."""

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from detune.cli.loading import load_torch
from detune.cli.output import Output, quiet_option
from detune.cli.signals import keeping_finished
from detune.cli.terminal import say

if TYPE_CHECKING:
    from detune.bench.defences import RowResult

rows_argument = click.argument("rows", nargs=-1, metavar="[ROW...]")
entries_option = click.option(
    "--entries",
    type=click.Path(path_type=Path, readable=False, file_okay=False),
    default=Path("docs/leaderboard/entries"),
    show_default=True,
    help="The folder of entries, one JSON file each.",
)
out_option = click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, readable=False, file_okay=False),
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
    from detune.bench.leaderboard import add as add_entries

    _run(rows, out, quiet, "wrote", lambda results: add_entries(results, entries, authors, _command(rows), link))


@leaderboard.command()
@rows_argument
@out_option
@entries_option
@quiet_option
def verify(rows: tuple[str, ...], out: Path, entries: Path, quiet: bool) -> None:
    """Attack the defences of ROWs again, and mark their entries as verified if the same comes of it."""
    from detune.bench.leaderboard import verify as verify_entries

    _run(rows, out, quiet, "verified", lambda results: verify_entries(results, entries, _command(rows)))


@leaderboard.command()
@entries_option
@click.option(
    "--page",
    type=click.Path(path_type=Path, readable=False, dir_okay=False),
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


def _run(
    rows: tuple[str, ...],
    out: Path,
    quiet: bool,
    done: str,
    enter: "Callable[[tuple[RowResult, ...]], Iterable[Path]]",
) -> None:
    """Run rows, enter their results, and say which files that has written or changed."""
    output = Output(quiet, as_json=False)
    with output.progress("parts", in_words=True) as shown, keeping_finished(out):
        from detune.bench.defences import bench_defences

        results = bench_defences(out, only=rows, on_start=shown.start, on_part=shown)
    files = enter(results)

    def tell() -> None:
        for file in files:
            say(f"{done} {file}")

    output.show(str, tell, shown)


def _command(rows: tuple[str, ...]) -> str:
    return shlex.join(["detune", "bench", "defences", *(word for row in rows for word in ("--only", row))])
