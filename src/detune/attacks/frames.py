"""The frame of one release's layer, seen from another's."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor

from detune.attacks.groups import Complex, Group, Invertible, Orthogonal
from detune.attacks.matching import match_heads, match_neurons
from detune.attacks.procrustes import FALLS, Fit, Side, fit, stay
from detune.checkpoints import Checkpoint
from detune.compatibility.low_rank_test import RelationKind, relate
from detune.symmetries import Actions, HeadFrame, Layer, NeuronFrame, NormFrame, NormInto, act, join

__all__ = ["find_actions"]

logger = logging.getLogger(__name__)

# All entries this close to zero or a power of two, in eps of the dtype: they are it. The rounding of a release that was
# scaled by anything else shows more.
_CLOSE = 8.0


def find_actions(layer: Layer, first: Checkpoint, other: Checkpoint) -> Actions:
    """The actions that bring a layer of one release into the hidden bases of another.

    Args:
        layer: What is free in it.
        first: The release whose frame is wanted.
        other: The one to be changed.

    Returns:
        What to do to each tensor of the other; empty where the frames are the same.
    """
    pair = _Pair(layer, first, other)
    norms = {part: NormFrame(scale) for part in layer.norms if (scale := pair.norm_ratio(part)) is not None}
    pair = pair.with_norms(norms)
    frame = _Frames(pair.match_heads(), pair.match_neurons())
    frame = pair.fit_inside(frame)
    if norms:
        # A norm's own weights are as finely stored as a column's, but a column has many: each of both tells the other.
        norms = {part: NormFrame(pair.fit_norm(part, norm, frame)) for part, norm in norms.items()}
        pair = pair.with_norms(norms)
        frame = pair.fit_inside(frame)
    moved = [norm.actions(part) for part, norm in norms.items() if not bool((norm.scale == 1).all())]
    actions = join([frame.heads.actions(layer.attention), frame.neurons.actions(layer.feed_forward), *moved])
    found = {name: tuple(action for action in done if not action.is_identity) for name, done in actions.items()}
    return {name: done for name, done in found.items() if done and name in other.tensors}


@dataclass(frozen=True)
class _Frames:
    """The frames inside a layer, apart from its norms."""

    heads: HeadFrame
    neurons: NeuronFrame


@dataclass(frozen=True)
class _Pair:
    """One layer of two releases.

    Attributes:
        layer: What is free in it.
        first: The release whose frame is wanted.
        other: The one to be changed.
        columns: What is done to the columns of each weight of the other, on account of norms before it.
    """

    layer: Layer
    first: Checkpoint
    other: Checkpoint
    columns: Actions = field(default_factory=dict)

    def target(self, module: str) -> Tensor:
        return self.first.read(f"{module}.weight")

    def source(self, module: str) -> Tensor:
        """In the units that the first release has before it."""
        name = f"{module}.weight"
        return act(self.columns.get(name, ()), self.other.read(name))

    def with_norms(self, norms: dict[NormInto, NormFrame]) -> "_Pair":
        return replace(self, columns=join(norm.actions(part) for part, norm in norms.items()))

    def norm_ratio(self, part: NormInto) -> Tensor | None:
        """The scale that a norm's own weights tell; None where they are equal."""
        mine, theirs = (checkpoint.read(f"{part.norm}.weight").double() for checkpoint in (self.first, self.other))
        return None if torch.equal(mine, theirs) else torch.where((mine == 0) | (theirs == 0), 1.0, mine / theirs)

    def match_neurons(self) -> NeuronFrame:
        part = self.layer.feed_forward
        gated = part.gate is not None
        modules = [part.up, *([part.gate] if part.gate is not None else [])]
        targets, sources = ([*map(read, modules), read(part.down).mT] for read in (self.target, self.source))
        return NeuronFrame(match_neurons(targets, sources, [gated, *([False] * gated), gated]))

    def match_heads(self) -> HeadFrame:
        part = self.layer.attention

        def heads(read: Callable[[str], Tensor]) -> list[Tensor]:
            rows = [read(part.query), read(part.key), read(part.value), read(part.output).mT]
            return [matrix.reshape(-1, part.width, matrix.shape[1]) for matrix in rows]

        return HeadFrame(match_heads(heads(self.target), heads(self.source)))

    def fit_inside(self, frame: _Frames) -> _Frames:
        """Bases of keys and values, and scales of gated neurons; orders are known, bases perhaps nearly."""
        heads, neurons = self.layer.attention, self.layer.feed_forward
        ordered = HeadFrame(frame.heads.order).actions(heads)
        any_basis: tuple[Group, ...] = (Orthogonal(), Invertible())
        of_keys: tuple[Group, ...] = (Complex(),) if heads.rotary else any_basis
        known = frame.heads
        keys = self._fit(ordered, heads.query, heads.key, heads.groups, heads.width, of_keys, known.keys)
        values = self._fit(ordered, heads.value, heads.output, heads.groups, heads.width, any_basis, known.values)
        scale = None
        if neurons.gate is not None:
            in_place = NeuronFrame(frame.neurons.order).actions(neurons)
            known_scale = None if frame.neurons.scale is None else frame.neurons.scale.reshape(-1, 1, 1)
            blocks = self._fit(in_place, neurons.up, neurons.down, neurons.width, 1, (Invertible(),), known_scale)
            scale = None if blocks is None else blocks.flatten()
        return _Frames(HeadFrame(frame.heads.order, keys, values), NeuronFrame(frame.neurons.order, scale))

    def _fit(
        self,
        ordered: Actions,
        one: str,
        other: str,
        blocks: int,
        width: int,
        groups: Sequence[Group],
        known: Tensor | None,
    ) -> Tensor | None:
        """The turn of one module's rows that, inverted, acts on the rows or columns of the other; None is none."""
        targets = [self.target(module) for module in (one, other)]
        sources = [act(ordered[f"{module}.weight"], self.source(module)) for module in (one, other)]
        if ordered[f"{other}.weight"][0].dim == 1:
            targets[1], sources[1] = targets[1].mT, sources[1].mT
        sides = [
            Side.of(target, source, blocks, width, is_dual=is_dual)
            for target, source, is_dual in zip(targets, sources, (False, True), strict=True)
        ]
        if stay(sides).at_noise:
            return None
        # A known frame may be of any group: the last group contains all others.
        fits: list[Fit] = []
        for fall, group in product(FALLS, groups if known is None else groups[-1:]):
            fits.append(fit(sides, group, known, fall))
            if fits[-1].at_noise:
                break
        found = min(fits, key=lambda each: (not each.at_noise, each.excess))
        if not found.at_noise:
            # Adapters of a rank beyond the middle of the spectrum, and no other basis.
            if all(map(_are_near, targets, sources)):
                return None
            logger.warning(
                "%s.weight of %s: a change of basis leaves %.1e times the variance of rounding at full rank",
                one,
                self.other.spec,
                found.excess,
            )
        return _snapped(found.A, targets[0].dtype)

    def fit_norm(self, part: NormInto, known: NormFrame, frame: _Frames) -> Tensor:
        """The scale that the columns of all readers tell."""
        rows = join([frame.heads.actions(self.layer.attention), frame.neurons.actions(self.layer.feed_forward)])
        sides = []
        for reader in part.readers:
            name = f"{reader}.weight"
            source = act(rows[name], self.other.read(name))
            sides.append(Side.of(self.target(reader).mT, source.mT, part.channels, 1))
        columns = fit(sides, Invertible(), 1 / known.scale.reshape(-1, 1, 1)).A
        return 1 / _snapped(columns, self.first.tensors[f"{part.readers[0]}.weight"].dtype).flatten()


def _are_near(target: Tensor, source: Tensor) -> bool:
    return relate(target, source.to(target.dtype)).kind is not RelationKind.FULL_RANK


def _snapped(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros and powers of two where all entries are as good as that: then nothing is rounded again."""
    powers = torch.where(matrices.abs() < 0.25 * matrices.abs().amax(dim=-1, keepdim=True), 0.0, matrices)
    powers = torch.where(powers == 0, powers, powers.sign() * powers.abs().log2().round().exp2())
    off = (matrices - powers).abs().amax() / matrices.abs().amax()
    return powers if float(off) <= _CLOSE * torch.finfo(dtype).eps else matrices
