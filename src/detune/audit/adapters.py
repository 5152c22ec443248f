"""Adapters, once the base is back: which layers, which ranks, and on how much data they were trained."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from detune.audit.dataset_size import Reference, SizeEstimate, estimate_size, spectrum_of
from detune.audit.record import ModelEntry, Result, Rule, TensorEntry
from detune.checkpoints import Checkpoint
from detune.checkpoints.lora import open_lora
from detune.errors import InputError, parsing
from detune.files import read_regular
from detune.numerics.linalg import randomized_svd
from detune.problem.stack import matricise

__all__ = ["ADAPTERS", "ChangeSpectra", "changes_are_known", "find_in_adapters", "read_references"]

ADAPTERS = (
    Rule(
        id="adapters",
        title="What is known of a release's adapter",
        help="With the base at hand, each release's LoRA follows by subtraction: its layers and its ranks.",
    ),
    Rule(
        id="dataset-size",
        title="On how many examples a release was trained",
        help="By the singular values of its LoRA, against LoRAs of the same making whose training is known (DSiRe). In "
        "nine of ten of those, held out with all of their group, the truth lay in such a range.",
    ),
)

_MOST_BYTES = 2**22
_COLUMNS = ("adapter", "examples", "group")
_KINDS_SHOWN = 4
# Beyond the rank; what is left is rounding (Halko et al. 2011, section 1.3, suggest 5 to 10).
_OVERSAMPLING = 8


class ChangeSpectra:
    """Singular values of each release's changes, gathered tensor by tensor.

    Args:
        releases: How many.
    """

    def __init__(self, releases: int) -> None:
        self.of_release: tuple[dict[str, Tensor], ...] = tuple({} for _ in range(releases))

    def add(self, name: str, tensors: Sequence[Tensor], base: Tensor, ranks: Sequence[int]) -> None:
        """Add one tensor.

        Args:
            name: Its qualified name.
            tensors: What each release holds of it.
            base: The base's, given or recovered.
            ranks: Ranks of the changes; empty where they are not known, and nothing can be said.
        """
        W = matricise(base).double()
        for found, tensor, rank in zip(self.of_release, tensors, ranks, strict=False):
            if rank:
                D = matricise(tensor).double() - W
                width = min(rank + _OVERSAMPLING, *D.shape)
                found[name] = randomized_svd(D, width, torch.Generator().manual_seed(0))[1][:rank]


def read_references(file: Path, model: Checkpoint) -> tuple[Reference, ...]:
    """LoRAs whose training is known, from a table.

    Args:
        file: CSV with the columns adapter (a place beside the file), examples and group; see `Reference`.
        model: A release: which of its tensors an adapter's layers are.

    Raises:
        InputError: It cannot be read, has other columns, or names no adapter.
    """
    try:
        with parsing(file):
            text = read_regular(file, _MOST_BYTES).decode("utf-8")
            rows = list(csv.DictReader(io.StringIO(text)))
    except OSError as error:
        raise InputError(f"cannot read {file}", str(error.strerror), "give a CSV file") from None
    if not rows or any(column not in rows[0] for column in _COLUMNS):
        found = ", ".join(str(column) for column in rows[0]) if rows else "nothing"
        raise InputError(
            f"{file} is no table of adapters", f"found {found}, expected {', '.join(_COLUMNS)}", "add them"
        )
    return tuple(_reference(file, row, model) for row in rows)


def _reference(file: Path, row: Mapping[str, str | None], model: Checkpoint) -> Reference:
    adapter, examples, group = (row[column] or "" for column in _COLUMNS)
    if not (examples.isdecimal() and int(examples)):
        raise InputError(
            f"{file} does not say what {adapter!r} was trained on",
            f"got {examples!r} examples, expected a number from 1 on",
            "correct that line",
        )
    lora = open_lora(file.parent / adapter, model)
    layers = map(lora.read, lora.names)
    return Reference(
        {layer.name: spectrum_of(layer.A.flatten(1), layer.B.flatten(1), layer.alpha / layer.rank) for layer in layers},
        int(examples),
        group,
    )


def find_in_adapters(
    tensors: Sequence[TensorEntry],
    models: Sequence[ModelEntry],
    has_base: bool,
    spectra: ChangeSpectra,
    references: Sequence[Reference] = (),
) -> tuple[Result, ...]:
    """Everything that the releases' adapters tell.

    Args:
        tensors: The changed tensors.
        models: The releases that were used.
        has_base: Whether the base was given, so that changes are known that the releases do not give away.
        spectra: Spectra of their changes, where there are references.
        references: LoRAs whose training is known; none says nothing of the size of training sets.

    Raises:
        InputError: The references are too few, or of other layers.
    """
    results = []
    for i, (model, found) in enumerate(zip(models, spectra.of_release, strict=True)):
        layers = [entry for entry in tensors if changes_are_known(entry, has_base) and entry.outcomes[-1].ranks[i]]
        if layers:
            results.append(_layers(model, i, layers))
        if found:
            results.append(_size(model, estimate_size(found, references)))
    return tuple(results)


def changes_are_known(entry: TensorEntry, has_base: bool) -> bool:
    """Whether the releases' changes of a tensor can be had: it is a matrix, and its base is given or given away."""
    outcome = entry.outcomes[-1]
    return entry.is_matrix and bool(outcome.ranks) and (has_base or outcome.given_away)


def _layers(model: ModelEntry, release: int, entries: Sequence[TensorEntry]) -> Result:
    ranks = sorted({entry.outcomes[-1].ranks[release] for entry in entries})
    kinds = list(dict.fromkeys(entry.kind.removesuffix(".weight") for entry in entries))
    shown = ", ".join(kinds[:_KINDS_SHOWN]) + (f" and {len(kinds) - _KINDS_SHOWN} more" * (len(kinds) > _KINDS_SHOWN))
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    plural = "matrix" if len(entries) == 1 else "matrices"
    return Result(
        rule_id="adapters",
        level="note",
        message=f"{model.spec}: a LoRA of {span} on {len(entries)} {plural}: {shown}",
        properties={"release": model.spec, "matrices": len(entries), "kinds": [*kinds], "ranks": [*ranks]},
    )


def _size(model: ModelEntry, size: SizeEstimate) -> Result:
    return Result(
        rule_id="dataset-size",
        level="note",
        message=f"{model.spec}: trained on about {size.examples} examples, between {size.low:.0f} and {size.high:.0f} "
        f"in nine cases of ten; {size.votes:.0%} of {size.layers} layers agree",
        properties={
            "release": model.spec,
            "examples": size.examples,
            "low": size.low,
            "high": size.high,
            "votes": size.votes,
            "layers": size.layers,
        },
    )
