"""The null baseline: one fine-tuned model taken for the base."""

from dataclasses import dataclass
from typing import ClassVar

from detune.origin import Origin
from detune.problem.recovery import Recovery
from detune.problem.stack import Stack


@dataclass(frozen=True)
class Single:
    """`W_star = W_i` for one model, unchanged.

    Attributes:
        index: Which model.
    """

    min_models: ClassVar[int] = 1
    low_rank: ClassVar[bool] = False
    working_copies: ClassVar[int] = 3
    index: int = 0

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        """Take the model's matrix; see `Solver.solve`. `rank` plays no part."""
        weight = stack.matrices[self.index].to(stack.device, stack.dtype, copy=True)
        stack.require_finite(weight.sum())
        return Recovery(weight, "single", f"model {self.index} as it is", origin=Origin.SINGLE)
