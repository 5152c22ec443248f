"""The command `detune`: each subcommand parses and calls one public function.

torch is imported inside the subcommands, so that `detune --help` answers at once.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

import detune
from detune.errors import DetuneError

if TYPE_CHECKING:
    from detune.report import TensorRow

METHODS = ("auto", "intersect", "spectral", "mean", "single")

models_argument = click.argument("models", nargs=-1, required=True, metavar="MODEL...")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
device_option = click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
merge_option = click.option(
    "--merge-dtype",
    type=click.Choice(["base", "float32"]),
    default="base",
    show_default=True,
    help="For BASE+ADAPTER: merge in the base's dtype, as PEFT does, or in float32.",
)


class Rank(click.ParamType[int | None]):
    """A positive number, or "auto"."""

    name = "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """None for "auto"."""
        if value is None or value == "auto":
            return None
        try:
            rank = int(value)
        except ValueError:
            rank = 0
        if rank < 1:
            self.fail(f"{value!r} is neither a positive number nor 'auto'.", param, ctx)
        return rank


rank_option = click.option(
    "--rank", type=Rank(), default="auto", show_default=True, help="The most that an adapter's rank can be."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(detune.__version__, prog_name="detune")
@click.option("-v", "--verbose", count=True, help="Log what is done; twice for every tensor.")
def cli(verbose: int) -> None:
    """Recover a base model's weights from merged LoRA fine-tunes of it.

    A MODEL is a directory in Hugging Face layout, a diffusers pipeline, a .safetensors file, a Hub id (id@revision),
    or BASE+ADAPTER, a PEFT adapter merged on the fly.
    """
    levels = (logging.WARNING, logging.INFO, logging.DEBUG)
    logging.basicConfig(level=levels[min(verbose, 2)], format="%(levelname)s %(name)s: %(message)s")
    if not verbose:
        # It tells of every retry, twice; what counts comes in the one line at the end.
        os.environ.setdefault("HF_HUB_VERBOSITY", "critical")


@cli.command()
@models_argument
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The directory to make.")
@click.option("--method", type=click.Choice(METHODS), default="auto", show_default=True, help="How to recover.")
@rank_option
@device_option
@merge_option
@click.option("--overwrite", is_flag=True, help="Replace OUT, if it is a checkpoint, with all that is in it.")
@json_option
def recover(
    models: tuple[str, ...],
    out: Path,
    method: str,
    rank: int | None,
    device: str,
    merge_dtype: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the base model of at least three merged LoRA fine-tunes to OUT."""
    from detune.terminal import show_report

    with _progress(quiet=as_json) as on_tensor:
        report = detune.recover(
            models,
            out,
            method,
            rank=rank,
            device=_device(device),
            overwrite=overwrite,
            merge_dtype=_merge_dtype(merge_dtype),
            on_tensor=on_tensor,
        )
    click.echo(report.to_json(), nl=False) if as_json else show_report(report, out)


@cli.command()
@models_argument
@rank_option
@device_option
@merge_option
@json_option
def inspect(models: tuple[str, ...], rank: int | None, device: str, merge_dtype: str, as_json: bool) -> None:
    """Show what changed between models, at which rank, and what can be recovered. Writes nothing."""
    from detune.terminal import show_report

    with _progress(quiet=as_json) as on_tensor:
        report = detune.inspect(
            models,
            rank=rank,
            device=_device(device),
            merge_dtype=_merge_dtype(merge_dtype),
            on_tensor=on_tensor,
        )
    click.echo(report.to_json(), nl=False) if as_json else show_report(report)


@cli.command()
@click.argument("recovered")
@click.argument("truth")
@click.option("--json", "as_json", is_flag=True, help="Print every tensor as JSON.")
def compare(recovered: str, truth: str, as_json: bool) -> None:
    """Show W-Error and the share of bit-identical entries of RECOVERED against TRUTH."""
    from detune.terminal import show_comparison

    comparison = detune.compare(recovered, truth)
    click.echo(comparison.to_json(), nl=False) if as_json else show_comparison(comparison)


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), help="Keep the models here; a temporary directory otherwise.")
@click.option("--steps", type=click.IntRange(min=1), help="Training steps of each LoRA.")
@click.option("--seed", default=0, show_default=True, help="Seed of all LoRAs: they share their initial A.")
def demo(out: Path | None, steps: int | None, seed: int) -> None:
    """The whole story on a real model, offline, in about two minutes: fine-tune, merge, recover, compare."""
    from detune.demo.story import tell

    tell(out, steps=steps, seed=seed)


def main() -> None:
    """Entry point: an error of the user's is one line on stderr and exit code 2."""
    try:
        sys.exit(cli(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except DetuneError as error:
        click.echo(f"detune: error: {error}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("detune: interrupted, no checkpoint was written", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone, as in `detune inspect ... | head`: not an error worth a word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


@contextmanager
def _progress(quiet: bool) -> Iterator["Callable[[str, TensorRow | None], None]"]:
    """A bar with the current tensor, on stderr; gone when done."""
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("opening the models", total=None)

        def on_tensor(name: str, row: "TensorRow | None") -> None:
            if row is None:
                bar.update(task, description=name)
            else:
                bar.advance(task)

        yield on_tensor


def _device(name: str) -> Any:
    import torch

    try:
        # float64 too: some devices have none.
        torch.ones(1, dtype=torch.float64, device=name).item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise DetuneError(
            f"no device {name!r} here",
            str(error).split("\n")[0],
            "use --device cpu, or install torch for your GPU",
        ) from None
    return torch.device(name)


def _merge_dtype(name: str) -> Any:
    import torch

    return torch.float32 if name == "float32" else None
