"""Keys and values of each head in another orthonormal basis in each release."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from detune.checkpoints import Checkpoint
from detune.defences.base import Change
from detune.defences.symmetric import change_of
from detune.symmetries import Actions, Attention, HeadFrame, Layer, complex_blocks

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

    keys: bool = True
    values: bool = True

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Draw the bases; see `Defence.prepare`."""
        return change_of(model, seed, self._draw)

    def _draw(self, layer: Layer, generator: Callable[[str], Generator]) -> Actions:
        heads = layer.attention
        turn = _angles if heads.rotary else _orthogonal
        return HeadFrame(
            keys=turn(heads, generator("keys")) if self.keys else None,
            values=_orthogonal(heads, generator("values")) if self.values else None,
        ).actions(heads)


def _orthogonal(heads: Attention, generator: Generator) -> Tensor:
    """Uniform over the orthogonal matrices, one for each group (Mezzadri 2007, arXiv math-ph/0609050)."""
    gaussian = torch.randn(heads.groups, heads.width, heads.width, generator=generator, dtype=torch.float64)
    Q, R = torch.linalg.qr(gaussian)
    signs: Tensor = R.diagonal(dim1=1, dim2=2).sign()
    signed: Tensor = Q * signs.unsqueeze(1)
    return signed


def _angles(heads: Attention, generator: Generator) -> Tensor:
    angles = 2 * torch.pi * torch.rand(heads.groups, heads.width // 2, generator=generator, dtype=torch.float64)
    return complex_blocks(torch.polar(torch.ones_like(angles), angles))
