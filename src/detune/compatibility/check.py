"""Is it one family? Which models share a source, which do not and why, and whether what is left suffices."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from detune._runtime import OnStart
from detune.compatibility.common_tensors import ModelTensors
from detune.compatibility.groups import BaseGroups, group_fitting, why_left_out
from detune.compatibility.light import some_of_each_pattern
from detune.compatibility.model_set import Models, rows_to_read
from detune.compatibility.reading import Reading
from detune.compatibility.shared import some
from detune.compatibility.tensor_change import ChangedTensor, ForeignTensor, find_tensor_change
from detune.documents import document, to_json
from detune.errors import InputError
from detune.problem.recovery import FEWEST_MODELS

ADDED = "rows that each model has added by itself: they can only be averaged"


@dataclass(frozen=True)
class ModelStatus:
    """One model, as it stands to the others.

    Attributes:
        spec: As the user gave it.
        group: Number of its group, 0 the largest; None where it could not be compared.
        belongs: Whether it is of the family.
        reason: One sentence: what it changed, or why it does not belong.
        foreign: Tensors in which it is not like the family, although it belongs.
    """

    spec: str
    group: int | None
    belongs: bool
    reason: str
    foreign: tuple[ForeignTensor, ...] = ()


@dataclass(frozen=True)
class FamilyCheck:
    """The outcome of `check_family`.

    Attributes:
        models: All, in the order given.
        tensors: Those that differ within the family, in file order.
        shared: Number of tensors that all of the family have in common.
        looked_at: Number of matrices that the groups are judged by.
        suffices: Whether at least three models share a source and every changed matrix can be recovered.
        verdict: One sentence.
        reading: How much of the models was read; None where it was all.
    """

    models: tuple[ModelStatus, ...]
    tensors: tuple[ChangedTensor, ...]
    shared: int
    looked_at: int
    suffices: bool
    verdict: str
    reading: Reading | None = None

    @property
    def members(self) -> tuple[ModelStatus, ...]:
        """The models of the family."""
        return tuple(model for model in self.models if model.belongs)

    def to_json(self) -> str:
        """All of it as JSON."""
        return to_json(document("detune-family/1", asdict(self)))


@dataclass(frozen=True)
class _Sorted:
    """Models by common source.

    Attributes:
        given: The models.
        found: The clusters of those that could be compared, with their places among the models given.
    """

    given: Models
    found: BaseGroups

    @property
    def largest(self) -> list[tuple[int, ...]]:
        """The largest group, or all of that size."""
        groups = self.found.groups
        return [group for group in groups if len(group) == len(groups[0])]

    @property
    def members(self) -> tuple[int, ...]:
        """The family. Empty where two groups are equally large, because it is not ours to say which is meant."""
        return self.largest[0] if len(self.largest) == 1 else ()


def check_family(
    models: Sequence[str | Path],
    *,
    device: torch.device | str | None = None,
    merge_dtype: torch.dtype | None = None,
    rows: int | Literal["auto", "all"] = "auto",
    on_start: OnStart | None = None,
    on_tensor: Callable[[str, tuple[ChangedTensor, ...] | None], None] | None = None,
) -> FamilyCheck:
    """Group models by common source, and say who does not belong and why. Writes nothing.

    Args:
        models: At least two, as `detune.checkpoints.open_checkpoint` takes them. They need not fit together.
        device: Where to compute ranks; None is the CPU.
        merge_dtype: For `BASE+ADAPTER`: merge in this dtype instead of the base's.
        rows: Rows of each matrix to look at; what is said is then of these. "auto" is 1024 if a model is on the Hub, of
            which no more is fetched, and all otherwise. A model that does not belong is read whole in a few matrices.
        on_start: For progress: called once with the tensors, and what is read of each in bytes.
        on_tensor: Called with a tensor's name and None when it is begun, and with its row when it is done: none where
            all have the same.

    Returns:
        The models with their groups and reasons, the tensors that changed with a rank for each model, and a verdict.

    Raises:
        InputError: A model cannot be read, is given twice, or holds NaN or Inf.

    Example:
        >>> check = check_family(["ft-a", "ft-b", "ft-c", "other"])  # doctest: +SKIP
        >>> [model.belongs for model in check.models]  # doctest: +SKIP
        [True, True, True, False]
    """
    if len(models) < 2:
        raise InputError(f"{len(models)} model given", "a family has at least two", "add models")
    with Models(models, merge_dtype, rows_to_read(models, rows)) as given:
        known = _Sorted(given, group_fitting(given.models, given.common))
        names = tuple(given.common.pieces) if len(known.members) > 1 else ()
        closer = some_of_each_pattern({name: given.reference.tensors[name].shape for name in names})
        foreign = [row for i in known.members for row in _unlike(i, given.common.fits[i])]
        tensors, shared = [], 0
        all_holders = {name: [i for i in known.members if name in given.models[i].tensors] for name in names}
        if on_start:
            on_start({name: sum(given.models[i].shown_bytes(name) for i in all_holders[name]) for name in names})
        for name, holders in all_holders.items():
            if on_tensor:
                on_tensor(name, None)
            change = None
            if holders:
                change = find_tensor_change(given.models, known.members, holders, name, device, name in closer)
            if change is not None and given.common.pieces[name].added:
                tensors.append(replace(change.tensor, ranks=(), enough=False, reason=ADDED))
            elif change is not None:
                tensors.append(change.tensor)
                foreign.extend(change.foreign)
            else:
                shared += 1
            if on_tensor:
                on_tensor(name, () if change is None else (change.tensor,))
        statuses = tuple(_model_status(i, known, tensors, foreign) for i in range(len(models)))
        reading = given.reading
    suffices, verdict = _verdict(known, tensors)
    looked_at = len(known.found.splits)
    return FamilyCheck(statuses, tuple(tensors), shared, looked_at, suffices, verdict, reading)


def _unlike(i: int, fit: ModelTensors | None) -> list[ForeignTensor]:
    """Tensors by which a model differs from the layout."""
    if fit is None:
        return []
    rows = [ForeignTensor(i, name, "additional") for name in fit.extra]
    rows += [ForeignTensor(i, name, "missing") for name in fit.missing]
    rows += [
        ForeignTensor(i, name, f"{count} rows: those that models share count") for name, count in fit.resized.items()
    ]
    return rows + [ForeignTensor(i, name, why) for name, why in fit.unlike.items()]


def _model_status(
    i: int, known: _Sorted, tensors: Sequence[ChangedTensor], foreign: Sequence[ForeignTensor]
) -> ModelStatus:
    """The row of one model."""
    spec, models = known.given.models[i].spec, known.given.models
    place = next((k for k, places in enumerate(known.found.groups) if i in places), None)
    if place is None:
        return ModelStatus(spec, None, False, f"another architecture: {known.given.common.misfits[i]}")
    if not known.members:
        return ModelStatus(spec, place, False, f"one of {len(known.found.groups[place])} models of one source")
    if i not in known.members:
        return ModelStatus(spec, place, False, why_left_out(models, known.found, i))
    own = tuple(row for row in foreign if row.model == i)
    reason = _changes(tensors, known.members.index(i))
    if own:
        reason += f"; {len(own)} tensor{'s' * (len(own) > 1)} of its own: {some([row.name for row in own])}"
    return ModelStatus(spec, place, True, reason, own)


def _changes(tensors: Sequence[ChangedTensor], member: int) -> str:
    """The numbers of tensors that a member changed, and of those in which a rank shows."""
    changed = [row for row in tensors if row.changed[member]]
    matrices = [row for row in changed if len(row.shape) > 1]
    said = f"changed {len(matrices)} {_matrices(len(matrices))}"
    ranked = [row for row in matrices if row.ranks]
    showing = sum(bool(row.ranks[member]) for row in ranked)
    if ranked and showing == len(ranked):
        said += " at low rank" + f", {showing} looked at" * (showing < len(matrices))
    elif ranked:
        said += f", a low rank shows in {showing} of {len(ranked)} looked at"
    if others := len(changed) - len(matrices):
        said += f"; {others} other tensor{'s' * (others > 1)}"
    if light := sum(row.light for row in matrices):
        where = "" if light == len(matrices) else f"in {light} "
        said += f"; {where}by less than a step of half precision, where a full fine-tune looks like LoRA"
    return said


def _verdict(known: _Sorted, tensors: Sequence[ChangedTensor]) -> tuple[bool, str]:
    """Whether the family suffices, and why, in a sentence."""
    models = known.given.models
    n, size = len(models), len(known.largest[0])
    if not known.members:
        sources = " and ".join("{" + ", ".join(models[i].spec for i in c) + "}" for c in known.largest)
        return False, f"{len(known.largest)} sources with {size} model{'s' * (size > 1)} each: {sources}"
    if size < FEWEST_MODELS:
        return False, f"{size} of {n} models share a source: recovery needs {FEWEST_MODELS}"
    matrices = [row for row in tensors if len(row.shape) > 1]
    lost = [row.name for row in matrices if not row.enough]
    others = sum(not row.enough for row in tensors) - len(lost)
    also = f"; {others} that {'is no matrix' if others == 1 else 'are no matrices'} can be averaged or copied" * (
        others > 0
    )
    source = f"{size} of {n} models share a source"
    if not tensors:
        return True, f"{source}: no tensor differs"
    if lost:
        good = len(matrices) - len(lost)
        return False, f"{source}: {good} of {len(matrices)} changed matrices can be recovered, not {some(lost)}{also}"
    return True, f"{source}: all {len(matrices)} changed {_matrices(len(matrices))} can be recovered{also}"


def _matrices(count: int) -> str:
    return "matrix" if count == 1 else "matrices"
