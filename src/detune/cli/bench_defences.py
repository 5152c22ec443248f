"""`detune bench defences`: parses, and calls one public function of `detune.bench.defences`."""

from pathlib import Path

import click

from detune.cli.output import Output, output_options
from detune.cli.signals import keeping_finished
from detune.cli.terminal import say


@click.command()
@click.argument("models", nargs=-1, type=click.Path(path_type=Path, readable=False), metavar="[MODEL...]")
@click.option("--base", type=click.Path(path_type=Path, readable=False), help="The MODELs' base: the truth.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, readable=False, file_okay=False),
    help="The directory to fill.",
)
@click.option("--only", multiple=True, metavar="ROW", help="A row of the table; may be given several times.")
@click.option("--quick", is_flag=True, help="The smallest form, for a look at the code path.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; by default torch's own choice.")
@output_options
def defences(
    models: tuple[Path, ...],
    base: Path | None,
    out: Path,
    only: tuple[str, ...],
    quick: bool,
    threads: int | None,
    output: Output,
) -> None:
    """Defend fine-tunes in every way, attack each with what knows it, and print the table.

    Without MODELs, fine-tunes of all-MiniLM-L6-v2 are trained first: some ten minutes on two cores. What OUT has is not
    made again.
    """

    def tables() -> None:
        for line in markdown(results).splitlines():
            say(line)
        say(f"wrote {out / 'defences.md'} and {out / 'defences.png'}")

    with output.progress("parts", in_words=True) as shown, keeping_finished(out):
        import torch

        from detune.bench.defences import bench_defences
        from detune.bench.defences.table import markdown, to_json

        if threads is not None:
            torch.set_num_threads(threads)
        results = bench_defences(
            out, base=base, models=models, only=only, quick=quick, on_start=shown.start, on_part=shown
        )
    output.show(lambda: to_json(results), tables, shown)
