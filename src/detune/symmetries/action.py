"""Actions on the axes of a tensor: permutations, scales and rotations."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Action", "act"]


@dataclass(frozen=True)
class Action:
    """An order, then blocks, then a scale, along one axis: `y = diag(scale) blockdiag(blocks) x[order]`.

    Attributes:
        dim: The axis.
        order: Which entry of the old axis stands at each place of the new one, `(size,)`, int64; None keeps them.
        blocks: Matrices along the diagonal, `(count, width, width)`, float64, `count * width = size`.
        scale: Scale of each entry, `(size,)`, float64.
    """

    dim: int
    order: Tensor | None = None
    blocks: Tensor | None = None
    scale: Tensor | None = None

    @property
    def only_moves(self) -> bool:
        """Whether numbers stay as they are, in other places."""
        return self.blocks is None and self.scale is None

    @property
    def is_exact(self) -> bool:
        """Whether no number is rounded: they are moved, and multiplied by powers of two."""
        blocks_exact = self.blocks is None or (
            bool((self.blocks != 0).sum(dim=2).le(1).all()) and _are_powers_of_two(self.blocks[self.blocks != 0])
        )
        return blocks_exact and (self.scale is None or _are_powers_of_two(self.scale))

    @property
    def is_identity(self) -> bool:
        """Whether it does nothing."""
        parts = (
            self.order is None or torch.equal(self.order, torch.arange(len(self.order))),
            self.blocks is None or bool((self.blocks == torch.eye(self.blocks.shape[1])).all()),
            self.scale is None or bool((self.scale == 1).all()),
        )
        return all(parts)

    def __call__(self, tensor: Tensor) -> Tensor:
        """Act on a tensor: of any dtype where numbers only move, else float64."""
        if self.order is not None:
            tensor = tensor.index_select(self.dim, self.order)
        moved = tensor.movedim(self.dim, 0)
        if self.blocks is not None:
            count, width = self.blocks.shape[:2]
            moved = (self.blocks @ moved.reshape(count, width, -1)).reshape(moved.shape)
        if self.scale is not None:
            moved = (moved.mT * self.scale).mT if moved.ndim > 1 else moved * self.scale
        return moved.movedim(0, self.dim)


def act(actions: Iterable[Action], tensor: Tensor) -> Tensor:
    """Do one after the other.

    Returns:
        The tensor in its own dtype where its numbers were only moved, bit for bit; else in float64, to be rounded once.
    """
    actions = tuple(actions)
    result = tensor if all(action.only_moves for action in actions) else tensor.double()
    for action in actions:
        result = action(result)
    return result.contiguous()


def _are_powers_of_two(values: Tensor) -> bool:
    return bool((torch.frexp(values).mantissa.abs() == 0.5).all())
