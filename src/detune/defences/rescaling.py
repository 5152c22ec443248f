"""Channels in other units in each release."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from detune.checkpoints import Checkpoint
from detune.defences.base import Change
from detune.defences.symmetric import change_of
from detune.errors import InputError
from detune.symmetries import Actions, HeadFrame, Layer, NeuronFrame, NormFrame, join

__all__ = ["Rescaling"]


@dataclass(frozen=True)
class Rescaling:
    """Draw a scale for each channel of keys, of values, of gated neurons and of norms; what reads it has the inverse.

    Norms after a sum (BERT) stay as they are: the next sum reads them too. Neurons without a gate do so too: GELU of a
    multiple is no multiple of GELU.

    Attributes:
        spread: Scales lie between `1 / spread` and `spread`, uniform in their logarithm.
        exact: Powers of two only, which round nothing.
    """

    name: ClassVar[str] = "rescaling"
    about: ClassVar[str] = "channels in other units in each release"
    preserves_function: ClassVar[bool] = True

    spread: float = 4.0
    exact: bool = False

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Draw the scales; see `Defence.prepare`."""
        if not 1 < self.spread <= 2**10:
            raise InputError(f"scales up to {self.spread}", "expected more than 1 and at most 1024", "4 is the default")
        return change_of(model, seed, self._draw)

    def _draw(self, layer: Layer, generator: Callable[[str], Generator]) -> Actions:
        heads, neurons = layer.attention, layer.feed_forward
        keys = self._scales(generator("keys"), heads.groups, heads.width // (1 + heads.rotary))
        # Of two channels that rotary positions turn into one another, one scale.
        keys = keys.repeat(1, 1 + heads.rotary)
        values = self._scales(generator("values"), heads.groups, heads.width)
        frame = HeadFrame(keys=torch.diag_embed(keys), values=torch.diag_embed(values))
        scale = self._scales(generator("neurons"), neurons.width) if neurons.gate is not None else None
        norms = [NormFrame(self._scales(generator(part.norm), part.channels)).actions(part) for part in layer.norms]
        return join((frame.actions(heads), NeuronFrame(scale=scale).actions(neurons), *norms))

    def _scales(self, generator: Generator, *shape: int) -> Tensor:
        exponents = (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1) * math.log2(self.spread)
        return torch.exp2(exponents.round() if self.exact else exponents)
