"""Channels in other units in each release."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from detune.checkpoints import Checkpoint
from detune.defences.base import Change
from detune.defences.symmetric import change_of, check_spread, scaled_channels, scales
from detune.symmetries import Actions, Layer, NeuronFrame, NormFrame, join

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
    draws: ClassVar[bool] = True

    spread: float = 4.0
    exact: bool = False

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Draw the scales; see `Defence.prepare`."""
        check_spread(self.spread)
        return change_of(model, seed, self._draw)

    def _draw(self, layer: Layer, generator: Callable[[str], Generator]) -> Actions:
        heads, neurons = layer.attention, layer.feed_forward
        frame = scaled_channels(heads, self.spread, generator, exact=self.exact)
        scale = self._scales(generator("neurons"), neurons.width) if neurons.gate is not None else None
        norms = [NormFrame(self._scales(generator(part.norm), part.channels)).actions(part) for part in layer.norms]
        return join((frame.actions(heads), NeuronFrame(scale=scale).actions(neurons), *norms))

    def _scales(self, generator: Generator, *shape: int) -> Tensor:
        return scales(self.spread, generator, *shape, exact=self.exact)
