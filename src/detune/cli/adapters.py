"""What a known base makes possible: `extract`, `pack` and `unpack`."""

from pathlib import Path

import click

import detune
from detune.cli.options import device_of, device_option, json_option, models_argument, rank_option
from detune.cli.recovery import progress


@click.command()
@models_argument
@click.option("--base", required=True, help="What they were fine-tuned from, or what recover made of them.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The directory to make.")
@rank_option
@device_option
@json_option
def extract(models: tuple[str, ...], base: str, out: Path, rank: int | None, device: str, as_json: bool) -> None:
    """Write the LoRA of each merged model as a PEFT adapter of BASE, OUT/MODEL."""
    from detune.terminal import show_extraction

    with progress(quiet=as_json) as on_tensor:
        extraction = detune.extract(models, out, base=base, rank=rank, device=device_of(device), on_tensor=on_tensor)
    click.echo(extraction.to_json(), nl=False) if as_json else show_extraction(extraction, out)
