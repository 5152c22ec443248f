"""The base's bits, from one model on and on the float32 grid too."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from detune.lattice import LatticeSearch
from detune.methods.auto import Auto
from detune.problem.recovery import Recovery
from detune.problem.stack import Stack


@dataclass(frozen=True)
class Lattice:
    """Recovery of a base that was stored in bf16, fp16 or float32, taken at that.

    With three models or more it is `Auto` on more grids, with more sweeps; two or one are placed by their entries'
    distance to the grid.

    Attributes:
        lattice: Its options.
    """

    min_models: ClassVar[int] = 1
    low_rank: ClassVar[bool] = True
    working_copies: ClassVar[int] = 10

    lattice: LatticeSearch = field(default_factory=LatticeSearch)

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        """Recover the bits; see `Solver.solve`.

        Raises:
            NoGrid: One or two models, and the base lies on no grid that shows. With more, `Auto`'s answer stands.
        """
        if stack.n < Auto.min_models:
            return self.lattice.refine(stack, None, rank)
        found = replace(Auto(), lattice=self.lattice).solve(stack, rank)
        if found.bits is None and found.deltas:
            return replace(found, reason=f"{found.reason}; {self.lattice.why_not(stack)}")
        return found
