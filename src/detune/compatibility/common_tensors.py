"""The one place that decides which models take part in which tensor, under which name, and as which matrices.

Models of one base are published with other prefixes, more or fewer tokens, tied heads saved or not, and expert weights
stacked into one tensor. Here each model is held against the layout of one of them: its tensors are found by name and
shape (`names.align_names`), an embedding is cut where the models have different numbers of rows (`vocabulary`), a
stack of experts into its matrices. What comes out is a view of every model. Everything behind it sees matrices of one
name and shape.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from detune.checkpoints import Checkpoint, Excerpt, Part, TensorInfo, View, raw
from detune.compatibility.names import TwoWays, align_names, bare
from detune.compatibility.shared import LISTED, is_shared, some
from detune.compatibility.vocabulary import (
    cut_vocabulary,
    first_own_row,
    held_rows,
    is_vocabulary,
    resized_rows,
    vocabulary_sizes,
)
from detune.errors import InputError
from detune.numerics.float_grid import name_of
from detune.problem.recovery import FEWEST_MODELS

__all__ = ["CommonTensors", "ModelTensors", "find_common_tensors", "is_stack", "view_of"]

# A model that has less than half of the layout's tensors is of another architecture (definition).
SAME_ARCHITECTURE = 1 / 2
# Names of stacks `(experts, out, in)` or `(experts, in, out)` in transformers: kernels can have that shape too.
STACK = re.compile(r"expert|(^|[._])moe[._]")


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of one model, held against the layout.

    Attributes:
        parts: What takes part, by the names that all models have it under.
        names: The model's own name for each tensor of the layout that it has, in whatever shape.
        missing: Tensors of the layout that the model lacks.
        extra: Tensors of the model that the layout lacks.
        unlike: Tensors that the model has otherwise, and in what.
        resized: For each tensor with a row for each token, how many rows the model has, where they are not the
            layout's.
        renamed: How many tensors have another name in the model, and one of them.
    """

    parts: Mapping[str, Part]
    names: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    unlike: Mapping[str, str] = field(default_factory=dict)
    resized: Mapping[str, int] = field(default_factory=dict)
    renamed: tuple[int, str, str] | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """The differences of the model from the layout, a sentence each."""
        notes = []
        if self.renamed:
            count, own, name = self.renamed
            notes.append(f"{count} of its tensors have other names, {own!r} for {name!r}")
        for name, rows in self.resized.items():
            notes.append(f"{name!r} has {rows} rows in it: those that models share are solved by themselves")
        turned = [name for name, part in self.parts.items() if part.turned]
        if turned:
            notes.append(f"it has {some(turned)} transposed")
        if self.missing:
            notes.append(f"it lacks {some(self.missing)}")
        if self.extra:
            notes.append(f"it has in addition {some(self.extra)}, which the output has not")
        notes += [f"{name!r} takes no part: {why}" for name, why in self.unlike.items()]
        return tuple(notes)


@dataclass(frozen=True)
class CommonTensors:
    """All models, held against the layout of one of them.

    Attributes:
        layout: The place of that model.
        fits: For each model how it fits; None where it is of another architecture.
        misfits: Why it is, for those.
        pieces: The parts of the layout's tensors, by the names that all models have them under.
    """

    layout: int
    fits: tuple[ModelTensors | None, ...]
    misfits: Mapping[int, InputError]
    pieces: Mapping[str, Part]

    @property
    def fitting(self) -> tuple[int, ...]:
        """Places of the models of the layout's architecture."""
        return tuple(i for i, fit in enumerate(self.fits) if fit is not None)

    def notes(self, model: int) -> tuple[str, ...]:
        """The differences of a model from the layout."""
        fit = self.fits[model]
        return fit.notes if fit else ()

    def shown(self, models: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
        """Views of the models, in place of what they were views of; one that needs none stays as it is."""
        return tuple(_shown(model, fit) for model, fit in zip(models, self.fits, strict=True))


def find_common_tensors(models: Sequence[Checkpoint], like: int | None = None) -> CommonTensors:
    """Hold models against the layout that most of them have.

    Args:
        models: Opened checkpoints, or views or excerpts of them.
        like: The model whose layout the others are held against; None takes what most models have: their names, and the
            vocabulary that most have, or else the smallest.

    Returns:
        How each fits.

    Raises:
        InputError: Names align in two ways, or a model holds a tensor twice with different bytes.
    """
    whole = [raw(model) for model in models]
    layout = _layout(whole) if like is None else like
    reference = whole[layout].tensors
    found = [_find(whole[layout], model) for model in whole]
    fitting = [i for i, each in enumerate(found) if len(each.parts) >= SAME_ARCHITECTURE * len(reference)]
    for i in fitting:
        found[i].parts.update(_tied(whole, found, fitting, i))
    pieces = {}
    for name, info in reference.items():
        holders = [View(whole[i], {name: found[i].parts[name]}) for i in fitting if name in found[i].parts]
        looked_at = not any(isinstance(models[i], Excerpt) for i in fitting)
        own = first_own_row(holders, name) if looked_at and is_vocabulary(name) else None
        pieces[name] = _cut(info, [holder.tensors[name].shape for holder in holders], own)
    fits = [_matched(whole[layout], model, each, pieces) for model, each in zip(whole, found, strict=True)]
    return CommonTensors(
        layout,
        tuple(fit if i in fitting else None for i, fit in enumerate(fits)),
        {i: _misfit(whole[layout], model, found[i]) for i, model in enumerate(whole) if i not in fitting},
        {key: part for each in pieces.values() for key, part in each.items()},
    )


def view_of(model: Checkpoint, layout: Checkpoint, pieces: Mapping[str, Part]) -> Checkpoint:
    """Another model by the names and in the pieces that some have already.

    Args:
        model: The model.
        layout: The model of the layout, as it is stored.
        pieces: As in `CommonTensors`.

    Raises:
        InputError: It is of another architecture, or its names align in two ways.
    """
    found = _find(layout, raw(model))
    if len(found.parts) < SAME_ARCHITECTURE * len(layout.tensors):
        raise _misfit(layout, model, found)
    grouped: dict[str, dict[str, Part]] = {}
    for key, part in pieces.items():
        grouped.setdefault(part.tensor, {})[key] = part
    return _shown(model, _matched(layout, raw(model), found, grouped))


@dataclass(frozen=True)
class _Found:
    """A model's tensors, by the layout's names.

    Attributes:
        names: Its own name for each, of those that it has one for.
        parts: The tensors themselves, of those that can be compared with the layout's.
        unlike: Why the others cannot.
    """

    names: Mapping[str, str]
    parts: dict[str, Part]
    unlike: Mapping[str, str]


def _find(layout: Checkpoint, model: Checkpoint) -> _Found:
    shapes = [{name: info.shape for name, info in each.tensors.items()} for each in (layout, model)]
    try:
        names = align_names(*shapes)
    except TwoWays as error:
        raise InputError(
            f"the tensors of {model.spec} and {layout.spec} can be matched in two ways",
            f"{error.name!r} may be {' or '.join(map(repr, error.candidates))}",
            "save them from one class, or give only the part that they have in common",
        ) from None
    _check_single(model, names.values())
    sizes = vocabulary_sizes(layout, model, names)
    parts, unlike = {}, {}
    for name, own in names.items():
        expected, info = layout.tensors[name], model.tensors[own]
        if expected.dtype.is_floating_point != info.dtype.is_floating_point:
            unlike[name] = f"stored as {name_of(info.dtype)} instead of {name_of(expected.dtype)}"
        elif info.shape == expected.shape or resized_rows(expected, info) in sizes:
            parts[name] = Part(own)
        elif _is_turned(name, expected.shape, info.shape):
            parts[name] = Part(own, turned=True)
        else:
            unlike[name] = f"shape {list(info.shape)} instead of {list(expected.shape)}"
    return _Found(names, parts, unlike)


def _check_single(model: Checkpoint, used: Collection[str]) -> None:
    """Refuse a model that holds a tensor twice, under a wrapper's name too, with different bytes."""
    by_bare = {bare(name).removeprefix("module."): name for name in used}
    for name in model.tensors:
        other = by_bare.get(bare(name).removeprefix("module."), name)
        if other != name and model.tensors[name].shape == model.tensors[other].shape and not _tie(model, name, other):
            raise InputError(
                f"{model.spec} holds a tensor twice",
                f"{name!r} and {other!r} have different bytes",
                "save the model again, without the wrapper",
            )


def _tie(model: Checkpoint, name: str, other: str) -> bool:
    """Whether two tensors of a model are one."""
    return is_shared([View(model, {"tie": Part(each)}) for each in (name, other)], "tie")


def _is_turned(name: str, shape: Sequence[int], other: Sequence[int]) -> bool:
    is_matrix = len(shape) == 2 or is_stack(name, shape)
    return is_matrix and tuple(other) == (*shape[:-2], shape[-1], shape[-2])


def is_stack(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is the matrices of several experts."""
    return len(shape) == 3 and STACK.search(name) is not None


def _tied(whole: Sequence[Checkpoint], found: Sequence[_Found], fitting: Sequence[int], model: int) -> dict[str, Part]:
    """Tied tensors, which a model does not store because others of it have the same bytes wherever both are stored."""
    ties = {}
    stored = [(whole[i], found[i].parts) for i in fitting if i != model]
    for name in {name for _, parts in stored for name in parts} - set(found[model].names):
        holders = [(holder, parts) for holder, parts in stored if name in parts]
        for other, part in found[model].parts.items():
            if all(other in parts and _may_tie(holder, parts[name], parts[other]) for holder, parts in holders) and all(
                _tie(holder, parts[name].tensor, parts[other].tensor) for holder, parts in holders
            ):
                ties[name] = part
                break
    return ties


def _may_tie(model: Checkpoint, one: Part, other: Part) -> bool:
    first, second = (model.tensors[part.tensor] for part in (one, other))
    return len(first.shape) > 1 and (first.shape, first.dtype, one.turned) == (second.shape, second.dtype, other.turned)


def _misfit(layout: Checkpoint, model: Checkpoint, found: _Found) -> InputError:
    """The error for a model of another architecture."""
    expected = layout.tensors
    missing = [name for name in expected if name not in found.names]
    unlike = [f"{name!r} with {why}" for name, why in found.unlike.items()]
    parts = [f"it lacks {some(missing)}"] * bool(missing) + [f"it has {', '.join(unlike[:LISTED])}"] * bool(unlike)
    return InputError(
        f"{model.spec} does not fit {layout.spec}",
        f"{len(found.parts)} of {len(expected)} tensors are alike, {'; '.join(parts)}",
        "give checkpoints of one architecture",
    )


def _cut(info: TensorInfo, shapes: Sequence[Sequence[int]], own: int | None) -> dict[str, Part]:
    """The parts of a tensor of the layout, by name: see `cut_vocabulary` for the arguments."""
    name = info.name
    if is_stack(name, info.shape):
        return {f"{name}[{k}]": Part(name, k, k + 1, alone=True) for k in range(info.shape[0])}
    return cut_vocabulary(info, shapes, own)


def _matched(
    layout: Checkpoint, model: Checkpoint, found: _Found, pieces: Mapping[str, Mapping[str, Part]]
) -> ModelTensors:
    parts: dict[str, Part] = {}
    resized = {}
    for name, each in pieces.items():
        source, expected = found.parts.get(name), layout.tensors[name].shape
        if source is None:
            continue
        rows = model.tensors[source.tensor].shape[:1]
        if not source.turned and rows != expected[:1]:
            resized[name] = rows[0]
        for key, piece in each.items():
            if piece.alone:
                parts[key] = replace(piece, tensor=source.tensor, turned=source.turned)
            elif source.turned or (piece.is_whole and rows == expected[:1]):
                parts[key] = source
            elif (held := held_rows(piece, expected, rows[0], source.tensor)) is not None:
                parts[key] = held
    renamed = [(own, name) for name, own in found.names.items() if own != name]
    used = {part.tensor for part in found.parts.values()} | set(found.names.values())
    return ModelTensors(
        parts,
        found.names,
        tuple(name for name in pieces if name not in found.parts and name not in found.unlike),
        tuple(name for name in model.tensors if name not in used),
        found.unlike,
        resized,
        (len(renamed), *renamed[0]) if renamed else None,
    )


def _layout(models: Sequence[Checkpoint]) -> int:
    """The model with the names, then the vocabulary, that most have; of several by prefixes, by size, and the first."""
    names = Counter(name for model in models for name in model.tensors)
    shapes = Counter((name, info.shape) for model in models for name, info in model.tensors.items())
    most = len(models) // 2 + 1
    enough = max(most, min(FEWEST_MODELS, len(models)))

    def rank(i: int) -> tuple[int, int, int, int, int]:
        tensors = models[i].tensors
        named = sum(1 if names[name] >= most else -1 for name in tensors)
        needed = {name: enough if is_vocabulary(name) else most for name in tensors}
        shaped = sum(1 if shapes[name, tensors[name].shape] >= count else -1 for name, count in needed.items())
        entries = sum(math.prod(info.shape) for info in tensors.values())
        return named, shaped, -sum(name.count(".") for name in tensors), -entries, -i

    return max(range(len(models)), key=rank)


def _shown(model: Checkpoint, fit: ModelTensors | None) -> Checkpoint:
    """A view of a model, in place of what it was a view of; itself, where that is what it shows."""
    shown = model.whole if isinstance(model, Excerpt) else model
    whole = raw(shown)
    as_it_is = fit is None or list(fit.parts.items()) == [(name, Part(name)) for name in whole.tensors]
    if as_it_is:
        view = whole
    elif fit is not None and isinstance(shown, View) and dict(shown.parts) == dict(fit.parts):
        view = shown
    else:
        view = View(whole, fit.parts if fit else {})
    if not isinstance(model, Excerpt):
        return view
    return model if view is shown else model.over(view)
