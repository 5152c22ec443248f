"""Neurons and heads in another order in each release."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from detune.checkpoints import Checkpoint
from detune.defences.base import Change
from detune.defences.symmetric import change_of
from detune.symmetries import Actions, Attention, HeadFrame, Layer, NeuronFrame, join

__all__ = ["Permutation"]


@dataclass(frozen=True)
class Permutation:
    """Draw an order of the feed-forward neurons, and of the attention heads, of each layer.

    Numbers move and keep their bits. Where keys and values are grouped, groups move as a whole, and the query heads
    within each.

    Attributes:
        neurons: Whether neurons move.
        heads: Whether heads do.
    """

    name: ClassVar[str] = "permutation"
    about: ClassVar[str] = "neurons and heads in another order in each release"
    preserves_function: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    neurons: bool = True
    heads: bool = True

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Draw the orders; see `Defence.prepare`."""
        return change_of(model, seed, self._draw)

    def _draw(self, layer: Layer, generator: Callable[[str], Generator]) -> Actions:
        order = torch.randperm(layer.feed_forward.width, generator=generator("neurons"))
        neurons = NeuronFrame(order).actions(layer.feed_forward) if self.neurons else {}
        heads = HeadFrame(_head_order(layer.attention, generator("heads"))).actions(layer.attention)
        return join((neurons, heads if self.heads else {}))


def _head_order(attention: Attention, generator: Generator) -> Tensor:
    shared = attention.heads // attention.groups
    groups = torch.randperm(attention.groups, generator=generator)
    within = torch.stack([torch.randperm(shared, generator=generator) for _ in range(attention.groups)])
    return (groups[:, None] * shared + within).flatten()
