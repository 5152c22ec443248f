"""`detune defend`: a subcommand for each defence, which says itself what it is and what can be set.

Each parses and calls one public function of `detune.defences`.
"""

from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import click

from detune.cli.loading import load_torch
from detune.cli.output import Output, output_options
from detune.cli.terminal import say

if TYPE_CHECKING:
    from detune.defences import Defence, Defended

_FROZEN_A = "frozen-a"
"""The defence that comes before the training, and is none of `DEFENCES`."""


class _Defences(click.Group):
    """A subcommand for each of `DEFENCES`, which are imported once somebody asks for one: they bring torch along."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See `click.Group`."""
        return [*_defences(), _FROZEN_A]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """See `click.Group`."""
        if cmd_name == _FROZEN_A:
            return _frozen_a()
        found = _defences().get(cmd_name)
        return _command(found) if found is not None else None


def _defences() -> "dict[str, type[Defence]]":
    load_torch()
    from detune.defences import DEFENCES

    return DEFENCES


@click.group(
    cls=_Defences,
    epilog="Releasing fewer than three models is a defence as well. docs/defences.md has what each is worth.",
)
def defend() -> None:
    """Change a fine-tune before it is released, so that several do not give their base away.

    IN is never changed, and nothing in OUT tells how it was made.
    """


def _command(defence: "type[Defence]") -> click.Command:
    """The subcommand of a defence: what is not said is as the defence has it."""

    @click.argument("model", metavar="IN")
    @click.argument("out", metavar="OUT", type=click.Path(path_type=Path, readable=False))
    @click.option("--seed", type=click.IntRange(min=0), help="By default one that nobody can guess; keep it secret.")
    @output_options
    def run(model: str, out: Path, seed: int | None, output: Output, **settings: Any) -> None:
        from detune.defences import defend as defend_model

        given = {key: value for key, value in settings.items() if value is not None}
        with output.progress() as shown:
            report = defend_model(defence(**given), model, out, seed, on_start=shown.start, on_tensor=shown)
        output.show(report.to_json, lambda: _show(report), shown)

    kinds, settings = get_type_hints(defence), fields(defence)  # type: ignore[arg-type]  # all are dataclasses
    for setting in reversed(settings):
        # The others are for Python alone.
        if setting.metadata:
            run = _option(setting, kinds[setting.name])(run)
    return click.command(defence.name, help=f"Write IN to OUT: {defence.about}.", short_help=defence.about)(run)


def _option(setting: "Field[Any]", kind: Any) -> Callable[..., Any]:
    """The option of a setting, by the type of its field."""
    about, least = setting.metadata["help"], setting.metadata["least"]
    form: dict[str, Any]
    if get_origin(kind) is Literal:
        form = {"type": click.Choice(get_args(kind))}
    elif kind is bool:
        form = {"is_flag": True, "default": None}
    else:
        form = {
            "type": {
                float: click.FloatRange(min=least),
                int: click.IntRange(min=least),
                Path: click.Path(path_type=Path, readable=False),
            }[kind]
        }
    return click.option(f"--{setting.name}", required=setting.default is MISSING, help=about, **form)


def _frozen_a() -> click.Command:
    """The subcommand of the defence that is trained with."""
    load_torch()
    from detune.defences import FrozenA

    @click.command(_FROZEN_A, short_help=FrozenA.about)
    @click.argument("base", type=click.Path(path_type=Path, readable=False))
    @click.argument("out", type=click.Path(path_type=Path, readable=False))
    @click.option("--rank", default=32, show_default=True, type=click.IntRange(min=1), help="LoRA rank.")
    @click.option("--alpha", default=64, show_default=True, type=click.IntRange(min=1), help="LoRA alpha.")
    @click.option("--targets", default="query,value", show_default=True, help="Names of the linear layers to train.")
    @click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of A; it is no secret.")
    def frozen_a(base: Path, out: Path, rank: int, alpha: int, targets: str, seed: int) -> None:
        """Write a PEFT adapter of BASE to OUT, from which every fine-tune must start, with A frozen.

        In training: freeze_a(PeftModel.from_pretrained(base, OUT, is_trainable=True)).
        """
        names = tuple(target.strip() for target in targets.split(",") if target.strip())
        say(f"wrote {FrozenA(rank, alpha, names).start(base, out, seed)}: train from it with detune's freeze_a")

    return frozen_a


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
