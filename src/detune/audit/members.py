"""The releases that the recovery goes by: those of one source, brought into one frame first where that helps."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from detune._runtime import needs_extra
from detune.attacks.align import write_aligned
from detune.attacks.measured_noise import is_white, noise_size
from detune.checkpoints import Checkpoint, open_checkpoint
from detune.compatibility.common_tensors import find_common_tensors
from detune.compatibility.groups import BaseGroups, group_by_base, group_fitting, why_foreign, why_left_out
from detune.compatibility.mismatch import Cause, find_mismatch
from detune.errors import InputError
from detune.problem.stack import matricise
from detune.symmetries import read_layers

# Fewer than three releases leave a difference that splits in infinitely many ways: only a grid can decide.
ENOUGH = 3
# Matrices of a release that are looked at to see whether it is close to the first.
LOOKED_AT = 4
# These rows and columns of a large matrix show what a difference is.
CORNER = 1024
# Noise beyond this share of the weights leaves no use in a model.
LOUDEST = 0.3

__all__ = ["ENOUGH", "Members", "base_in_frame", "find_members"]


@dataclass(frozen=True)
class Members:
    """The releases that are recovered from.

    Attributes:
        models: The checkpoint that stands for each release given: itself, or a copy in the first one's frame.
        places: Those that are recovered from.
        groups: How they were grouped; None for a single one.
        reasons: Why the others are left out, by place.
        moved: Those that a copy stands for.
        turned: Whether numbers were rounded in that: matrices that were turned or scaled are on no grid any more, and
            hold more noise than storing them left.
        noisy: Whether they differ at full rank, close as they are: noise may have been added, or weights quantised.
    """

    models: tuple[Checkpoint, ...]
    places: tuple[int, ...]
    groups: BaseGroups | None = None
    reasons: tuple[tuple[int, str], ...] = ()
    moved: tuple[int, ...] = ()
    turned: bool = False
    noisy: bool = False

    @property
    def used(self) -> list[Checkpoint]:
        """The checkpoints to go on with."""
        return [self.models[i] for i in self.places]

    def why(self, place: int) -> str | None:
        """The reason why a release is left out; None where it is not."""
        return dict(self.reasons).get(place)


def find_members(models: Sequence[Checkpoint], folder: Path, opened: ExitStack) -> Members:
    """The largest set of releases that fit together and share a source; of equal ones the first.

    Where some differ at full rank, neurons and heads are matched again, or noise is measured, as whoever knows such a
    defence would do. Noise is told by its spectrum: matching takes minutes, and finds nothing in it.

    Args:
        models: All that were given.
        folder: Where copies in the first one's frame may go.
        opened: Closes them.

    Raises:
        InputError: No two of them have the same tensors.
        DetuneError: The extra `audit` is not installed.
    """
    grouped = _grouped(tuple(models))
    noisy = _through_noise(grouped, _is_noise)
    if noisy.noisy:
        return noisy
    found = _in_one_frame(models, grouped, folder, opened)
    return _through_noise(found, _is_close)


def _in_one_frame(models: Sequence[Checkpoint], found: Members, folder: Path, opened: ExitStack) -> Members:
    """Match releases to the first, where that brings more of them together."""
    if found.groups is None or not _disagreement(found.groups):
        return found
    fitting = sorted(i for group in found.groups.groups for i in group)
    copies, turned = _copies([models[i] for i in fitting], folder / "releases", opened)
    moved = tuple(i for i, copy in zip(fitting, copies, strict=True) if copy is not models[i])
    standing = dict(zip(fitting, copies, strict=True))
    again = _grouped(tuple(standing.get(i, model) for i, model in enumerate(models))) if moved else found
    better = again.groups is not None and _disagreement(again.groups) < _disagreement(found.groups)
    return replace(again, moved=moved, turned=turned) if better else found


def _through_noise(found: Members, explains: Callable[[Tensor, Tensor], bool]) -> Members:
    """All releases that fit, where too few differ by low ranks alone but all are the first and something small.

    Args:
        found: What was found without.
        explains: Whether that is so of a matrix of a release, given the first one's.
    """
    if found.groups is None or len(found.places) >= ENOUGH:
        return found
    fitting = sorted(i for group in found.groups.groups for i in group)
    if len(fitting) < ENOUGH:
        return found
    first, *others = fitting
    if not all(_all_explained(found.models, found.groups, i, first, explains) for i in others):
        return found
    reasons = tuple((i, why) for i, why in found.reasons if i not in fitting)
    return replace(found, places=tuple(fitting), reasons=reasons, noisy=True)


def _all_explained(
    models: Sequence[Checkpoint],
    found: BaseGroups,
    model: int,
    first: int,
    explains: Callable[[Tensor, Tensor], bool],
) -> bool:
    """Whether that is so of each of some matrices that two models differ in at full rank."""
    return all(
        explains(*(matricise(models[i].read_whole(name)) for i in (model, first)))
        for name in found.foreign(model, (first,))[:LOOKED_AT]
    )


def _is_close(matrix: Tensor, first: Tensor) -> bool:
    return find_mismatch(matrix, first).cause is Cause.FULL


def _is_noise(matrix: Tensor, first: Tensor) -> bool:
    difference = matrix[:CORNER, :CORNER].double() - first[:CORNER, :CORNER].double()
    size = float(first.double().square().mean().sqrt())
    return noise_size(difference) < LOUDEST * size and is_white(difference)


def base_in_frame(base: Checkpoint, first: Checkpoint, folder: Path, opened: ExitStack) -> Checkpoint:
    """The base as it is in the frame of a release: itself, or a copy.

    One that the release differs from at full rank is taken too: the release may have been defended.

    Args:
        base: The owner's.
        first: The release that gives the frame.
        folder: Where a copy may go.
        opened: Closes it.

    Raises:
        InputError: It has another architecture, or other weights altogether.
    """
    common = [name for name in first.tensors if name in base.tensors]
    found = group_by_base((base, first), common, based=True)
    if not _disagreement(found) or _all_explained((base, first), found, 1, 0, _is_noise):
        return base
    (_, copy), _ = _copies((first, base), folder / "base", opened)
    if copy is not base:
        again = group_by_base((copy, first), common, based=True)
        if _disagreement(again) < _disagreement(found):
            return copy
    foreign = found.foreign(1, (0,))
    unrelated = [name for name in foreign if why_foreign((base, first), 1, 0, name).cause is Cause.UNRELATED]
    if len(unrelated) == len(found.splits):
        raise InputError(
            f"{base.spec} is not the base of {first.spec}",
            f"their weights are unrelated in {len(unrelated)} of {len(found.splits)} matrices, first {unrelated[0]!r}",
            "give the base that it was fine-tuned from",
        )
    return base


def _grouped(models: tuple[Checkpoint, ...]) -> Members:
    if len(models) == 1:
        return Members(models, (0,))
    common = find_common_tensors(models)
    if len(common.fitting) == 1:
        raise next(iter(common.misfits.values()))
    models = common.shown(models)
    found = group_fitting(models, common)
    reasons = [(i, str(why)) for i, why in common.misfits.items()]
    reasons += [(i, why_left_out(models, found, i)) for members in found.groups[1:] for i in members]
    return Members(models, found.groups[0], found, tuple(reasons))


def _copies(models: Sequence[Checkpoint], folder: Path, opened: ExitStack) -> tuple[list[Checkpoint], bool]:
    """The models in the frame of the first: itself or a copy each, and whether numbers were rounded in that.

    All are as they were where the architecture is not known.
    """
    first, *others = models
    try:
        layers = read_layers(first.root, {name: info.shape for name, info in first.tensors.items()})
    except InputError:
        return list(models), False
    copies, rounded = [first], False
    for i, other in enumerate(others):
        with needs_extra("audit"):
            aligned = write_aligned(other, first, layers, folder / str(i))
        copies.append(opened.enter_context(open_checkpoint(aligned.path)) if aligned else other)
        rounded = rounded or (aligned is not None and not aligned.is_exact)
    return copies, rounded


def _disagreement(found: BaseGroups) -> float:
    """Share of the matrices in which not all differ by a low rank."""
    return sum(len(groups) > 1 for groups in found.splits.values()) / max(1, len(found.splits))
