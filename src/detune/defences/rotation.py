"""Keys and values of each head in another orthonormal basis in each release."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator

from detune.checkpoints import Checkpoint
from detune.defences.base import Change
from detune.defences.symmetric import change_of, complex_numbers, orthogonal
from detune.symmetries import Actions, HeadFrame, Layer

__all__ = ["Rotation"]


@dataclass(frozen=True)
class Rotation:
    """Draw an orthogonal matrix for the keys, and one for the values, of each head.

    Queries turn with their keys, the output's columns with the values. With rotary positions keys turn by an angle
    for each frequency, which is all that commutes with them. Weights are rounded once more.

    Attributes:
        keys: Whether queries and keys turn.
        values: Whether values and the output's columns do.
    """

    name: ClassVar[str] = "rotation"
    about: ClassVar[str] = "keys and values of each head in another orthonormal basis in each release"
    preserves_function: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    keys: bool = True
    values: bool = True

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Draw the bases; see `Defence.prepare`."""
        return change_of(model, seed, self._draw)

    def _draw(self, layer: Layer, generator: Callable[[str], Generator]) -> Actions:
        heads = layer.attention
        turn = complex_numbers if heads.rotary else orthogonal
        return HeadFrame(
            keys=turn(heads, generator("keys")) if self.keys else None,
            values=orthogonal(heads, generator("values")) if self.values else None,
        ).actions(heads)
