"""`detune bench`: LoWRA Bench. Each subcommand parses and calls one public function of `detune.bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from detune.cli.bench_defences import defences
from detune.cli.leaderboard import leaderboard
from detune.cli.options import device_of, device_option
from detune.cli.output import Output, output_options, quiet_option
from detune.cli.progress import Progress
from detune.cli.signals import keeping_finished
from detune.cli.terminal import say

if TYPE_CHECKING:
    from detune.bench.results import ResultStore
    from detune.bench.subsets import Subset


class Numbers(click.ParamType[tuple[int, ...]]):
    """Numbers with commas between them, and ranges: "3,5,8" or "2-15"."""

    name = "N,N-M"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The numbers, each once, in the order given."""
        if isinstance(value, tuple):
            return value
        numbers: list[int] = []
        for part in str(value).split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
                self.fail(f"{value!r} is no list of numbers like 3,5,8 or 2-15.", param, ctx)
            numbers += range(int(first), int(last or first) + 1)
        return tuple(dict.fromkeys(numbers))


out_option = click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, readable=False, file_okay=False),
    help="The directory to fill.",
)
data_option = click.option(
    "--data",
    type=click.Path(path_type=Path, readable=False, exists=True, file_okay=False),
    help="A local copy of the published dataset, instead of the Hub.",
)
revision_option = click.option(
    "--revision", default="main", show_default=True, help="Of the published dataset; a commit pins it."
)
base_option = click.option(
    "--base",
    type=click.Path(path_type=Path, readable=False),
    help="The base's directory, if it is not beside the rows.",
)


@click.group()
def bench() -> None:
    """LoWRA Bench: load it, build it, run it, read it.

    A SUBSET is the folder of one that was built here, or the name of a published one.
    """
    from detune._runtime import needs_extra

    with needs_extra("bench"):
        import pydantic  # noqa: F401


bench.add_command(leaderboard)
bench.add_command(defences)


@bench.command("list")
@output_options
def list_(output: Output) -> None:
    """Show the published subsets and the recipes, with layers, ranks and where their data is."""
    from detune.bench.catalogue import Catalogue
    from detune.cli.tables import show_catalogue

    catalogue = Catalogue.now()
    output.show(catalogue.to_json, lambda: show_catalogue(catalogue))


@bench.command()
@click.argument("source", nargs=-1, required=True, metavar="RECIPE | ADAPTER...")
@out_option
@click.option("--base", help="Build from this base and the ADAPTERs, in PEFT, diffusers or kohya format.")
@click.option("--name", help="With --base: what the subset is called; by default as its directory.")
@click.option("--stands-for", metavar="SUBSET", help="With --base: the published subset whose settings apply.")
@click.option("--quick", is_flag=True, help="The recipe's smallest form, for a look at the code path.")
@click.option(
    "--seeds",
    type=click.Choice(["shared", "different"]),
    default="shared",
    show_default=True,
    help="Whether the recipe's LoRAs start from one seed, as those of one script do.",
)
@click.option("--seed", default=0, show_default=True, help="The first seed.")
@click.option("--ranks", type=Numbers(), default=(), help="Ranks that the recipe's LoRAs take in turn.")
@quiet_option
def build(
    source: tuple[str, ...],
    out: Path,
    base: str | None,
    name: str | None,
    stands_for: str | None,
    quick: bool,
    seeds: Any,
    seed: int,
    ranks: tuple[int, ...],
    quiet: bool,
) -> None:
    """Write a subset in the schema of LoWRA Bench, from a RECIPE or from LoRAs of one's own.

    A build that was interrupted goes on where it stopped.
    """
    output = Output(quiet, as_json=False)
    if base is not None:
        if quick or ranks or seeds != "shared" or seed:
            raise click.UsageError("--quick, --seeds, --seed and --ranks are for a RECIPE, not for --base.")
        from detune.bench.build import build_subset

        with output.progress() as shown, keeping_finished(out):
            subset = build_subset(
                base, source, out, name=name, stands_for=stands_for, on_start=shown.start, on_part=shown
            )
    else:
        from detune.bench.recipes import build_recipe, find_recipe

        if name or stands_for:
            raise click.UsageError("--name and --stands-for need --base.")
        if len(source) > 1:
            raise click.UsageError("give one RECIPE, or --base BASE with the ADAPTERs.")
        recipe = find_recipe(source[0], quick=quick)
        with output.progress("parts", in_words=True) as shown, keeping_finished(out):
            subset = build_recipe(recipe, out, seeds=seeds, seed=seed, ranks=ranks, on_start=shown.start, on_part=shown)
    output.show(str, lambda: _show_subset(subset, out), shown)


@bench.command()
@click.argument("subset")
@out_option
@base_option
@data_option
@revision_option
@quiet_option
def merge(subset: str, out: Path, base: Path | None, data: Path | None, revision: str, quiet: bool) -> None:
    """Write every fine-tuned model of SUBSET as a merged checkpoint below OUT."""
    from detune.bench.merging import merge_subset
    from detune.bench.subsets import open_subset

    output = Output(quiet, as_json=False)
    with output.progress() as shown:
        rows = open_subset(subset, data=data, revision=revision)
        paths = merge_subset(rows, out, base=base, on_start=shown.start, on_part=shown)
    output.show(str, lambda: say(f"wrote {len(paths)} merged models below {out}"), shown)


@bench.command()
@click.argument("subset")
@click.option(
    "--methods",
    default="single,mean,spectral,intersect,auto",
    show_default=True,
    help="Names, or path/to/file.py:function.",
)
@click.option("--models", type=Numbers(), default=(), show_default="3,5,8", help="How many models.")
@click.option("--draws", type=Numbers(), default="0", show_default=True, help="Seeds over which LoRAs are drawn.")
@click.option(
    "--rank", type=click.Choice(["told", "found"]), default="told", show_default=True, help="As in the paper, or not."
)
@out_option
@base_option
@click.option(
    "--inputs", type=click.Path(path_type=Path, readable=False), help="Prompts (CSV) or images to compare behaviour on."
)
@click.option("--weights-only", is_flag=True, help="Do not run the recovered models.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; by default torch's own choice.")
@device_option
@data_option
@revision_option
@output_options
def run(
    subset: str,
    methods: str,
    models: tuple[int, ...],
    draws: tuple[int, ...],
    rank: str,
    out: Path,
    base: Path | None,
    inputs: Path | None,
    weights_only: bool,
    threads: int | None,
    device: str,
    data: Path | None,
    revision: str,
    output: Output,
) -> None:
    """Run methods over SUBSET and end with the table. What is finished in OUT is not run again."""
    from detune.bench.methods import find_method
    from detune.bench.results import ResultStore
    from detune.bench.run import plan, run_all
    from detune.bench.subsets import open_subset

    _use_threads(threads)
    rows = open_subset(subset, data=data, revision=revision)
    chosen = [find_method(name.strip(), rows) for name in methods.split(",")]
    tasks = plan(rows, chosen, models, draws, rank_known=rank == "told")
    store = ResultStore(out)
    with output.progress("parts") as shown, keeping_finished(out):
        run_all(
            rows,
            tasks,
            store,
            base=base,
            inputs=inputs,
            behave=not weights_only,
            device=device_of(device),
            on_start=shown.start,
            on_part=shown,
        )
    _show_table(store, output, shown)


@bench.command()
@click.argument("results", type=click.Path(path_type=Path, readable=False))
@output_options
def table(results: Path, output: Output) -> None:
    """Print the table of RESULTS and write it beside them: Markdown, CSV, and a plot as PNG and SVG."""
    from detune.bench.results import ResultStore

    _show_table(ResultStore(results), output)


@bench.command()
@click.argument("study")
@click.argument("subsets", nargs=-1, required=True, metavar="SUBSET...")
@out_option
@click.option("--models", type=Numbers(), default=(), help="How many models; by default the study's own.")
@click.option("--draws", type=Numbers(), default="0", show_default=True, help="Seeds over which LoRAs are drawn.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; by default torch's own choice.")
@data_option
@revision_option
@quiet_option
def study(
    study: str,
    subsets: tuple[str, ...],
    out: Path,
    models: tuple[int, ...],
    draws: tuple[int, ...],
    threads: int | None,
    data: Path | None,
    revision: str,
    quiet: bool,
) -> None:
    """Answer a question with runs, a plot and a CSV file; cells that OUT has are not run again.

    A STUDY is one of models, scheduler, ranks, depth, rank-by-models.
    """
    from detune.bench.results import ResultStore
    from detune.bench.studies import Bench, find_study, run_study
    from detune.bench.subsets import open_subset

    find_study(study)
    _use_threads(threads)
    opened = tuple(open_subset(name, data=data, revision=revision) for name in subsets)
    output = Output(quiet, as_json=False)
    with output.progress("parts") as shown, keeping_finished(out):
        result = run_study(study, Bench(opened, ResultStore(out), models, draws, shown.start, shown))

    def tell() -> None:
        for file in result.files:
            say(f"wrote {file}")

    output.show(str, tell, shown)


def _show_subset(subset: "Subset", out: Path) -> None:
    say(f"{subset.name}: {subset.rows} layers in {out}; run methods on it with")
    say(f"  detune bench run {out} --out results")


def _show_table(store: "ResultStore", output: Output, shown: Progress | None = None) -> None:
    from detune.bench.table import to_json, write_table
    from detune.cli.tables import show_tables

    files = write_table(store)
    results = store.read_all()

    def tables() -> None:
        show_tables(results)
        say(f"wrote {', '.join(map(str, files))}")

    output.show(lambda: to_json(results), tables, shown)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
