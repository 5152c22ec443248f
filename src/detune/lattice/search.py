"""The original bits of a base that was stored in bf16, fp16 or float32.

A stored entry says that `W + M_i` lies between two midpoints of its dtype's grid, and W itself is a point of the
grid it was stored on. Least squares takes the first for noise and does not know the second. Here the rank-limited
fit alternates with the posterior of every entry (`detune.lattice.posterior`), until both agree. On a known
grid two models, or one, can be enough: a float32 merge shows the delta modulo the base's step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from detune.fitting.ard import ard_start, nearly_share_a_direction
from detune.lattice.decode import base_bits, cross_fitted
from detune.lattice.estimate import Estimate, from_recovery
from detune.lattice.holdout import HeldOut, calibrated, log10_false_positive, misfit
from detune.lattice.message_passing import sweep
from detune.lattice.off_grid import between_intervals
from detune.lattice.spectral_init import delta_scale, known_spaces, score_start, within
from detune.numerics.float_grid import lies_on, name_of, spacing
from detune.problem.recovery import DecodedBits, NotRecoverable, Recovery, left_alone
from detune.problem.stack import Stack

HALVES = (torch.bfloat16, torch.float16)
# A fit that knows no grid, and whose test for one has a larger bound than this, is not swept.
HINT = 0.1
# Variances that least squares promises can be so many times too small.
WIDER = 16.0
# As long as more of what was held out than this share fits no grid point, sweeps that gain this much are worth it.
UNSETTLED, LEAST_GAIN = 5e-4, 0.003
# A start from the score is farther from the answer than one from least squares.
MORE_SWEEPS = 8
# Deltas of more steps than this do not show modulo the step.
MOST_STEPS = 8.0
# A fit that is to come to something shows a sign of the grid, 1 in 10 by chance, after some sweeps.
SIGN_AFTER, SIGN = 5, -1.0
# Least squares that leaves more times the rounding noise than this has not explained the models.
MOST_NOISE = 1.2
# Deltas below so many steps of the models' grid do not show in least squares, which takes rounding for noise.
FINE = 1.5


class NoGrid(NotRecoverable):
    """No grid was found that the base lies on, or no fit on it."""


class Fit(NamedTuple):
    """What the sweeps gave on one grid.

    Attributes:
        estimates: One for each model.
        grid: The dtype tried.
        log10_false_positive: Of the test for the grid.
        misfit: Share of the entries held out that no grid point explains.
        sweeps: How many were made.
    """

    estimates: tuple[Estimate, ...]
    grid: torch.dtype
    log10_false_positive: float
    misfit: float
    sweeps: int


@dataclass(frozen=True)
class LatticeSearch:
    """How to look for the base's bits.

    Attributes:
        grids: Dtypes that the base may have been stored in; those finer than the models' are not tried.
        sweeps: Most sweeps of the fit.
        least_gain: A sweep that raises the evidence of an entry by less than this, in nats, is the last.
        most_misfits: More than this share of the entries held out that fit no grid point: the deltas were not found.
        most_false_positive: Largest probability, by its bound, that a base off the grid passes the test for it.
        seed: Of the entries that are held out.
    """

    grids: tuple[torch.dtype, ...] = (*HALVES, torch.float32)
    sweeps: int = 20
    least_gain: float = 0.003
    most_misfits: float = 3e-3
    most_false_positive: float = 1e-9
    seed: int = 0

    def refine(self, stack: Stack, start: Recovery | None = None, rank: int | None = None) -> Recovery:
        """Find the grid, and the base on it.

        Args:
            stack: The models; one is enough where its grid is finer than the base's.
            start: A recovery of them that knows no grid; None where there is none.
            rank: The most that any `M_i` can have; None finds it.

        Raises:
            NoGrid: No grid passes the test, or the fit on it does not explain what was held out.
        """
        untouched = self.untouched(stack) if stack.n < 3 else None
        if untouched is not None:
            return untouched
        try:
            return self.refine_from(stack, start, rank)
        except NoGrid:
            if start is None or not any(
                nearly_share_a_direction(stack, side)
                for side in ([M_i.right for M_i in start.deltas], [M_i.left for M_i in start.deltas])
            ):
                raise
        return self.refine_from(stack, ard_start(stack), rank)

    def refine_from(self, stack: Stack, start: Recovery | None, rank: int | None = None) -> Recovery:
        """The same from this start and no other."""
        stack = _as_rounded(stack)
        held = HeldOut.of(stack, self.seed)
        for grid in self._coarsest_first:
            if any(torch.finfo(W_i.dtype).eps > torch.finfo(grid).eps for W_i in stack.matrices):
                continue
            fit = self._fit(stack, start, rank, grid, held)
            if fit is not None and fit.log10_false_positive <= math.log10(self.most_false_positive):
                if fit.misfit > self.most_misfits:
                    raise NoGrid(_unsettled(fit))
                return self._finish(stack, start, fit)
        raise NoGrid(_why_not(stack, self.grids))

    def without_grid(self, stack: Stack, start: Recovery) -> Recovery:
        """The base between the intervals of the models' rounding, where no grid shows.

        The start is returned as it is where rounding is so fine that it does not matter, where it is so coarse that
        least squares does not see the deltas, where a model seems to have none (W would lie around points of that
        model's grid, and look as if it were on it), and where the start leaves more than rounding explains.

        Args:
            stack: The models.
            start: A least-squares recovery of them.
        """
        rounded = _as_rounded(stack)
        dtypes = {W_i.dtype for W_i in rounded.matrices}
        coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        if not dtypes & set(HALVES) or not all(start.ranks) or (start.noise_ratio or 0.0) > MOST_NOISE:
            return start
        return start if _is_coarse(rounded, coarsest) else between_intervals(rounded, start, self.seed)

    def untouched(self, stack: Stack) -> Recovery | None:
        """The matrix, or vector, of a finely stored model whose every entry lies on a coarser grid.

        It is taken to have left it as the base has it. None where all models are so: they were rounded.
        """
        for grid in self._coarsest_first:
            on_it = [lies_on(W_i, grid) for W_i in stack.matrices]
            finely = [torch.finfo(W_i.dtype).eps < torch.finfo(grid).eps for W_i in stack.matrices]
            chosen = [on and fine for on, fine in zip(on_it, finely, strict=True)]
            if any(chosen) and (stack.n == 1 or not all(on_it)):
                model, name = chosen.index(True), name_of(grid)
                return left_alone(stack, model, f"model {model} has every entry on the {name} grid")
        return None

    @property
    def _coarsest_first(self) -> list[torch.dtype]:
        """A bf16 base lies on the float32 grid too: the coarsest says most."""
        return sorted(self.grids, key=lambda grid: torch.finfo(grid).eps, reverse=True)

    def _fit(
        self, stack: Stack, start: Recovery | None, rank: int | None, grid: torch.dtype, held: HeldOut
    ) -> Fit | None:
        """Sweep on one grid, the entries held out left alone. None where no delta shows on it."""
        spaces = None
        estimates, coarse = from_recovery(stack, start), _is_coarse(stack, grid)
        if estimates is None and not coarse and stack.n > 2:
            return None
        if estimates is None or coarse:
            spaces = known_spaces(stack, rank) if stack.n == 2 and not coarse else None
            tau = delta_scale(stack, grid)
            if tau > MOST_STEPS * float(spacing(stack.matrices[0][::16], grid).median()):
                return None
            scored = score_start(stack, grid, tau, rank, spaces, held.used)
            if scored is None:
                return None
            estimates = scored
        elif not _shows(held, estimates, grid):
            # The M_i are known so well that a grid would show.
            return None
        estimates, evidence = calibrated(held, estimates, grid)
        most = self.sweeps + (MORE_SWEEPS if coarse else 0)
        sweeps, gain, misfits = 0, math.inf, 0.0
        while sweeps < most and abs(gain) >= (LEAST_GAIN if misfits > UNSETTLED else self.least_gain):
            swept = within(sweep(stack, estimates, grid, held.used, self.seed + sweeps), spaces)
            estimates, gained = calibrated(held, swept, grid)
            sweeps, gain, evidence = sweeps + 1, gained - evidence, gained
            misfits = misfit(held, estimates, grid)
            if sweeps == SIGN_AFTER and log10_false_positive(held, estimates, grid) > SIGN:
                break
        false_positive = log10_false_positive(held, estimates, grid)
        return Fit(estimates, grid, false_positive, misfits, sweeps)

    def _finish(self, stack: Stack, start: Recovery | None, fit: Fit) -> Recovery:
        """The answer, from a fit to all entries."""
        estimates, parts = cross_fitted(stack, fit.estimates, fit.grid, self.seed + fit.sweeps)
        found = base_bits(stack, parts, fit.grid)
        # A delta that the start found to be none stays none.
        known = start.ranks if start is not None and start.ranks else (1,) * stack.n
        deltas = tuple(e.significant if r else e.nothing for e, r in zip(estimates, known, strict=True))
        name = name_of(fit.grid)
        bits = DecodedBits(fit.grid, fit.log10_false_positive, found.certain, found.expected, found.foreseeable)
        before = f"{start.reason}; then " if start is not None else ""
        return Recovery(
            found.weight,
            f"{start.method}+lattice" if start is not None else "lattice",
            f"{before}{fit.sweeps} sweeps on the {name} grid",
            deltas,
            tuple(M_i.rank for M_i in deltas),
            found.relative_residual,
            found.noise_ratio,
            fit.sweeps,
            bits,
        )


def _shows(held: HeldOut, estimates: Sequence[Estimate], grid: torch.dtype) -> bool:
    """Whether there is a sign of the grid, with the variances as they are or too small."""
    wider = [replace(estimate, scale=WIDER * estimate.scale) for estimate in estimates]
    return any(log10_false_positive(held, tried, grid) <= math.log10(HINT) for tried in (estimates, wider))


def _is_coarse(stack: Stack, grid: torch.dtype) -> bool:
    """Whether the models are stored so coarsely that their deltas are rounded away in most entries."""
    if stack.n < 2 or all(torch.finfo(W_i.dtype).eps < torch.finfo(grid).eps for W_i in stack.matrices):
        return False
    step = max(float(spacing(W_i[::16], W_i.dtype).median()) for W_i in stack.matrices)
    return delta_scale(stack, grid) < FINE * step


def _as_rounded(stack: Stack) -> Stack:
    """The stack in the dtypes that its models were rounded to: float32 files may hold what was bf16 or fp16 before."""
    rounded = tuple(
        W_i.to(dtype) if W_i.dtype != dtype and lies_on(W_i, dtype) else W_i
        for W_i, dtype in zip(stack.matrices, stack.rounded_dtypes, strict=True)
    )
    # One model alone may have left a half-precision base as it was.
    return replace(stack, matrices=rounded) if stack.n > 1 else stack


def _unsettled(fit: Fit) -> str:
    name = name_of(fit.grid)
    return (
        f"the base lies on the {name} grid (chance of error below 1e{math.ceil(fit.log10_false_positive)}), but "
        f"{fit.misfit:.2%} of the entries held out fit no point of it after {fit.sweeps} sweeps; "
        "the deltas are too large against its steps for so few models; add models"
    )


def _why_not(stack: Stack, grids: Sequence[torch.dtype]) -> str:
    names = ", ".join(name_of(grid) for grid in grids)
    return (
        f"no grid of the base shows in {stack.n} model{'s' * (stack.n != 1)} (tried: {names}); "
        "the base was stored more finely than that, or the deltas are too large against its steps, or the models as "
        "coarse as the base; " + ("use --method auto" if stack.n > 2 else "add models: three need no grid")
    )
