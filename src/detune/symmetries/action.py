"""What is done to one axis of a tensor, and to a tensor by several of them."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Action", "act"]


@dataclass(frozen=True)
class Action:
    """An order, then blocks, then a scale, along one axis: `y = diag(scale) blockdiag(blocks) x[order]`.

    Attributes:
        dim: The axis.
        order: Which entry of the old axis stands at each place of the new one, `(size,)`, int64; None keeps them.
        blocks: Matrices along the diagonal, `(count, width, width)`, float64, `count * width = size`.
        scale: Of each entry, `(size,)`, float64.
    """

    dim: int
    order: Tensor | None = None
    blocks: Tensor | None = None
    scale: Tensor | None = None

    @property
    def is_exact(self) -> bool:
        """Whether it only moves numbers."""
        return self.blocks is None and self.scale is None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Act on a tensor: of any dtype where the action is exact, else float64."""
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
    result = tensor if all(action.is_exact for action in actions) else tensor.double()
    for action in actions:
        result = action(result)
    return result.contiguous()
