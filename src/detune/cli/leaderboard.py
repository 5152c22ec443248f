"""`detune bench leaderboard`: each subcommand parses and calls one public function of `detune.bench.leaderboard`."""

from pathlib import Path

import click

entries_option = click.option(
    "--entries",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("docs/leaderboard/entries"),
    show_default=True,
    help="The folder of entries, one JSON file each.",
)


@click.group()
def leaderboard() -> None:
    """The leaderboard of defences: make entries, verify them, build the page."""


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
    from detune.bench.leaderboard import read_entries, write_page

    found = read_entries(entries)
    write_page(found, page)
    click.echo(f"wrote {len(found)} entries into {page}")
