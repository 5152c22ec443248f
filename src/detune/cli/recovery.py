"""The main job: `recover`, `inspect`, `family`, `compare`, and the demonstration."""

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal

import click

import detune
from detune.cli.execution import EXECUTORS, Execution, Sectioned, execution_options
from detune.cli.loading import load_torch
from detune.cli.options import (
    METHODS,
    card_option,
    device_of,
    device_option,
    dry_run_option,
    dtype_of,
    dtype_option,
    merge_dtype_of,
    merge_option,
    models_argument,
    rank_option,
    rows_option,
)
from detune.cli.output import Output, output_options
from detune.cli.publish import publishing, push_options
from detune.cli.signals import keeping


@click.command(
    cls=Sectioned,
    sections={
        "More results": ("adapters", "mask", "check", "card", "repository", "public", "as_json"),
        "Where to compute": ("device", *EXECUTORS),
    },
)
@models_argument
@click.option("--out", required=True, type=click.Path(path_type=Path, readable=False), help="The directory to make.")
@click.option("--method", type=click.Choice(METHODS), default="auto", show_default=True, help="How to recover.")
@rank_option
@device_option
@merge_option
@click.option("--node", metavar="NAME", help="Recover this ancestor of the tree that `family` draws, not the root.")
@click.option("--like", metavar="MODEL", help="Whose files, names and tokens OUT takes; those most models have.")
@click.option(
    "--adapters", type=click.Path(path_type=Path, readable=False), help="A directory to make with each model's LoRA."
)
@dtype_option
@click.option(
    "--mask", type=click.Path(path_type=Path, readable=False), help="A .npz file to make: where each tensor is certain."
)
@click.option("--check", is_flag=True, help="Recover from parts of the models too: do they agree? From four models on.")
@card_option
@click.option("--overwrite", is_flag=True, help="Replace OUT, if recover wrote it and nothing was added or changed.")
@push_options
@dry_run_option
@execution_options
@output_options
def recover(
    models: tuple[str, ...],
    out: Path,
    method: str,
    rank: int | None,
    device: str,
    merge_dtype: str,
    node: str | None,
    like: str | None,
    adapters: Path | None,
    dtype: str,
    mask: Path | None,
    check: bool,
    card: bool,
    overwrite: bool,
    repository: str | None,
    public: bool,
    dry_run: bool,
    execution: Execution,
    output: Output,
) -> None:
    """Write the base model of merged LoRA fine-tunes to OUT: of three or more, or fewer with --method lattice.

    A run that is cut off is finished by the same command. --scheduler and --slurm need a file system that all machines
    share, and pip install 'detune[cluster]'.
    """
    from detune.cli.tables import show_adapters, show_report

    load_torch()
    options: Any = {
        "rank": rank,
        "overwrite": overwrite,
        "merge_dtype": merge_dtype_of(merge_dtype),
        "like": like,
        "adapters": adapters,
        "dtype": dtype_of(dtype),
        "mask": mask,
        "check": check,
        "card": card,
    }
    if node is not None:
        with output.progress() as shown:
            shown.stage("drawing the tree")
            models = detune.find_lineage(models, merge_dtype=merge_dtype_of(merge_dtype)).sources(node)
    if dry_run:
        from detune.plan import plan_recovery

        # Other machines cannot be timed from here.
        here = device_of("cpu" if execution.elsewhere else device)
        output.plan(lambda: plan_recovery(models, out, method, device=here, **options))
        return

    def tables() -> None:
        show_report(report, out)
        if report.adapters is not None and adapters is not None:
            show_adapters(report.adapters, adapters)

    with publishing(out, repository, public, output.still):
        with execution.executor(device) as executor, output.progress() as shown:
            options |= {"executor": executor, "on_start": shown.start, "on_tensor": shown}
            options["device"] = execution.device(device)
            report = detune.recover(models, out, method, **options)
        output.show(report.to_json, tables, shown)


@click.command()
@models_argument
@rank_option
@rows_option
@device_option
@merge_option
@output_options
def inspect(
    models: tuple[str, ...],
    rank: int | None,
    rows: int | Literal["auto", "all"],
    device: str,
    merge_dtype: str,
    output: Output,
) -> None:
    """Show what changed between models, at which rank, and what can be recovered. Writes nothing."""
    from detune.cli.tables import show_report

    with output.progress() as shown:
        report = detune.inspect(
            models,
            rank=rank,
            device=device_of(device),
            merge_dtype=merge_dtype_of(merge_dtype),
            rows=rows,
            hashes=output.as_json,
            on_start=shown.start,
            on_tensor=shown,
        )
    output.show(report.to_json, lambda: show_report(report), shown)


@click.command()
@models_argument
@rows_option
@device_option
@merge_option
@click.option(
    "--mermaid",
    type=click.Path(path_type=Path, readable=False),
    help="A file to make: the tree as a picture, for Mermaid.",
)
@click.option(
    "--bom",
    type=click.Path(path_type=Path, readable=False),
    help="A file to make: the models with their ancestors, CycloneDX.",
)
@output_options
def family(
    models: tuple[str, ...],
    rows: int | Literal["auto", "all"],
    device: str,
    merge_dtype: str,
    mermaid: Path | None,
    bom: Path | None,
    output: Output,
) -> None:
    """Show which models share a source and who descends from whom, which do not belong and why, and what that allows.

    The models themselves are left as they are. --bom needs pip install 'detune[bom]'.
    """
    from detune._runtime import needs_extra
    from detune.cli.tables import show_family

    load_torch()
    from detune.checkpoints import new_file, require_apart
    from detune.lineage import Family
    from detune.lineage.bom import to_cyclonedx, weight_hashes

    require_apart(mermaid, bom)
    with ExitStack() as opened:
        # A file that cannot be written is refused before anything is computed.
        picture = opened.enter_context(new_file(mermaid)) if mermaid is not None else None
        inventory = opened.enter_context(new_file(bom)) if bom is not None else None
        if inventory is not None:
            with needs_extra("bom"):
                import cyclonedx  # noqa: F401
        shown = opened.enter_context(output.progress())
        check = detune.check_family(
            models,
            device=device_of(device),
            merge_dtype=merge_dtype_of(merge_dtype),
            rows=rows,
            on_start=shown.start,
            on_tensor=shown,
        )
        shown.stage("drawing the tree")
        lineage = detune.find_lineage(models, merge_dtype=merge_dtype_of(merge_dtype), rows=rows)
        if picture is not None:
            picture.write_text(lineage.to_mermaid(), encoding="utf-8")
        if inventory is not None:
            hashes = weight_hashes(models, shown.start, shown)
            inventory.write_text(to_cyclonedx(lineage, hashes), encoding="utf-8")
    found = Family.of(check, lineage)
    output.show(found.to_json, lambda: show_family(found), shown)


@click.command()
@click.argument("recovered")
@click.argument("truth")
@output_options
def compare(recovered: str, truth: str, output: Output) -> None:
    """Show W-Error and the share of bit-identical entries of RECOVERED against TRUTH."""
    from detune.cli.tables import show_comparison

    with output.progress() as shown:
        comparison = detune.compare(recovered, truth, on_start=shown.start, on_tensor=shown)
    output.show(comparison.to_json, lambda: show_comparison(comparison), shown)


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, readable=False),
    help="Keep the models here; a temporary directory otherwise.",
)
@click.option("--method", type=click.Choice(METHODS), default="auto", show_default=True, help="What recovers the base.")
@click.option("--train", is_flag=True, help="Train the LoRAs here instead of taking those that come along: minutes.")
@click.option("--steps", type=click.IntRange(min=1), help="Training steps of each LoRA, with --train.")
@output_options
def demo(out: Path | None, method: str, train: bool, steps: int | None, output: Output) -> None:
    """The whole story on a real language model, offline, in a minute: fine-tunes merged, the base recovered."""
    if steps is not None and not train:
        raise click.UsageError("--steps is for training: give --train as well")
    with (
        keeping(f"the models made so far stay in {out}") if out is not None else nullcontext(),
        output.progress("parts", among_output=True) as shown,
    ):
        from detune.demo.story import tell

        story = tell(
            out,
            method=method,
            train=train,
            steps=steps,
            console=shown.console,
            on_start=shown.start,
            on_part=shown,
        )
    output.show(story.to_json, lambda: None, shown)
