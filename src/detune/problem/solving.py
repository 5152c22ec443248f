"""The way to a solver and back: solvers see models of the order of one, without outliers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from detune.problem.outliers import Outliers, Split
from detune.problem.recovery import Recovery, Solver
from detune.problem.stack import Stack
from detune.problem.unit_scale import UnitScale
from detune.problem.upcast import as_merged


@dataclass(frozen=True)
class Prepared:
    """A stack as solvers take it.

    Attributes:
        stack: The models on their unit scale, with what the others foretell, or nothing yet, for outliers.
        scale: That scale.
        outliers: The places with outliers; None where there are none.
    """

    stack: Stack
    scale: UnitScale
    outliers: Outliers | None

    @classmethod
    def of(cls, stack: Stack) -> "Prepared":
        """Scale a stack in the dtypes that it was merged in, and put zeros in the place of outliers.

        Raises:
            NonFinite: A model holds NaN or Inf.
        """
        outliers = Outliers.of(stack)
        stack = as_merged(stack)
        scale = UnitScale.of(stack if outliers is None else outliers.filled(stack, 0 * outliers.stored))
        return cls(scale.stack, scale, outliers)

    def foretold(self, split: Split) -> "Prepared":
        """Put what the models would hold in the place of outliers.

        Args:
            split: Finds the `M_i` of a part of the stack.
        """
        if self.outliers is None:
            return self
        return replace(self, stack=self.outliers.filled(self.stack, self.outliers.foretold(self.stack, split)))

    def restored(self, recovery: Recovery) -> Recovery:
        """The answer for the models as they are."""
        found = recovery.times_power_of_two(self.scale.exponent)
        return found if self.outliers is None else self.outliers.restored(found)

    def as_solved(self, recovery: Recovery) -> tuple[Stack, Recovery]:
        """Stack and answer as a solver had them."""
        found = recovery.times_power_of_two(-self.scale.exponent)
        if self.outliers is None:
            return self.stack, found
        found = self.outliers.emptied(found)
        return self.outliers.filled(self.stack, self.outliers.entries(found)), found


def solve(solver: Solver, stack: Stack, rank: int | None = None) -> Recovery:
    """Recover the base's matrix, whatever the size of its numbers, and without regard to outliers.

    Args:
        solver: The method.
        stack: The matrix of every model.
        rank: The most that any `M_i` can have; None finds each model's rank from the data.

    Raises:
        NonFinite: A model holds NaN or Inf.
        NotRecoverable: The method's conditions do not hold on this stack.
    """
    prepared = Prepared.of(stack).foretold(lambda part: solver.solve(part, rank).deltas)
    return prepared.restored(solver.solve(prepared.stack, rank))


def outliers_of(stack: Stack, names: Sequence[str] = ()) -> str:
    """The outliers of a stack in a sentence; empty where there are none.

    Args:
        stack: The models.
        names: What they are called; by default "model 0" and so on.

    Raises:
        NonFinite: A model holds NaN or Inf.
    """
    outliers = Outliers.of(stack)
    return "" if outliers is None else outliers.sentence(names)


def told_by_others(stack: Stack) -> Stack:
    """A stack on its unit scale, with what the other models hold in place of outliers: not to be solved, but seen.

    Raises:
        NonFinite: A model holds NaN or Inf.
    """
    return Prepared.of(stack).foretold(lambda part: ()).stack
