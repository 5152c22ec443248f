"""What a user gets without thinking."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from detune.solvers.base import NotRecoverable, Recovery
from detune.solvers.differences import Differences, find_differences
from detune.solvers.fit import w_step
from detune.solvers.intersect import Unsplittable, split
from detune.solvers.polish import Polish
from detune.solvers.spectral import Spectral
from detune.solvers.stack import Stack


@dataclass(frozen=True)
class Auto:
    """Intersection and polish where they apply, Spectral DeTuning where they do not.

    Attributes:
        polish: Options of the polish.
        spectral: Options of the fallback.
        seed: Seed of the sketch.
    """

    min_models: ClassVar[int] = 3
    polish: Polish = field(default_factory=Polish)
    spectral: Spectral = field(default_factory=lambda: Spectral(iterations=1000))
    seed: int = 0

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        """Choose and solve; see `Solver.solve`. The reason says which and why."""
        differences = find_differences(stack, rank, self.seed)
        untouched = _untouched(differences)
        if untouched is not None:
            return untouched
        try:
            deltas, spaces = split(differences, rank)
        except Unsplittable as why:
            _check_solvable(stack, differences.ranks)
            recovery = self.spectral.solve(stack, rank or max(differences.ranks))
            return replace(recovery, reason=f"{why}; so {recovery.reason}")
        polished, steps = self.polish.run(stack, deltas)
        step = w_step(stack, polished)
        return Recovery(
            step.weight,
            "intersect+polish",
            f"closed form from the {spaces.side_name} spaces (separation {spaces.separation:.2g}), "
            f"then {steps} Gauss-Newton step{'s' * (steps > 1)}",
            polished,
            tuple(M_i.rank for M_i in polished),
            step.relative_residual,
            step.noise_ratio,
            steps,
        )


def _check_solvable(stack: Stack, ranks: tuple[int, ...]) -> None:
    """Refuse where there are more unknowns than numbers: no method can do it."""
    out, columns = stack.shape
    unknowns = out * columns + sum(r * (out + columns - r) for r in ranks)
    if unknowns > stack.n * out * columns:
        raise NotRecoverable(
            f"ranks {ranks} are too high for {stack.n} models of a {out}x{columns} matrix",
            f"{unknowns} unknowns against {stack.n * out * columns} numbers",
            "add models",
        )


def _untouched(differences: Differences) -> Recovery | None:
    """Two models that agree in every entry did not change this matrix: it is the base's, bit for bit."""
    stack = differences.stack
    if stack.n < 3:
        return None
    for (i, j), difference in differences.by_pair.items():
        if difference.identical:
            weight = stack.matrices[i].to(stack.device, stack.dtype, copy=True)
            return Recovery(
                weight,
                "unchanged",
                f"models {i} and {j} agree in every entry: they left this matrix as the base has it",
                ranks=differences.ranks,
                relative_residual=0.0,
                noise_ratio=0.0,
            )
    return None
