"""The card of a recovered model."""

from collections.abc import Collection, Sequence

from detune._runtime import command_line
from detune.certificate.verdict import Verdict
from detune.checkpoints import PrivatePaths
from detune.checkpoints.cards import (
    CARD,
    InputCard,
    agreed_licence,
    command_block,
    kept_cards,
    licence_section,
    models_table,
    render_card,
)
from detune.markdown import code, table, text
from detune.recovery.report import Report
from detune.recovery.summary import doubts, report_table

__all__ = ["recovery_cards"]

# A family of a thousand kinds of tensors, or of reasons, is for `detune.json`: any number
# does that a page can hold.
MOST_LINES = 100


def recovery_cards(
    report: Report, inputs: Sequence[InputCard], library: str | None, title: str, places: PrivatePaths
) -> dict[str, bytes]:
    """The card of a recovery, and those of its models under other names.

    Args:
        report: The report, without places of this machine.
        inputs: The models as given, those that were left out too.
        library: What loads the model.
        title: The model's name.
        places: What paths of this machine become in the models' own cards.

    Returns:
        Content by file name.
    """
    used = [card for card, row in zip(inputs, report.inputs, strict=True) if row.left_out is None]
    left_out = [(card.name, row.left_out) for card, row in zip(inputs, report.inputs, strict=True) if row.left_out]
    licence = agreed_licence(used)
    kept = kept_cards(used, places)
    hub_ids = [card.hub_id for card in used if card.hub_id is not None]
    columns, lines = report_table(report)
    body = f"""\
# {text(title)}

{_what(report, len(used))} This is no release of the base's authors: how close each tensor is to theirs is said
[below](#how-far-it-can-be-trusted).

## Recovered from

{models_table(used)}
{_left_out(left_out)}
{_own_cards(kept)}
{command_block(command_line(), "detune.recover", places)}
## How far it can be trusted

{_shortened(table(columns, lines[:MOST_LINES]), len(lines)) if lines else ""}
{_verdicts(report)}
{_doubts(report)}
*W-Error* is log10 of the mean squared error of a tensor against the true base, predicted without having it: lower is
better. *residual* is the share of the spread between the models that the answer does not explain, *× noise* the same in
units of their storage rounding, where 1 is the floor. {code("detune.json")} has all of it for each tensor.

{licence_section(licence, "the base's owner")}
## Method

Spectral DeTuning, Horwitz, Kahana & Hoshen, *Recovering the Pre-Fine-Tuning Weights of Generative Models*, ICML 2024,
[arXiv 2402.10208](https://arxiv.org/abs/2402.10208); this recovery is by detune's {code(_method(report))}.
"""
    card = render_card(
        body,
        licence,
        # The models that the weights were computed from. "merge" is the only relation of the Hub with several models.
        base_model=hub_ids,
        base_model_relation="merge" if hub_ids else None,
        library_name=library,
        tags=["detune", "weight-recovery"],
    )
    return {**kept, CARD: card}


def _what(report: Report, models: int) -> str:
    """The name of the weights: where nothing was solved, no recovery."""
    counted = f"{models} fine-tuned model{'s' * (models != 1)}"
    made = f"by detune {text(report.versions['detune'])}."
    if any(row.is_solved or row.verdict is Verdict.EXACT for row in report.tensors):
        return f"The weights that {counted} came from, recovered from the fine-tunes alone {made}"
    return f"The `{_method(report)}` of {counted}, made {made} It is there to compare with, and is no recovery."


def _left_out(models: Sequence[tuple[str, str]]) -> str:
    return "".join(f"Left out: {text(name)}, because {text(why)}.\n\n" for name, why in models)


def _own_cards(kept: Collection[str]) -> str:
    if not kept:
        return ""
    return f"The fine-tunes' own cards are {', '.join(map(code, kept))}: they speak of those, not of this model.\n"


def _verdicts(report: Report) -> str:
    counted = [(str(verdict), str(count), verdict.meaning) for verdict, count in report.counts.items()]
    return table(("verdict", "tensors", "what it means"), counted)


def _doubts(report: Report) -> str:
    found = doubts(report)
    listed = "".join(f"- {text(str(doubt))}\n" for doubt in found[:MOST_LINES])
    return _shortened(listed, len(found))


def _shortened(shown: str, lines: int) -> str:
    left = lines - MOST_LINES
    return f"{shown}\n{left} more lines are in {code('detune.json')}.\n" if left > 0 else shown


def _method(report: Report) -> str:
    """The method by its name, without its settings, which are in `detune.json`."""
    return str(report.command["method"]).partition("(")[0].lower()
