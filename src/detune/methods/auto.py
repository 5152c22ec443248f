"""The default method."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from detune.fitting.ard import shrink_where_run_off
from detune.fitting.descent import damped_gauss_newton
from detune.fitting.differences import Difference, Differences, find_differences
from detune.fitting.gauss_newton import GaussNewton, GaussNewtonFit
from detune.fitting.least_squares import WStep, w_step, w_step_given_rows
from detune.fitting.rank_refinement import refine_ranks
from detune.fitting.separation import Chosen, well_separated
from detune.fitting.subspaces import RanksTooHigh, RowSpaces
from detune.identifiability.principal_part import require_own_adapters
from detune.lattice import HALVES, LatticeSearch, NoGrid, all_half, is_coarse, stays
from detune.methods.spectral import Spectral
from detune.problem.delta_sizes import independent_models
from detune.problem.low_rank import LowRank, SVDFactors
from detune.problem.rank_rule import SIGNAL
from detune.problem.recovery import NotRecoverable, Recovery, left_alone
from detune.problem.stack import SMALL_ENTRIES, Stack
from detune.problem.storage_noise import FLOOR_RATIO
from detune.source_models.identical import solve_versions, unchanged
from detune.source_models.mixed_precision import (
    rounded_alike,
    solve_from_finest,
    solve_rounded_alike,
)
from detune.source_models.solve_from import solve_from

# Where the rank is told, singular values of differences are looked for down to this share of the storage noise (any
# number does: `benchmarks/constants.py`).
BELOW_NOISE = 0.5
# No other start is tried below the noise once the residual is within 3 % of the storage noise (any number does:
# `benchmarks/constants.py`).
AT_FLOOR = 1.03
# Deltas twice as large as those of the closed form have run off along what the data leave open (any number does:
# `benchmarks/constants.py`).
RAN_OFF = 2.0
# No rank search if the weakest singular value stands eight times over the noise (any number does:
# `benchmarks/constants.py`).
CLEAR = 8.0
# No rank search if over 16 singular values, or an eighth of all, lie within twice the noise (any number does:
# `benchmarks/constants.py`).
JUST_ABOVE = 2.0
FEW_DIRECTIONS = 16
# The rank that adapters usually have, though few of a light one's directions show (a definition).
USUAL_RANK = 16
DEPENDENT = "the others' adapters are not independent of theirs"


@dataclass(frozen=True)
class Auto:
    """Intersection and polish where they apply, Spectral DeTuning where they do not; then the bits, if a grid shows.

    Attributes:
        lattice: How the base's bits are looked for; None does not. As long as sweeps gain much, on the grids of half
            precision: the method `lattice` looks longer.
        polish: Options of the polish.
        spectral: Options of the fallback.
        seed: Seed of the sketch.
    """

    min_models: ClassVar[int] = 3
    low_rank: ClassVar[bool] = True
    working_copies: ClassVar[int] = 10

    lattice: LatticeSearch | None = field(
        default_factory=lambda: LatticeSearch(grids=HALVES, sweeps=4, least_gain=0.9, patience=0)
    )
    polish: GaussNewton = field(default_factory=GaussNewton)
    spectral: Spectral = field(default_factory=Spectral)
    seed: int = 0

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        """Choose and solve; see `Solver.solve`. The reason says which and why."""
        of_finest = solve_from_finest(stack, self.solve, rank)
        if of_finest is not None:
            return of_finest
        of_versions = solve_versions(stack, self.solve, rank)
        if of_versions is not None:
            return of_versions
        models = independent_models(stack)
        light = self.lattice is not None and is_coarse(stack.part(models))
        of_some = chosen = None
        if light:
            # Directions of light deltas do not stand over the noise.
            of_some = self._of_some(stack, models, rank)
        elif stack.n > self.min_models:
            chosen = well_separated(stack.n, models, lambda some: self._chosen(stack, some, rank))
            of_some = self._of_chosen(stack, chosen)
        if of_some is not None:
            return of_some
        # What was rounded to levels of its own lies on no dtype's grid.
        on_grid = self.lattice is not None and not stack.noise_override
        found = self._without_differences(stack, rank) if on_grid else None
        if found is not None:
            return found
        if chosen is None or len(chosen.models) < stack.n:
            chosen = self._chosen(stack, tuple(range(stack.n)), rank)
        return self._on_grid(stack, chosen) if on_grid else self._least_squares(stack, chosen)

    def _without_differences(self, stack: Stack, rank: int | None) -> Recovery | None:
        """A model's own bits where it left the matrix alone, or the base of light models; None of others."""
        assert self.lattice is not None
        found = self._left_alone(stack) if stack.n >= self.min_models else None
        if found is None:
            with suppress(NoGrid):
                found = self.lattice.of_light(stack, rank)
        return found

    def _of_some(self, stack: Stack, models: tuple[int, ...], rank: int | None) -> Recovery | None:
        """The answer of models that are independent of each other, and then of all; None where these are all."""
        if len(models) == stack.n:
            return None
        found = solve_from(stack, models, self.solve, rank, DEPENDENT)
        if found is None or found.left_alone or not found.deltas:
            return found
        if found.bits is not None and self.lattice is not None:
            return self.lattice.taking_in(stack, found, rank)
        polished = self.polish.run(stack, [SVDFactors.of(M_i).V for M_i in found.deltas])
        step = w_step(stack, polished.deltas) if polished.converged else None
        if step is None or step.noise_ratio > FLOOR_RATIO:
            return found
        return _answer(step, found.method, f"{found.reason}; then all models", polished.steps)

    def _of_chosen(self, stack: Stack, chosen: Chosen) -> Recovery | None:
        """The answer of all from the closed form of some; from their own bits where that does not do."""
        if self.lattice is not None and all_half(stack) and len(chosen.models) < stack.n:
            with suppress(NotRecoverable):
                start = solve_from(stack, chosen.models, lambda *_: self._quick(chosen), chosen.rank, DEPENDENT)
                if start is not None and all(start.ranks):
                    found = self.lattice.refine(stack, start, chosen.rank)
                    if found.deltas and stays(found, start):
                        return found
        return self._of_some(stack, chosen.models, chosen.rank)

    def _chosen(self, stack: Stack, models: tuple[int, ...], rank: int | None) -> Chosen:
        """Differences of some models, of rows and columns with even rounding where they can be.

        Beside coarse models fine ones show directions that these hide, and ranks do not add up: all are as coarse.
        """
        part = stack.part(models) if len(models) < stack.n else stack
        alike = rounded_alike(part)
        balance = alike.balance if self.lattice is not None and not part.noise_override else None
        differences = find_differences(alike.scaled(balance) if balance else part, rank, self.seed)
        return Chosen(models, differences, balance, rank, self.seed)

    def _quick(self, chosen: Chosen) -> Recovery:
        """The closed form without a search for ranks."""
        found = self._closed_form(chosen, search=False)
        balance = chosen.balance
        return found.scaled(1 / balance.rows, 1 / balance.columns) if balance else found

    def _on_grid(self, stack: Stack, chosen: Chosen) -> Recovery:
        """The closed form, and the base's bits from there; the best of least squares where no grid shows."""
        assert self.lattice is not None
        rank = chosen.rank
        quick = None
        with suppress(NotRecoverable):
            quick = self._quick(chosen)
        if quick is not None:
            with suppress(NotRecoverable):
                require_own_adapters(quick)
                alone = _left_alone_by_rank(stack, chosen.differences, quick)
                if alone is not None and (not chosen.balance or self.lattice.shows_on(stack, quick)):
                    return alone
                return self.lattice.refine(stack, quick, rank)
        found = solve_rounded_alike(stack, self.solve, rank)
        if found is not None:
            return found
        found = self._least_squares(stack, chosen)
        if not found.deltas:
            return found
        if quick is None:
            with suppress(NoGrid):
                return self.lattice.refine(stack, found, rank)
        return self.lattice.without_grid(stack, found)

    def _least_squares(self, stack: Stack, chosen: Chosen) -> Recovery:
        if chosen.balance:
            chosen = replace(chosen, differences=find_differences(stack, chosen.rank, self.seed), balance=None)
        found = self._without_grid(stack, chosen)
        require_own_adapters(found)
        return shrink_where_run_off(stack, found)

    def _left_alone(self, stack: Stack) -> Recovery | None:
        """The matrix of a model whose bits show that it left it as the base has it, or that of models that agree."""
        assert self.lattice is not None
        return self.lattice.untouched(stack) or unchanged(stack)

    def _without_grid(self, stack: Stack, chosen: Chosen) -> Recovery:
        first, rank = chosen.differences, chosen.rank
        if stack.n >= 3 and any(difference.rank == 0 for difference in first.by_pair.values()):
            untouched = unchanged(stack)
            if untouched is not None:
                return untouched
        best, why_not = None, ""
        try:
            best = self._closed_form(chosen)
        except RanksTooHigh as why:
            why_not = str(why)
        if best is not None or _in_a_crowd(first):
            best = self._look_again(stack, rank, best)
        if best is not None:
            return best
        _check_solvable(stack, first.ranks)
        recovery = self.spectral.solve(stack, rank or max(first.ranks))
        return replace(recovery, reason=f"{why_not}; so {recovery.reason}")

    def _look_again(self, stack: Stack, rank: int | None, best: Recovery | None) -> Recovery | None:
        """The best of what differences give that are cut elsewhere, if the closed form is not at the noise.

        Folding rows loses a direction where very few rows differ: all of them are looked at. Differences of LoRAs that
        nearly coincide can have directions below the noise: where the rank is known, they are looked for there. And
        noise may be more than storage's, if the merge was rounded on its way: that shows above it.
        """
        below = (BELOW_NOISE,) if rank is not None else ()
        for signal in (SIGNAL, *below, 2 * SIGNAL, 4 * SIGNAL, 8 * SIGNAL):
            enough = AT_FLOOR if signal == BELOW_NOISE else FLOOR_RATIO
            if best is not None and (best.noise_ratio or 0.0) <= enough and not _fits_noise(best, stack):
                continue
            try:
                differences = find_differences(stack, rank, self.seed, False, signal)
                again = self._closed_form(Chosen(tuple(range(stack.n)), differences, None, rank, self.seed))
            except RanksTooHigh:
                continue
            except NotRecoverable:
                break
            options = [again] if best is None else [best, again]
            best = min(options, key=lambda r: (_fits_noise(r, stack), r.noise_ratio or 0.0))
        return best

    def _closed_form(self, chosen: Chosen, search: bool = True) -> Recovery:
        spaces, differences = chosen.spaces, chosen.differences
        # Noise that was told may be of any size, and its size is not known well enough for a search.
        search = search and not differences.stack.noise_override
        if search and any(map(_in_doubt, differences.by_pair.values())) and not _in_a_crowd(differences):
            spaces = refine_ranks(spaces, chosen.rank)
        polished = self.polish.run(spaces.stack, spaces.bases)
        step, method, steps = _best_step(spaces, polished), "intersect+polish", polished.steps
        if step is None or step.noise_ratio > FLOOR_RATIO:
            # Directions that are noise make the step ill-conditioned: it must not spoil a better start. One that
            # wandered off fits the data better than the start and the base worse.
            start = w_step_given_rows(spaces.stack, spaces.bases)
            if step is None or not (polished.converged and step.noise_ratio <= start.noise_ratio):
                step, method, steps = start, "intersect", 0
        step = step.transposed if spaces.transposed else step
        how = f"then {steps} Gauss-Newton step{'s' * (steps > 1)}" if steps else "polishing brought it no closer"
        return _answer(step, method, f"closed form from the {spaces}; {how}", steps)


def _answer(step: WStep, method: str, reason: str, steps: int) -> Recovery:
    return Recovery(
        step.weight,
        method,
        reason,
        step.deltas,
        tuple(M_i.rank for M_i in step.deltas),
        step.relative_residual,
        step.noise_ratio,
        steps,
        residuals=step.residuals,
    )


def _best_step(spaces: RowSpaces, polished: GaussNewtonFit) -> WStep | None:
    """The W-step at the polished deltas, or at better ones where they did not converge; None where all ran off.

    Full steps wander where some direction is as good as undetermined. Shorter ones, which only matrices small enough
    get, lower the misfit, but may do so by deltas a hundred times as large as the models differ.
    """
    if polished.converged:
        return w_step(spaces.stack, polished.deltas)
    options = [polished.deltas]
    if spaces.stack.shape[0] * spaces.stack.shape[1] <= SMALL_ENTRIES:
        options.append(damped_gauss_newton(spaces.stack, spaces.bases))
    most = RAN_OFF * _size(w_step_given_rows(spaces.stack, spaces.bases).deltas)
    steps = [w_step(spaces.stack, deltas) for deltas in options if _size(deltas) <= most]
    return min(steps, key=lambda step: step.noise_ratio, default=None)


def _left_alone_by_rank(stack: Stack, differences: Differences, quick: Recovery) -> Recovery | None:
    """The matrix of a model of rank 0, where ranks of differences add up; None where there is none such."""
    ranks = quick.ranks
    if 0 not in ranks or not _adds_up(differences) or sum(map(bool, ranks)) < stack.n - 1:
        return None
    model = ranks.index(0)
    # Directions of the size of what is noise, as many as another model has or as adapters have, would not be seen.
    hidden = (SIGNAL * float(stack.noise_norm(model, stack.shape[0]))) ** 2 * max(USUAL_RANK, *ranks)
    sign = f"model {model} differs from the others by their own ranks alone"
    found = left_alone(stack, model, sign, hidden / (stack.shape[0] * stack.shape[1]))
    return replace(found, deltas=quick.deltas, ranks=quick.ranks)


def _adds_up(differences: Differences) -> bool:
    """Whether the rank of each difference is the sum of two models' ranks, as that of independent adapters is."""
    ranks = differences.ranks
    return all(ranks[i] + ranks[j] == difference.rank for (i, j), difference in differences.by_pair.items())


def _size(deltas: Sequence[LowRank]) -> float:
    """The largest Frobenius norm."""
    return math.sqrt(max(0.0, *(M_i.energy for M_i in deltas)))


def _in_doubt(difference: Difference) -> bool:
    """Whether the rank of a difference ends near the noise, where more may lie hidden."""
    S = difference.singular_values
    return bool(len(S)) and float(S[-1]) < CLEAR * difference.noise_norm


def _in_a_crowd(differences: Differences) -> bool:
    """Whether some difference ends in noise of another kind."""
    found = differences.by_pair.values()
    return any(_is_crowded(each.singular_values, each.noise_norm, differences.stack) for each in found)


def _is_crowded(singular_values: Tensor, noise_norm: float, stack: Stack) -> bool:
    """Whether too many directions stand just above the noise: they are noise of another kind than storage's.

    A search would take them for ranks one by one.
    """
    just_above = int(singular_values.lt(JUST_ABOVE * noise_norm).sum())
    return just_above > max(FEW_DIRECTIONS, min(stack.shape) // 8)


def _fits_noise(recovery: Recovery, stack: Stack) -> bool:
    """Whether some delta is noise of another kind than storage's: the better it fits, the worse the base."""
    rows = stack.shape[0]
    return any(
        _is_crowded(SVDFactors.of(M_i).S, SIGNAL * 2**0.5 * float(stack.noise_norm(i, rows)), stack)
        for i, M_i in enumerate(recovery.deltas)
        if M_i.rank > FEW_DIRECTIONS
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
