"""Spectral DeTuning as published: what every other method is compared with.

Horwitz, Kahana & Hoshen 2024 (arXiv 2402.10208), Section 4: minimise `sum_i |W_i - W - M_i|_F^2` over W and
rank-limited `M_i`, one after the other, with a rank that grows as the loss levels off.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from detune.fitting.differences import find_differences
from detune.fitting.least_squares import w_step
from detune.fitting.projected_stack import ProjectedStack
from detune.numerics.linalg import randomized_svd
from detune.numerics.random import seeded
from detune.problem.low_rank import LowRank
from detune.problem.recovery import NotLowRank, NotRecoverable, Recovery
from detune.problem.stack import Stack


class ScheduleState(NamedTuple):
    """The state of the rank scheduler.

    Attributes:
        rank: The rank q of the next M-step.
        best: Lowest loss so far.
        bad_steps: Iterations since it fell, or since q last grew.
    """

    rank: int = 1
    best: float = float("inf")
    bad_steps: int = 0


@dataclass(frozen=True)
class RankSchedule:
    """The paper's scheduler: reduce-on-plateau turned to the rank.

    q starts at 1 and doubles once the loss has failed to fall for more than `patience` iterations (relative threshold
    0), never above `rank`; from half of the iterations on q = `rank`.

    Attributes:
        rank: The largest q.
        iterations: Length of the run.
        patience: Iterations without a lower loss that are put up with.
    """

    rank: int
    iterations: int
    patience: int = 15

    def step(self, state: ScheduleState, loss: float, iteration: int) -> ScheduleState:
        """The state after an iteration (counted from 0) that ended with this loss."""
        if iteration + 1 >= self.iterations // 2:
            return ScheduleState(self.rank, min(loss, state.best), 0)
        if loss < state.best:
            return ScheduleState(state.rank, loss, 0)
        if state.bad_steps + 1 > self.patience:
            return ScheduleState(min(2 * state.rank, self.rank), state.best, 0)
        return state._replace(bad_steps=state.bad_steps + 1)


class Iteration(NamedTuple):
    """One iteration, for those who want to watch.

    Attributes:
        rank: The q that it took.
        loss: Mean over models and entries of `(W_i - W - M_i)^2`, after it.
        W: The base as it stands, `(rows, columns)`.
    """

    rank: int
    loss: float
    W: Tensor


@dataclass(frozen=True)
class Spectral:
    """Spectral DeTuning.

    Published settings: ViT r=16 n=5, Stable Diffusion 1.5 r=32 n=5, both 300 iterations; Mistral-7B SFT r=64 n=12 and
    DPO r=64 n=8, 1000 iterations.

    Attributes:
        iterations: M-steps.
        svd: "lowrank" is a randomised one with two power passes, as in the published code; "exact" is LAPACK's.
        on_core: Iterate on the joint core (same iterates, small matrices); False is the published form.
        schedule: False keeps q at the full rank from the start.
        patience: Patience of the rank scheduler.
        seed: Seed of every random vector.
    """

    min_models: ClassVar[int] = 2
    low_rank: ClassVar[bool] = True
    working_copies: ClassVar[int] = 10
    iterations: int = 300
    svd: Literal["lowrank", "exact"] = "lowrank"
    on_core: bool = True
    schedule: bool = True
    patience: int = 15
    seed: int = 0

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        """Iterate; see `Solver.solve`. Without a rank it takes the largest found in the differences."""
        if stack.n < 2:
            raise NotRecoverable("spectral with one model: it needs at least two, and three to be right; add models")
        if rank is None or self.on_core:
            differences = find_differences(stack, rank, self.seed)
            if differences.full_rank_pairs:
                raise NotLowRank(differences.full_rank_pairs, stack.shape)
            rank = rank or max(differences.ranks)
        rank = max(1, min(rank, *stack.shape))
        core = ProjectedStack.of(stack, rank, self.seed) if self.on_core else None
        models = core.cores if core else torch.stack([W_i.to(stack.device, stack.dtype) for W_i in stack.matrices])
        stack.require_finite(models.sum())
        deltas = self.alternate(models, rank)
        step = w_step(stack, core.lift(deltas) if core else deltas)
        return Recovery(
            step.weight,
            "spectral",
            f"Spectral DeTuning, {self.iterations} iterations at rank {rank}, on the "
            + ("joint core" if core else "full matrices"),
            core.lift(deltas) if core else deltas,
            (rank,) * stack.n,
            step.relative_residual,
            step.noise_ratio,
            self.iterations,
        )

    def alternate(
        self, models: Tensor, rank: int, on_step: Callable[[Iteration], None] | None = None
    ) -> tuple[LowRank, ...]:
        """The published iteration on any stack, `(n, rows, columns)`: the final `M_i`; `on_step` watches it."""
        schedule = RankSchedule(rank, self.iterations, self.patience)
        state = ScheduleState(1 if self.schedule else rank)
        W = models.mean(dim=0)
        generator = seeded(self.seed, models.device)
        for iteration in range(self.iterations):
            U, S, V = self._truncated_svd(models - W, state.rank, generator)
            left = U * S.unsqueeze(-2)
            rest = torch.baddbmm(models, left, V.mT, alpha=-1)
            W = rest.mean(dim=0)
            loss = float((rest - W).square().mean())
            if on_step:
                on_step(Iteration(state.rank, loss, W))
            if self.schedule:
                state = schedule.step(state, loss, iteration)
        return tuple(LowRank(left_i, V_i) for left_i, V_i in zip(left, V, strict=True))

    def _truncated_svd(self, matrices: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Best rank-q approximation of each matrix (Eckart & Young 1936): `U, S, V`."""
        if self.svd == "lowrank":
            return randomized_svd(matrices, rank, generator)
        U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
        return U[..., :rank], S[..., :rank], Vh[..., :rank, :].mT
