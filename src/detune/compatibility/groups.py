"""Groups of models of one base, before anything is solved.

Every model's matrix is compared with one of each group found so far (`detune.compatibility.low_rank_test.split`), on
some matrices first and on all where those do not agree. Two models are kin if they differ by a low rank, or not at all,
in at least half of the matrices; a group is what that relation connects.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from detune._runtime import use_threads
from detune.checkpoints import Checkpoint, Excerpt
from detune.compatibility.common_tensors import CommonTensors
from detune.compatibility.low_rank_test import LAST_SAMPLE, SMALLEST, split
from detune.compatibility.mismatch import Cause, Mismatch, find_mismatch
from detune.compatibility.model_set import Models, damaged, noise_of
from detune.errors import InputError
from detune.problem import NonFinite
from detune.problem.stack import matricise

# Matrices that are looked at first; if all say the same, that is the answer. Any number
# does that has all kinds in it.
LOOKED_AT = 12
# Matrices that decide why a model does not belong: any odd number does.
ASKED_WHY = 5
# A base's matrix, told of a model that is not of the family.
STRANGER = {
    Cause.FOUR_BITS: "it differs from the family by the rounding to 4 bits, as fine-tunes merged onto a base in NF4 do",
    Cause.FULL: "it or its base was fine-tuned in full, or by adapters of too high a rank",
    Cause.UNRELATED: "it has another base",
    Cause.ROWS: "it has the same base with its neurons or heads in another order",
    Cause.COLUMNS: "it has the same base with its neurons or heads in another order",
    Cause.BOTH: "it has the same base with its neurons or heads in another order",
    Cause.TRANSPOSED: "its matrices are transposed",
}

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class BaseGroups:
    """Models by common source.

    Attributes:
        groups: Places of the models, the largest group first; of equal ones, that of the first model.
        splits: For each matrix that was looked at, the groups of models that differ by a low rank in it.
    """

    groups: Groups
    splits: dict[str, Groups]

    def foreign(self, model: int, others: Sequence[int]) -> list[str]:
        """The matrices in which a model is not in one group with most of the others."""
        return [name for name, groups in self.splits.items() if not _is_among(model, others, groups)]

    def placed(self, places: Sequence[int]) -> "BaseGroups":
        """The groups with other numbers for the models: `places[i]` for i."""

        def move(groups: Groups) -> Groups:
            return tuple(tuple(places[i] for i in group) for group in groups)

        return BaseGroups(move(self.groups), {name: move(groups) for name, groups in self.splits.items()})


@dataclass(frozen=True)
class LeftOut:
    """A model that is not used.

    Attributes:
        model: Its place among the models given.
        reason: One sentence.
    """

    model: int
    reason: str


@dataclass(frozen=True)
class Selection:
    """The models to go on with.

    Attributes:
        members: Their places among the models given, in that order.
        left_out: The others.
    """

    members: tuple[int, ...]
    left_out: tuple[LeftOut, ...] = ()

    def reason(self, model: int) -> str | None:
        """The reason why a model is left out; None where it is not."""
        return next((row.reason for row in self.left_out if row.model == model), None)


def select(given: Models, need: int) -> Selection:
    """The largest set of models that fit together and share a source.

    Args:
        given: The models.
        need: The fewest that are of use.

    Returns:
        The members, and why the others are left out.

    Raises:
        InputError: Fewer than `need` remain, or two sets of equal size do.
    """
    found = group_fitting(given.models, given.common)
    for why in given.common.misfits.values():
        if sum(map(len, found.groups)) < need:
            raise why
    _require(given.models, found, need)
    left_out = [LeftOut(i, str(why)) for i, why in given.common.misfits.items() if i < len(given.models)]
    left_out += [LeftOut(i, why_left_out(given.models, found, i)) for members in found.groups[1:] for i in members]
    return Selection(found.groups[0], tuple(sorted(left_out, key=lambda row: row.model)))


def group_fitting(models: Sequence[Checkpoint], common: CommonTensors) -> BaseGroups:
    """Cluster the models that fit the layout, by the matrices that they all have.

    Args:
        models: By the names that all have.
        common: How each fits.

    Raises:
        InputError: A model holds NaN or Inf.
    """
    fitting = [i for i in common.fitting if i < len(models)]
    chosen = [models[i] for i in fitting]
    names = [name for name in common.pieces if all(name in model.tensors for model in chosen)]
    return group_by_base(chosen, names).placed(fitting)


def group_by_base(
    models: Sequence[Checkpoint], names: Sequence[str] | None = None, *, based: bool = False
) -> BaseGroups:
    """Group models that have the same matrices.

    Args:
        models: Opened checkpoints.
        names: The matrices that they all have; None takes those of the first model.
        based: Whether the first is to be the base of the others, see `noise_of`.

    Raises:
        InputError: A model holds NaN or Inf.
    """
    telling = [name for name in (models[0].tensors if names is None else names) if tells(models[0], name)]
    step = max(1, len(telling) // LOOKED_AT)
    splits = {name: split_tensor(models, name, based=based) for name in telling[::step][:LOOKED_AT]}
    if not _unanimous(splits, len(models)):
        splits = {name: splits.get(name) or split_tensor(models, name, based=based) for name in telling}
    kin = [(i, j) for i, j in combinations(range(len(models)), 2) if _agreement(splits, i, j) >= 1 / 2]
    return BaseGroups(_connected(kin, len(models)), splits)


def tells(model: Checkpoint, name: str) -> bool:
    """Whether a tensor is a matrix in which a low rank can be told from a full one."""
    info = model.tensors[name]
    is_matrix = info.dtype.is_floating_point and len(info.shape) >= 2
    return is_matrix and min(info.shape[0], math.prod(info.shape[1:])) >= SMALLEST


def some_of(model: Checkpoint) -> Checkpoint:
    """A model of which no more rows are read than `split` looks at."""
    return model if isinstance(model, Excerpt) else Excerpt(model, LAST_SAMPLE)


def split_tensor(models: Sequence[Checkpoint], name: str, *, based: bool = False) -> Groups:
    """The groups of models that differ by a low rank in one matrix; `based` as in `noise_of`.

    Raises:
        InputError: A model holds NaN or Inf in it.
    """
    try:
        # The rows are few: two threads take twice as long over them.
        with use_threads(1):
            shown = [matricise(some_of(model).read(name)) for model in models]
            return split(shown, noise=noise_of(models, name, shown, based=based))
    except NonFinite as error:
        raise damaged(name, models[error.model].spec) from None


def why_foreign(models: Sequence[Checkpoint], model: int, member: int, name: str) -> Mismatch:
    """The likeness of a model's tensor to a member's of the family, all of it: rows may have changed places.

    Raises:
        InputError: One of them holds NaN or Inf in it.
    """
    stranger, reference = (matricise(models[i].read_whole(name)) for i in (model, member))
    try:
        return find_mismatch(stranger, reference)
    except NonFinite as error:
        raise damaged(name, models[(model, member)[error.model]].spec) from None


def why_left_out(models: Sequence[Checkpoint], found: BaseGroups, model: int) -> str:
    """In a sentence, why a model is not in the largest group, by what most of some matrices say."""
    member = found.groups[0][0]
    # Where the members of a loose group disagree among each other, the first of them stands for it.
    foreign = found.foreign(model, found.groups[0]) or found.foreign(model, [member])
    step = max(1, len(foreign) // ASKED_WHY)
    seen = [why_foreign(models, model, member, name) for name in foreign[::step][:ASKED_WHY]]
    causes = Counter(resemblance.cause for resemblance in seen)
    # A permutation is never found by chance, and easily missed: one that is found decides.
    moved = [cause for cause, _ in causes.most_common() if cause not in (Cause.FULL, Cause.UNRELATED)]
    cause = moved[0] if moved else causes.most_common(1)[0][0]
    of_cause = sorted((r for r in seen if r.cause is cause), key=lambda r: r.relative_difference)
    middle = of_cause[len(of_cause) // 2]
    return (
        f"differs from the others at full rank in {len(foreign)} of {len(found.splits)} matrices, "
        f"first {foreign[0]!r}; "
        f"{STRANGER[cause]}: its weights differ by {middle.relative_difference:.2g} of their size, "
        f"cosine {middle.cosine:.2f}"
    )


def _require(models: Sequence[Checkpoint], found: BaseGroups, need: int) -> None:
    """Refuse where no group is large enough, or two are equally large."""
    groups, splits = found.groups, found.splits
    largest = [group for group in groups if len(group) == len(groups[0])]
    if len(largest) == 1 and len(largest[0]) >= need:
        return
    if len(largest[0]) >= need:
        sets = " and ".join("{" + ", ".join(models[i].spec for i in group) + "}" for group in largest)
        raise InputError(
            f"the models have {len(largest)} sources, with {len(largest[0])} models each",
            f"they are {sets}",
            "give the models of one source",
        )
    name = next(name for name, groups in splits.items() if len(groups) > 1)
    apart = sum(len(groups) > 1 for groups in splits.values())
    evidence = f"in {apart} of {len(splits)} matrices, first {name!r}"
    if len(largest) == 1 and len(groups) == 2:
        raise InputError(
            f"{models[groups[1][0]].spec} differs from the other models at full rank",
            evidence,
            f"it has another base or was fine-tuned in full: leave it out, and give at least {need} of one base",
        )
    raise InputError(
        f"{models[groups[0][0]].spec} and {models[groups[1][0]].spec} differ at full rank"
        + ", and others too" * (len(groups) > 2),
        evidence,
        f"fewer than {need} of the models share a base: give fine-tunes of one base, merged from LoRA",
    )


def _agreement(splits: dict[str, Groups], i: int, j: int) -> float:
    """Share of the matrices in which two models are in one group; 1 where there are none."""
    together = [any(i in group and j in group for group in groups) for groups in splits.values()]
    return sum(together) / len(together) if together else 1.0


def _unanimous(splits: dict[str, Groups], n: int) -> bool:
    return all(_agreement(splits, i, j) in (0, 1) for i, j in combinations(range(n), 2))


def _connected(pairs: Sequence[tuple[int, int]], n: int) -> Groups:
    """The groups that pairs connect, the largest first."""
    component = list(range(n))
    for i, j in pairs:
        old, new = component[j], component[i]
        component = [new if c == old else c for c in component]
    groups = [tuple(i for i in range(n) if component[i] == c) for c in dict.fromkeys(component)]
    return tuple(sorted(groups, key=lambda group: (-len(group), group)))


def _is_among(model: int, others: Sequence[int], groups: Groups) -> bool:
    """Whether a model is in the group in which most of the others are."""
    main = max(groups, key=lambda group: len(set(group) & set(others)))
    return model in main
