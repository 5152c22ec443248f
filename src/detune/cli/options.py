"""Options that several subcommands share, and what they are turned into."""

import warnings
from typing import Any

import click

from detune.cli.terminal import say
from detune.methods import CLASSES

METHODS = tuple(CLASSES)

models_argument = click.argument("models", nargs=-1, required=True, metavar="MODEL...")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be read and written, and how long.")
card_option = click.option(
    "--card/--no-card", default=True, help="Write README.md, a card with metadata for the Hub; by default it is."
)
device_option = click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
merge_option = click.option(
    "--merge-dtype",
    type=click.Choice(["base", "float32"]),
    default="base",
    show_default=True,
    help="For BASE+ADAPTER: merge in the base's dtype, as PEFT does, or in float32.",
)

dtype_option = click.option(
    "--dtype",
    type=click.Choice(["model", "bfloat16", "float16", "float32"]),
    default="model",
    show_default=True,
    help="Store OUT as the first model is, or in the base's own dtype.",
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


class Rows(click.ParamType[int | str]):
    """A positive number, "auto" or "all"."""

    name = "auto|all|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """A number, or one of the words."""
        if value in ("auto", "all"):
            return str(value)
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor 'auto' or 'all'.", param, ctx)


rows_option = click.option(
    "--rows",
    type=Rows(),
    default="auto",
    show_default=True,
    help="Rows of each matrix to look at. auto: 1024 if a model is on the Hub, of which no more is fetched; else all.",
)
rank_option = click.option(
    "--rank", type=Rank(), default="auto", show_default=True, help="The most that an adapter's rank can be."
)


def device_of(name: str) -> Any:
    """The torch device of a name, tried out; the CPU, with a word on stderr, where it has no float64.

    Raises:
        DetuneError: It is not there.
    """
    from detune.numerics.device import find_device

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        device = find_device(name)
    for warning in told:
        say(f"detune: {warning.message}", err=True)
    return device


def merge_dtype_of(name: str) -> Any:
    """The dtype to merge in; None is the base's."""
    import torch

    return torch.float32 if name == "float32" else None


def dtype_of(name: str) -> Any:
    """The dtype to store; None is the model's."""
    import torch

    return None if name == "model" else getattr(torch, name)
