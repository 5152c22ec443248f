"""Queries against keys, and values against the output, in another basis of any kind in each release."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from detune.checkpoints import Checkpoint
from detune.defences.base import Change
from detune.defences.symmetric import change_of, check_spread, complex_numbers, orthogonal, scales
from detune.symmetries import Actions, Attention, HeadFrame, Layer

__all__ = ["Invertible"]


@dataclass(frozen=True)
class Invertible:
    """Draw an invertible matrix for queries and keys, and one for values and the output, of each head (MergeLock).

    `A = U diag(s) V` with uniform orthogonal U and V; the other side has the inverse. With rotary positions keys have a
    complex number for each frequency, which is all that commutes with them.

    Attributes:
        spread: Singular values lie between `1 / spread` and `spread`, uniform in their logarithm. How the paper draws
            its matrices is not in the part that was read.

    Reference:
        Wang et al., "Model Unmerging: Making Your Models Unmergeable for Secure Model Sharing", 2025 (arXiv
        2509.01548). Read: abstract and the beginning of the introduction.
    """

    name: ClassVar[str] = "invertible"
    about: ClassVar[str] = "queries and keys, values and output in another invertible basis in each release (MergeLock)"
    preserves_function: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    spread: float = 4.0

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Draw the bases; see `Defence.prepare`."""
        check_spread(self.spread)
        return change_of(model, seed, self._draw)

    def _draw(self, layer: Layer, generator: Callable[[str], Generator]) -> Actions:
        heads = layer.attention
        draw = self._complex if heads.rotary else self._matrices
        frame = HeadFrame(keys=draw(heads, generator("keys")), values=self._matrices(heads, generator("values")))
        return frame.actions(heads)

    def _matrices(self, heads: Attention, generator: Generator) -> Tensor:
        U, V = orthogonal(heads, generator), orthogonal(heads, generator)
        return U * scales(self.spread, generator, heads.groups, 1, heads.width) @ V

    def _complex(self, heads: Attention, generator: Generator) -> Tensor:
        sizes = scales(self.spread, generator, heads.groups, heads.width // 2)
        return complex_numbers(heads, generator, sizes)
