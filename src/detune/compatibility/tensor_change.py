"""Ranks of the changes of one tensor: who changed it, at which rank, and who has another altogether."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from detune.checkpoints import Checkpoint
from detune.compatibility.groups import split_tensor, tells, why_foreign
from detune.compatibility.light import BELOW_A_STEP, BitChange, find_bit_change
from detune.compatibility.mismatch import Cause
from detune.compatibility.model_set import damaged, noise_of
from detune.compatibility.shared import is_shared, same_numbers
from detune.fitting.differences import find_differences
from detune.fitting.subspaces import check_conditions
from detune.methods import Intersect
from detune.numerics.device import full_precision
from detune.problem import NonFinite, NotLowRank, NotRecoverable, Stack
from detune.problem.delta_sizes import independent_models
from detune.problem.recovery import FEWEST_MODELS
from detune.problem.solving import Prepared, told_by_others
from detune.problem.stack import matricise
from detune.source_models.identical import unchanged

Known = TypeVar("Known")

# An unrelated tensor of a model that belongs.
ANEW = "re-initialised: unrelated to the others'"


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor of a model that is not the family's.

    Attributes:
        model: The model's place among those given.
        name: The tensor's qualified name.
        cause: What happened to it.
    """

    model: int
    name: str
    cause: str


@dataclass(frozen=True)
class ChangedTensor:
    """A tensor that differs within the family.

    Attributes:
        name: Its qualified name.
        shape: Its shape.
        ranks: The rank of each member's change, in the order of the models: 0 where it left the tensor alone, None
            where its tensor is not the family's, or where a light change shows none. Empty where ranks are not known.
        enough: Whether the base's can be recovered.
        reason: Why, in one sentence.
        changed: For each member whether it changed the tensor, as far as the others show; None where it has none.
        light: Whether the models, in half precision, are so close that most entries are the base's own: then a rank
            shows here and there, and a full fine-tune cannot be told from LoRA.
    """

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int | None, ...]
    enough: bool
    reason: str
    changed: tuple[bool | None, ...] = ()
    light: bool = False


@dataclass(frozen=True)
class TensorChange:
    """All that is found out about one tensor that differs.

    Attributes:
        tensor: The row.
        foreign: Models whose tensor is not the family's.
    """

    tensor: ChangedTensor
    foreign: tuple[ForeignTensor, ...] = ()


def find_tensor_change(
    models: Sequence[Checkpoint],
    members: Sequence[int],
    holders: Sequence[int],
    name: str,
    device: torch.device | str | None = None,
    look_closer: bool = True,
) -> TensorChange | None:
    """Look at one tensor of a family.

    Args:
        models: All models given.
        members: Places of those that are of the family.
        holders: The members that have this tensor, in the family's shape.
        name: Name of the tensor.
        device: Where to compute ranks; None is the CPU.
        look_closer: Whether ranks are looked for in light fine-tunes too, where few show.

    Returns:
        The change; None where all holders hold the same bytes, or the same numbers in other dtypes.

    Raises:
        InputError: A model holds NaN or Inf in it.
    """
    if is_shared([models[i] for i in holders], name) or _differs_in_dtype_alone([models[i] for i in holders], name):
        return None
    bits = find_bit_change([models[i] for i in holders], name)
    return describe_change(models, members, holders, name, bits, device, look_closer)


@full_precision()
def describe_change(
    models: Sequence[Checkpoint],
    members: Sequence[int],
    holders: Sequence[int],
    name: str,
    bits: BitChange,
    device: torch.device | str | None,
    look_closer: bool,
) -> TensorChange:
    """Describe the change of a tensor of which it is known who changed it; see `find_tensor_change`.

    Args:
        models: All models given.
        members: Places of those that are of the family.
        holders: The members that have this tensor, in the family's shape.
        name: Name of the tensor.
        bits: Who of the holders changed it.
        device: Where to compute ranks; None is the CPU.
        look_closer: Whether ranks are looked for in light fine-tunes too, where few show.

    Raises:
        InputError: A model holds NaN or Inf in it.
    """
    shape = models[holders[0]].tensors[name].shape
    changed = _placed(dict(zip(holders, bits.changed, strict=True)), members)
    if bits.light and not look_closer:
        enough = len(holders) >= FEWEST_MODELS
        return TensorChange(ChangedTensor(name, shape, (), enough, BELOW_A_STEP, changed, light=True))
    groups = [tuple(holders)]
    if not bits.light and tells(models[holders[0]], name):
        found = split_tensor([models[i] for i in holders], name)
        groups = [tuple(holders[k] for k in group) for group in found]
    if len(groups) > 1 and len(groups[0]) == len(groups[1]):
        # None of them is more the family's than another.
        reason = f"{len(groups)} versions that differ at full rank, and as many models have one as the other"
        foreign = tuple(ForeignTensor(i, name, "every model has its own") for i in holders if len(groups[0]) == 1)
        return TensorChange(ChangedTensor(name, shape, (), False, reason, changed), foreign)
    # Where deltas are below a step, rounding is far above what float32 loses.
    dtype = torch.float32 if bits.light else None
    outcome = _find_ranks([models[i] for i in groups[0]], name, device, dtype)
    ranks: tuple[int | None, ...] = ()
    if outcome.ranks:
        ranks = _placed(dict(zip(groups[0], outcome.ranks, strict=True)), members)
        if bits.light:
            # Pairs of ranks that hardly show may give one to a model that has the others' bits.
            ranks = tuple(0 if was is False else rank or None for was, rank in zip(changed, ranks, strict=True))
        else:
            # A model that no other agrees with to the bit, and that has no rank, left the tensor alone.
            changed = tuple(was and rank != 0 for was, rank in zip(changed, ranks, strict=True))
    strangers = [i for group in groups[1:] for i in group]
    foreign = tuple(ForeignTensor(i, name, _cause(models, i, groups[0][0], name)) for i in sorted(strangers))
    row = ChangedTensor(name, shape, ranks, outcome.enough, outcome.reason, changed, bits.light)
    return TensorChange(row, foreign)


def _differs_in_dtype_alone(models: Sequence[Checkpoint], name: str) -> bool:
    """Whether models hold the same numbers of a tensor in several dtypes; the first row is looked at first."""
    dtypes = {model.tensors[name].dtype for model in models}
    return len(dtypes) > 1 and same_numbers(models, name, 1) and same_numbers(models, name)


def _placed(known: Mapping[int, Known], members: Sequence[int]) -> tuple[Known | None, ...]:
    """The known ranks of some models, in the order of the members."""
    return tuple(known.get(i) for i in members)


def _cause(models: Sequence[Checkpoint], model: int, member: int, name: str) -> str:
    cause = why_foreign(models, model, member, name).cause
    return ANEW if cause is Cause.UNRELATED else str(cause)


@dataclass(frozen=True)
class _Outcome:
    """Ranks of the changes of models that are kin in a tensor, and whether they suffice."""

    ranks: tuple[int, ...]
    enough: bool
    reason: str


def _find_ranks(
    models: Sequence[Checkpoint], name: str, device: torch.device | str | None, dtype: torch.dtype | None
) -> _Outcome:
    tensors = [model.read(name) for model in models]
    if not all(tensor.is_floating_point() for tensor in tensors):
        return _Outcome((), False, "not floating point")
    if len(models) == 1:
        return _Outcome((), False, "a single model has it")
    noise = noise_of(models, name, tensors)
    stack = Stack.of([matricise(tensor) for tensor in tensors], dtype, device, noise)
    try:
        if min(stack.shape) == 1:
            return _vector(told_by_others(stack))
        return _matrix(Prepared.of(stack).foretold(lambda part: Intersect().solve(part).deltas).stack)
    except NonFinite as error:
        raise damaged(name, models[error.model].spec) from None


def _vector(stack: Stack) -> _Outcome:
    untouched = unchanged(stack) if stack.n >= FEWEST_MODELS else None
    if untouched is not None:
        return _Outcome((), True, untouched.reason)
    return _Outcome((), False, "a vector cannot be low-rank: it can only be averaged")


def _matrix(stack: Stack) -> _Outcome:
    differences = find_differences(stack)
    if stack.n < FEWEST_MODELS:
        difference = differences.of(0, 1)
        size = "full rank" if difference.full_rank else f"rank {difference.rank}"
        return _Outcome((), False, f"the difference of two models has {size}; a third model is needed to split it")
    untouched = unchanged(stack) if any(not pair.rank for pair in differences.by_pair.values()) else None
    models = independent_models(stack)
    if len(models) < stack.n:
        differences = find_differences(stack.part(models))
    try:
        ranks = check_conditions(differences)
    except NotLowRank as why:
        return _Outcome((), untouched is not None, str(why))
    except NotRecoverable as why:
        return _Outcome(_of_all(stack, models, differences.ranks), untouched is not None, str(why))
    reason = untouched.reason if untouched else "the adapters can be split"
    return _Outcome(_of_all(stack, models, ranks), True, reason)


def _of_all(stack: Stack, models: Sequence[int], known: Sequence[int]) -> tuple[int, ...]:
    """The ranks of all models' changes, from those of independent ones.

    A difference from one of these has both ranks, or fewer where the two have a part in common: the most that is left
    for the other counts.
    """
    ranks = dict(zip(models, known, strict=True))
    for other in set(range(stack.n)) - set(models):
        pairs = {i: find_differences(stack.part((other, i))).of(0, 1).rank for i in models[:FEWEST_MODELS]}
        ranks[other] = max(0, *(pair - ranks[i] for i, pair in pairs.items()))
    return tuple(ranks[i] for i in range(stack.n))
