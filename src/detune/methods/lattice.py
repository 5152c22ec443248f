"""The base's bits, looked for as long as it takes: from one model on."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from detune.lattice import LatticeSearch, NoGrid
from detune.methods.auto import Auto
from detune.methods.mixed_precision import solve_from_finest
from detune.problem.recovery import Recovery
from detune.problem.stack import Stack


@dataclass(frozen=True)
class Lattice:
    """Recovery of a base that was stored in bf16, fp16 or float32, taken at that.

    With three models or more it starts from `Auto`'s answer; with two or one, from the entries' distance to the grid.

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
        if stack.n < 3:
            return self.lattice.refine(stack, None, rank)
        of_finest = solve_from_finest(stack, self._solve_finest, rank)
        if of_finest is not None:
            return of_finest
        start = replace(Auto(), lattice=None).solve(stack, rank)
        if start.method == "unchanged":
            return start
        try:
            return self.lattice.refine(stack, start, rank)
        except NoGrid as why:
            return replace(start, reason=f"{start.reason}; {why}")

    def _solve_finest(self, part: Stack, rank: int | None) -> Recovery:
        return self.solve(part, rank) if part.n >= 3 else self.lattice.refine_from(part, None, rank)
