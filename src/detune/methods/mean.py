"""The paper's baseline "Mean LoRA": independent deltas cancel, a common part stays."""

from dataclasses import dataclass
from typing import ClassVar

from detune.fitting.least_squares import w_step
from detune.origin import Origin
from detune.problem.recovery import Recovery
from detune.problem.stack import Stack


@dataclass(frozen=True)
class Mean:
    """`W_star = mean_i W_i`, for any number of models.

    Reference: Horwitz et al. 2024 (arXiv 2402.10208), Section 5, baselines.
    """

    min_models: ClassVar[int] = 1
    low_rank: ClassVar[bool] = False
    working_copies: ClassVar[int] = 3

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        """Average; see `Solver.solve`. `rank` plays no part."""
        step = w_step(stack, ())
        return Recovery(
            step.weight,
            "mean",
            f"the average of {stack.n} models; no deltas were split off",
            relative_residual=step.relative_residual,
            noise_ratio=step.noise_ratio,
            origin=Origin.MEAN,
        )
