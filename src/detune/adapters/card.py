"""The cards of adapters: one for all that `extract` makes, and one for each, which may go its own way."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from detune._runtime import command_line
from detune.adapters.summary import adapter_sentence, adapter_table
from detune.checkpoints import PrivatePaths
from detune.checkpoints.cards import (
    CARD,
    InputCard,
    Licence,
    agreed_licence,
    command_block,
    kept_cards,
    licence_section,
    models_table,
    render_card,
)
from detune.markdown import code, fenced, table, text

if TYPE_CHECKING:
    from detune.adapters.changes import AdapterRow

__all__ = ["adapter_cards"]

MEANING = """\
*LoRA* went into a pair of factors, *whole* into the adapter as it is. *not kept* differs from the base by storage noise
alone, and PEFT has no place for what is *left out*. *identical bits* is the share of entries that base and adapter,
merged by PEFT, give back bit for bit; *largest ulp* is the largest deviation of the others, in units in the last place.
"""


def adapter_cards(
    summary: Mapping[str, Mapping[str, Any]],
    folders: Mapping[str, Sequence[str]],
    rows: "Sequence[AdapterRow]",
    models: Mapping[str, InputCard],
    base: InputCard | None,
    base_name: str,
    title: str,
    places: PrivatePaths,
) -> dict[str, bytes]:
    """The cards of an extraction.

    Args:
        summary: Summary of each adapter, as in `Extraction.summary`; those that were written.
        folders: The directories that PEFT loads each from: one, or one for each component of a pipeline.
        rows: Rows of the extraction.
        models: The models, by the name of their adapter.
        base: The base, where it is one of the inputs; None where it was recovered in the same pass.
        base_name: Its name.
        title: The name of the directory.
        places: What paths of this machine become in the models' own cards.

    Returns:
        Content by path in the directory.
    """
    known = [] if base is None else [base]

    def card(name: str, body: str, licence: Licence | None) -> bytes:
        hub_id = base.hub_id if base is not None else None
        parts = (f"# {text(name)}", body, licence_section(licence, "the models and of their base"))
        return render_card(
            "\n\n".join(parts),
            licence,
            base_model=hub_id,
            base_model_relation="adapter" if hub_id else None,
            library_name="peft",
            tags=["detune", "lora"],
        )

    made = command_block(command_line(), "detune.extract", places)
    files: dict[str, bytes] = {}
    for name, figures in summary.items():
        model = models[name]
        kept = kept_cards([model], places)
        inputs = [model, *known]
        body = f"""\
The LoRA of {code(model.name)} as a PEFT adapter of {code(base_name)}, extracted from the merged weights by detune.

{text(adapter_sentence(figures))}.

{fenced(_loading(folders[name]), "python")}
{models_table(inputs)}
{_own_cards(kept)}
{made}
{table(*adapter_table([row for row in rows if row.model == name]))}
{MEANING}"""
        licence = agreed_licence(inputs)
        files |= {f"{name}/{file}": content for file, content in kept.items()}
        files[f"{name}/{CARD}"] = card(name, body, licence)
    inputs = [*(models[name] for name in summary), *known]
    listed = [(name, models[name].name, adapter_sentence(figures)) for name, figures in summary.items()]
    body = f"""\
The LoRAs of {len(listed)} merged models as PEFT adapters of {code(base_name)}, extracted by detune. Each directory
is an adapter, with a card of its own.

{table(("adapter", "model", "what is in it"), listed)}
{models_table(inputs)}
{made}
{table(*adapter_table(rows))}
{MEANING}
{code("detune.json")} has a line for each tensor of each model."""
    files[CARD] = card(title, body, agreed_licence(inputs))
    return files


def _loading(folders: Sequence[str]) -> list[str]:
    bases = ["base" if "/" not in folder else f"base.{folder.partition('/')[2]}" for folder in folders]
    lines = (f"PeftModel.from_pretrained({base}, {folder!r})" for base, folder in zip(bases, folders, strict=True))
    return ["from peft import PeftModel", "", *lines]


def _own_cards(kept: Collection[str]) -> str:
    return f"The model's own card is {', '.join(map(code, kept))}.\n" if kept else ""
