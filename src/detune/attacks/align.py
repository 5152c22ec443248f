"""Function-preserving symmetries, undone: every release is brought into the first one's hidden bases, then recovered.

Nothing but the releases is needed: two fine-tunes of one base are so much alike that one tells how the other was
turned.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from detune.attacks.frames import find_actions
from detune.attacks.rebuild import rebuild
from detune.certificate.certify import certify
from detune.checkpoints import Checkpoint, CheckpointWriter, resolved, temporary_directory
from detune.compatibility.model_set import ModelSet
from detune.errors import InputError
from detune.methods import Auto, Mean
from detune.problem import NotRecoverable, Recovery, Stack
from detune.recovery.api import recover
from detune.symmetries import Action, Layer, act, read_layers

__all__ = ["Align", "align", "write_aligned"]

# A misfit of up to this many times the storage noise is that. One more rounding in all releases but the first, of
# weights that no adapter touched, is 1.24 times.
_STORED = 1.1
# A merge that was rounded, turned, rounded, turned back and rounded has sqrt(3) times the noise of storage, the basis
# that it was turned by has a little, and ranks are better told where noise is told too large than too small.
_ROUNDED_OFTEN = 2.5
# A misfit of up to 0.9 of the noise that was told is that noise; else 1.3 times the misfit is told next.
_EXPLAINED, _MARGIN = 0.9, 1.3
_TRIES = 4
# Directions that are not there for twice the noise may be noise: if without them the predicted W-Error, at the noise
# as it is, is better by more than one.
_CLEAR, _FAR_BETTER = 2.0, 1.0
# Passes over rows and columns, each made even for the other.
_TURNS = 3


@dataclass(frozen=True)
class Align:
    """Match neurons and heads, undo rotations and scales, then recover.

    Where numbers only had to be moved, or scaled by powers of two, `detune recover` does the rest, bits and all. Else
    they have been rounded more often than `recover` expects, and are recovered with that much more noise told.
    """

    name: ClassVar[str] = "align"
    about: ClassVar[str] = "matches neurons and heads, undoes rotations and scales, then recovers; knows symmetries"
    min_models: ClassVar[int] = 3

    def run(self, models: Sequence[Path], out: Path) -> None:
        """Recover; see `Attack.run`."""
        if len(models) < self.min_models:
            raise InputError(f"{len(models)} releases", f"expected at least {self.min_models}", "add models")
        parent = resolved(out).parent
        parent.mkdir(parents=True, exist_ok=True)
        with temporary_directory("align", parent) as folder:
            aligned = align(models, folder)
            if all(release.is_exact for release in aligned):
                recover([release.path for release in aligned], out, card=False)
            else:
                rebuild([release.path for release in aligned], out, self.min_models, lambda name, stack: _solve(stack))


@dataclass(frozen=True)
class Aligned:
    """A release in the first one's frame.

    Attributes:
        path: The checkpoint; the release itself where nothing had to be done.
        is_exact: Whether its numbers were at most moved, or scaled by powers of two.
    """

    path: Path
    is_exact: bool


def align(models: Sequence[Path], folder: Path) -> tuple[Aligned, ...]:
    """Write each release but the first as it would be in the hidden bases of the first.

    Args:
        models: The releases.
        folder: Where the copies go; of each release one layer is in memory at a time.

    Returns:
        The releases, the first as it is.

    Raises:
        InputError: They do not fit together, or their architecture is not known.
    """
    aligned = [Aligned(Path(models[0]), True)]
    with ModelSet(models) as family:
        first, *others = family.models
        layers = read_layers(first.root, {name: info.shape for name, info in first.tensors.items()})
        for i, (path, other) in enumerate(zip(models[1:], others, strict=True), start=1):
            aligned.append(write_aligned(other, first, layers, folder / str(i)) or Aligned(Path(path), True))
    return tuple(aligned)


def write_aligned(release: Checkpoint, first: Checkpoint, layers: Sequence[Layer], copy: Path) -> Aligned | None:
    """Write a release as it would be in the hidden bases of another; None where it is in these already.

    Args:
        release: The release.
        first: The other one.
        layers: The layers of both.
        copy: The directory to make; one layer is in memory at a time.
    """
    actions: dict[str, tuple[Action, ...]] = {}
    for layer in layers:
        actions |= find_actions(layer, first, release)
    if not actions:
        return None
    with CheckpointWriter(release, copy) as writer:
        for name in release.tensors:
            if name in actions:
                writer.write(name, act(actions[name], release.read(name)))
            else:
                writer.copy(name)
    return Aligned(copy, all(action.is_exact for done in actions.values() for action in done))


def _solve(stack: Stack) -> Tensor:
    """Solve by `auto` with the noise of releases that were rounded more than once, if they show as much.

    In units in which rows, and columns, are of one size, so that the noise is too.
    """
    rows, columns = _units(stack)
    even = Stack.of([(W_i.double() / rows / columns).to(W_i.dtype) for W_i in stack.matrices])
    more, found = _ROUNDED_OFTEN, None
    for _ in range(_TRIES):
        try:
            found = Auto(lattice=None).solve(_told(even, more))
        except NotRecoverable:
            more *= 2
            continue
        share = found.noise_ratio or 0.0
        if share * more <= _STORED:
            return Auto().solve(stack).weight
        if share <= _EXPLAINED:
            found = _with_fewer_ranks(even, more, found)
            break
        more *= share * _MARGIN
    weight = Mean().solve(even).weight if found is None else found.weight
    return weight.double() * rows * columns


def _told(stack: Stack, more: float) -> Stack:
    """The stack with a multiple of the noise of storage."""
    return replace(stack, noise_override=tuple((more * stack.noise).tolist()))


def _with_fewer_ranks(stack: Stack, more: float, found: Recovery) -> Recovery:
    """The answer for more noise still, if with fewer directions the models determine it far better.

    What is left of a basis that few rows tell is one more direction in each model, just above the noise. It does no
    harm, unless adapters with such directions can hardly be told apart, or unless a part of one model's delta went into
    the base and so, with the other sign, into the deltas of all others: one rank is smaller then, and the sum larger.
    """
    noisier = _told(stack, _CLEAR * more)
    try:
        plain = Auto(lattice=None).solve(noisier)
    except NotRecoverable:
        return found
    if sum(plain.ranks) >= sum(found.ranks) or (plain.noise_ratio or 0.0) > _EXPLAINED:
        return found
    if min(plain.ranks) > min(found.ranks):
        return plain
    before, now = _predicted(_told(stack, more), found), _predicted(noisier, plain) - 2 * math.log10(_CLEAR)
    return plain if now < before - _FAR_BETTER else found


def _predicted(stack: Stack, recovery: Recovery) -> float:
    """The predicted W-Error; infinite where there is none."""
    predicted = certify(stack, recovery).predicted_w_error
    return math.inf if predicted is None else predicted


def _units(stack: Stack) -> tuple[Tensor, Tensor]:
    """Powers of two, `(out, 1)` and `(1, in)`, that all rows and all columns are about one of."""
    squares = torch.stack([W_i.double().square() for W_i in stack.matrices]).mean(dim=0)
    rows, columns = torch.ones_like(squares[:, :1]), torch.ones_like(squares[:1])
    for _ in range(_TURNS):
        rows = _positive((squares / columns).mean(dim=1, keepdim=True))
        columns = _positive((squares / rows).mean(dim=0, keepdim=True))
    return rows.log2().div(2).round().exp2(), columns.log2().div(2).round().exp2()


def _positive(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, 1.0)
