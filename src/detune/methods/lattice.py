"""The base's bits, looked for as long as it takes: from one model on."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from detune.lattice import Lattice, NoGrid
from detune.methods.auto import Auto
from detune.methods.mixed_precision import from_fine
from detune.problem.recovery import Recovery
from detune.problem.stack import Stack


@dataclass(frozen=True)
class OnGrid:
    """Recovery of a base that was stored in bf16, fp16 or float32, taken at that.

    With three models or more it starts from `Auto`'s answer; with two or one, from the entries' distance to the grid.

    Attributes:
        lattice: Its options.
    """

    min_models: ClassVar[int] = 1
    working_copies: ClassVar[int] = 10

    lattice: Lattice = field(default_factory=Lattice)

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        """Recover the bits; see `Solver.solve`.

        Raises:
            NoGrid: One or two models, and the base lies on no grid that shows. With more, `Auto`'s answer stands.
        """
        if stack.n < 3:
            return self.lattice.refine(stack, None, rank)
        of_fine = from_fine(stack, self._solve_fine, rank)
        if of_fine is not None:
            return of_fine
        start = replace(Auto(), lattice=None).solve(stack, rank)
        if start.method == "unchanged":
            return start
        try:
            return self.lattice.refine(stack, start, rank)
        except NoGrid as why:
            return replace(start, reason=f"{start.reason}; {why}")

    def _solve_fine(self, part: Stack, rank: int | None) -> Recovery:
        return self.solve(part, rank) if part.n >= 3 else self.lattice.refine_from(part, None, rank)
