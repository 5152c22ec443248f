"""The closed form: adapters' spaces by intersection, then one least-squares step."""

from dataclasses import dataclass
from typing import ClassVar

from detune.fitting.differences import find_differences
from detune.fitting.least_squares import w_step_given_rows
from detune.fitting.subspaces import find_spaces
from detune.problem.recovery import Recovery
from detune.problem.stack import Stack


@dataclass(frozen=True)
class Intersect:
    """Closed form from three models on.

    It needs `r_1 + r_2 + r_3 <= max(out, in)` and `r_i + r_j <= min(out, in)`.

    Attributes:
        seed: Seed of the sketch.
    """

    min_models: ClassVar[int] = 3
    low_rank: ClassVar[bool] = True
    working_copies: ClassVar[int] = 3

    seed: int = 0

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        """Recover by intersection; see `Solver.solve`."""
        spaces = find_spaces(find_differences(stack, rank, self.seed), rank, self.seed)
        step = w_step_given_rows(spaces.stack, spaces.bases)
        step = step.transposed if spaces.transposed else step
        return Recovery(
            step.weight,
            "intersect",
            f"closed form from the {spaces}",
            step.deltas,
            tuple(M_i.rank for M_i in step.deltas),
            step.relative_residual,
            step.noise_ratio,
            residuals=step.residuals,
        )
