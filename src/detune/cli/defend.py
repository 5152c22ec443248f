"""`detune defend`: a subcommand for each defence. Each parses and calls one public function of `detune.defences`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from detune.cli.output import Output, output_options
from detune.cli.terminal import say

if TYPE_CHECKING:
    from detune.defences import Defended

ABOUT = {
    "bf16": "round every weight to bfloat16",
    "fp16": "round every weight to float16",
    "int8": "quantise linear layers to 8 bits, a scale for each output channel",
    "nf4": "quantise linear layers to 4 bits, the NF4 of QLoRA",
    "fp8": "round linear layers to fp8 stochastically, the dither seeded by the tensor's name",
    "noise": "add Gaussian noise to the weights of linear layers",
    "quiet-noise": "add Gaussian noise in the input directions that cost the model least",
    "padding": "add a matrix of more than half the full rank in the input directions that cost least",
    "dither": "add one step's uniform noise, so that no weight lies on the base's grid",
    "permutation": "neurons and heads in another order in each release",
    "rotation": "keys and values of each head in another orthonormal basis in each release",
    "rescaling": "channels in other units in each release",
    "rearrangement": "neurons in another order, channels of heads in other units in each release (PaRaMS)",
    "invertible": "queries and keys, values and output in another invertible basis in each release (MergeLock)",
    "lorenc": "take the base's largest singular values out of linear layers; adapters bring them back",
    "frozen-a": "write the adapter that all fine-tunes of a base must start from, with its A frozen",
}
"""The defences of `DEFENCES`, and the one that comes before the training; a test holds them together."""

SETTINGS: dict[str, tuple[Callable[..., Any], ...]] = {
    "noise": (
        click.option("--size", type=click.FloatRange(min=0), help="Standard deviation as a share of the matrix's rms."),
    ),
    "quiet-noise": (
        click.option("--texts", required=True, type=click.Path(path_type=Path), help="A file, a text on each line."),
        click.option("--size", type=click.FloatRange(min=0), help="Root mean square as a share of the matrix's own."),
    ),
    "padding": (
        click.option("--texts", required=True, type=click.Path(path_type=Path), help="A file, a text on each line."),
        click.option("--size", type=click.FloatRange(min=0), help="Root mean square as a share of the matrix's own."),
    ),
    "dither": (
        click.option("--grid", type=click.Choice(["bfloat16", "float16", "float32"]), help="Of the base."),
        click.option("--steps", type=click.FloatRange(min=0), help="Width in steps of the grid."),
    ),
    "fp8": (click.option("--grid", type=click.Choice(["float8_e4m3fn", "float8_e5m2"]), help="Which fp8."),),
    "lorenc": (
        click.option("--base", required=True, type=click.Path(path_type=Path), help="What IN was fine-tuned from."),
        click.option("--rank", type=click.IntRange(min=1), help="How many singular values, in each layer."),
        click.option("--adapter", is_flag=True, default=None, help="As an authorised user has it, merged."),
    ),
    "nf4": (click.option("--block", type=click.IntRange(min=2), help="Weights with one scale."),),
}


@click.group(epilog="Releasing fewer than three models is a defence as well. docs/defences.md has what each is worth.")
def defend() -> None:
    """Change a fine-tune before it is released, so that several do not give their base away.

    IN is never changed, and nothing in OUT tells how it was made.
    """


def _command(name: str) -> click.Command:
    """The subcommand of a defence: what is not said is as the defence has it."""

    @click.argument("model", metavar="IN")
    @click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
    @click.option("--seed", type=click.IntRange(min=0), help="By default one that nobody can guess; keep it secret.")
    @output_options
    def run(model: str, out: Path, seed: int | None, output: Output, **settings: Any) -> None:
        from detune.cli.loading import load_torch

        load_torch()
        from detune.defences import DEFENCES
        from detune.defences import defend as defend_model

        given = {key: value for key, value in settings.items() if value is not None}
        with output.progress() as shown:
            report = defend_model(DEFENCES[name](**given), model, out, seed, on_start=shown.start, on_tensor=shown)
        output.show(report.to_json, lambda: _show(report), shown)

    for option in reversed(SETTINGS.get(name, ())):
        run = option(run)
    return click.command(name, help=f"Write IN to OUT: {ABOUT[name]}.", short_help=ABOUT[name])(run)


for _name in ABOUT:
    if _name != "frozen-a":
        defend.add_command(_command(_name))


@defend.command("frozen-a", short_help=ABOUT["frozen-a"])
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rank", default=32, show_default=True, type=click.IntRange(min=1), help="LoRA rank.")
@click.option("--alpha", default=64, show_default=True, type=click.IntRange(min=1), help="LoRA alpha.")
@click.option("--targets", default="query,value", show_default=True, help="Names of the linear layers to train.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of A; it is no secret.")
def frozen_a(base: Path, out: Path, rank: int, alpha: int, targets: str, seed: int) -> None:
    """Write a PEFT adapter of BASE to OUT, from which every fine-tune must start, with A frozen.

    In training: freeze_a(PeftModel.from_pretrained(base, OUT, is_trainable=True)).
    """
    from detune.cli.loading import load_torch

    load_torch()
    from detune.defences import FrozenA

    names = tuple(target.strip() for target in targets.split(",") if target.strip())
    say(f"wrote {FrozenA(rank, alpha, names).start(base, out, seed)}: train from it with detune's freeze_a")


def _show(report: "Defended") -> None:
    say(f"copied as they are: {', '.join(report.copied) or 'no files'}")
    say(
        f"wrote {report.out}: {report.changed} of {report.tensors} tensors changed, "
        f"by {report.relative_change:.2g} of their size; seed {report.seed}"
    )
    if report.preservation is not None:
        kept = report.preservation
        say(
            f"the same function: outputs of up to {kept.largest_output:.2g} "
            f"differ by at most {kept.largest_difference:.1e}; "
            f"rounding every weight once more changes them by {kept.rounding_difference:.1e}"
        )
