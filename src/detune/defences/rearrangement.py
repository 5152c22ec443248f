"""Neurons in another order, and the channels of heads in other units, in each release."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from detune.checkpoints import Checkpoint
from detune.defences.base import Change
from detune.defences.symmetric import change_of, check_spread, scaled_channels
from detune.symmetries import Actions, Layer, NeuronFrame, join

__all__ = ["Rearrangement"]


@dataclass(frozen=True)
class Rearrangement:
    """Draw an order of the feed-forward neurons, and a scale for each channel of keys and of values (PaRaMS).

    Queries have the inverse scale of their keys, the output's columns that of the values. The dropout that the paper
    adds against attackers who know it changes what the model does, and is left out.

    Attributes:
        spread: Scales lie between `1 / spread` and `spread`, uniform in their logarithm. How the paper draws them is
            not in the part that was read.

    Reference:
        Wei, Yu & Sakuma, "Disrupting Model Merging: A Parameter-Level Defense Without Sacrificing Accuracy", ICCV 2025
        (arXiv 2503.07661). Read: abstract, the beginning of the introduction, and a summary of the method by others.
    """

    name: ClassVar[str] = "rearrangement"
    about: ClassVar[str] = "neurons in another order, channels of heads in other units in each release (PaRaMS)"
    preserves_function: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    spread: float = 4.0

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Draw orders and scales; see `Defence.prepare`."""
        check_spread(self.spread)
        return change_of(model, seed, self._draw)

    def _draw(self, layer: Layer, generator: Callable[[str], Generator]) -> Actions:
        heads, neurons = layer.attention, layer.feed_forward
        order = torch.randperm(neurons.width, generator=generator("neurons"))
        frame = scaled_channels(heads, self.spread, generator)
        return join((frame.actions(heads), NeuronFrame(order).actions(neurons)))
