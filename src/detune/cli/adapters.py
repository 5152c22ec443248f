"""The commands that need a known base: `extract`, `pack` and `unpack`."""

from pathlib import Path
from typing import Any

import click

import detune
from detune.cli.loading import load_torch
from detune.cli.options import (
    card_option,
    device_of,
    device_option,
    dry_run_option,
    models_argument,
    rank_option,
)
from detune.cli.output import Output, output_options
from detune.cli.publish import publishing, push_options


@click.command()
@models_argument
@click.option("--base", required=True, help="What they were fine-tuned from, or what recover made of them.")
@click.option("--out", required=True, type=click.Path(path_type=Path, readable=False), help="The directory to make.")
@rank_option
@click.option("--denoise", is_flag=True, help="Of models fine-tuned in full, keep what stands over the change's noise.")
@device_option
@card_option
@push_options
@dry_run_option
@output_options
def extract(
    models: tuple[str, ...],
    base: str,
    out: Path,
    rank: int | None,
    denoise: bool,
    device: str,
    card: bool,
    repository: str | None,
    public: bool,
    dry_run: bool,
    output: Output,
) -> None:
    """Write the LoRA of each merged model as a PEFT adapter of BASE, OUT/MODEL."""
    from detune.cli.tables import show_extraction

    load_torch()
    options: Any = {"base": base, "rank": rank, "denoise": denoise, "device": device_of(device), "card": card}
    if dry_run:
        from detune.plan import plan_extraction

        output.plan(lambda: plan_extraction(models, out, **options))
        return
    with publishing(out, repository, public, output.still):
        with output.progress() as shown:
            extraction = detune.extract(models, out, on_start=shown.start, on_tensor=shown, **options)
        output.show(extraction.to_json, lambda: show_extraction(extraction, out), shown)


@click.command()
@models_argument
@click.option("--base", help="What they were fine-tuned from, or its recovery; by default it is recovered.")
@click.option("--out", required=True, type=click.Path(path_type=Path, readable=False), help="The file to make.")
@rank_option
@device_option
@dry_run_option
@output_options
def pack(
    models: tuple[str, ...],
    base: str | None,
    out: Path,
    rank: int | None,
    device: str,
    dry_run: bool,
    output: Output,
) -> None:
    """Pack merged models into one base, their adapters and what rounding left over, without losing a bit.

    The pack is unpacked in memory and every hash checked before it appears. The models stay as they are.
    """
    from detune.cli.tables import show_pack

    load_torch()
    options: Any = {"base": base, "rank": rank, "device": device_of(device)}
    if dry_run:
        from detune.plan import plan_pack

        output.plan(lambda: plan_pack(models, out, **options))
        return
    with output.progress() as shown:
        report = detune.pack(models, out, on_start=shown.start, on_tensor=shown, **options)
    output.show(report.to_json, lambda: show_pack(report), shown)


@click.command()
@click.argument("pack", type=click.Path(path_type=Path, readable=False))
@click.option("--out", required=True, type=click.Path(path_type=Path, readable=False), help="The directory to make.")
@output_options
def unpack(pack: Path, out: Path, output: Output) -> None:
    """Restore the models of PACK, every file byte for byte, each in a directory of its own below OUT."""
    from detune.cli.tables import show_unpack

    with output.progress() as shown:
        report = detune.unpack(pack, out, on_start=shown.start, on_file=shown)
    output.show(report.to_json, lambda: show_unpack(report, out), shown)
