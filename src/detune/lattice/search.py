"""The original bits of a base that was stored in bf16, fp16 or float32.

A stored entry says that `W + M_i` lies between two midpoints of its dtype's grid, and W itself is a point of the
grid it was stored on. Least squares takes the first for noise and does not know the second. Here the rank-limited
fit alternates with the posterior of every entry (`detune.lattice.kernels`), and directions that show in what is left
are taken in, until nothing more comes. On a known grid two models, or one, can be enough: a float32 merge shows the
delta modulo the base's step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detune.fitting.differences import find_differences
from detune.lattice.decode import decoded
from detune.lattice.entries import StoredEntries, grid_of, in_rounded_dtypes
from detune.lattice.estimate import Estimate
from detune.lattice.fit import Fit, Sweeps
from detune.lattice.holdout import calibrated, held_out
from detune.lattice.light import is_coarse, left_alone_by_fit, left_alone_by_sizes
from detune.lattice.message_passing import sweep
from detune.lattice.start import from_least_squares, from_some
from detune.lattice.submatrix import Submatrix
from detune.numerics.float_grid import HALVES, finely_stored, lies_on, name_of, spacing
from detune.problem.delta_sizes import DeltaScale, delta_scales, scatter
from detune.problem.recovery import FEWEST_MODELS, DecodedBits, NotRecoverable, Recovery, left_alone
from detune.problem.stack import SMALL_ENTRIES, Stack

# Deltas of more steps do not show modulo the step of a single fine model (any number does:
# `benchmarks/constants.py`).
MOST_STEPS = 8.0
# Least squares has not explained the models where it leaves more than 1.2 times the rounding noise (any number does:
# `benchmarks/constants.py`).
MOST_NOISE = 1.2
# A delta that correlates less with what it was before other models came in has been lost to them: in 100 random sets
# this was at least 0.999 where more bits were right then, and at most 0.93 where fewer were (measured).
SAME = 0.97
# With one or two models W itself is open, and the fit takes its time (any number does: `benchmarks/constants.py`).
MOST_SWEEPS, PATIENCE = 24, 4


class NoGrid(NotRecoverable):
    """No grid was found that the base lies on, or no fit on it."""


@dataclass(frozen=True)
class LatticeSearch:
    """How to look for the base's bits.

    Attributes:
        grids: Dtypes that the base may have been stored in; those finer than the models' are not tried.
        sweeps: Most sweeps of the fit.
        least_gain: Share of the variance of the `M_i` above which what a sweep leaves counts as nothing gained.
        patience: How many such sweeps in a row are followed by another.
        most_false_positive: Largest probability, by its bound, that a base off the grid passes the test for it.
        seed: Seed of the held-out entries, and of the rows and columns of large matrices.
    """

    grids: tuple[torch.dtype, ...] = (*HALVES, torch.float32)
    sweeps: int = 16
    least_gain: float = 0.97
    patience: int = 2
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
        if stack.n < FEWEST_MODELS:
            untouched = self.untouched(stack)
            if untouched is not None:
                return untouched
            patient = replace(self, sweeps=max(self.sweeps, MOST_SWEEPS), patience=max(self.patience, PATIENCE))
            return patient.refined(stack, start, rank)
        return self.refined(stack, start, rank)

    def of_light(self, stack: Stack, rank: int | None = None) -> Recovery | None:
        """The base of models whose deltas are rounded away in most entries; None of others.

        The other entries show the deltas finely, but not to least squares.

        Args:
            stack: Three models or more.
            rank: As in `refine`.

        Raises:
            NoGrid: As there.
        """
        scales = delta_scales(stack)
        if not is_coarse(stack, scales):
            return None
        alone = left_alone_by_sizes(stack, self._sweeps, scales)
        return alone or self._of_few_fine(stack).refined(stack, None, rank, scales)

    def _of_few_fine(self, stack: Stack) -> "LatticeSearch":
        """The options for models of which one or two are finely stored, and settle slowly; these ones for others."""
        fine = finely_stored(stack.rounded_dtypes)
        if len(fine) == stack.n or len(fine) >= FEWEST_MODELS:
            return self
        return replace(self, sweeps=max(self.sweeps, MOST_SWEEPS), patience=max(self.patience, 1))

    def taking_in(self, stack: Stack, found: Recovery, rank: int | None = None) -> Recovery:
        """The base's bits with models that an answer has left out, where it is expected to be nearer to it with them.

        Args:
            stack: All models.
            found: The answer of some, with the deltas of all.
            rank: The most that any `M_i` can have.
        """
        # What is finely stored leaves next to no entry open.
        half = bool(set(stack.rounded_dtypes) & set(HALVES)) and not stack.noise_override
        if found.bits is None or not found.deltas or not half:
            return found
        rounded = in_rounded_dtypes(stack)
        fit = self._sweeps.fit(StoredEntries.of(rounded), from_some(rounded, found), found.bits.grid, rank, None)
        if fit is None:
            return found
        fit = replace(fit, log10_false_positive=found.bits.log10_false_positive)
        again = _answer(stack, None, fit)
        assert again.bits is not None
        bits = replace(again.bits, from_least_squares=found.bits.from_least_squares)
        again = replace(again, bits=bits, method=found.method, reason=f"{found.reason}; then all models")
        return again if stays(again, found) and bits.expected.mse < found.bits.expected.mse else found

    def refined(
        self, stack: Stack, start: Recovery | None, rank: int | None, scales: Sequence[DeltaScale] | None = None
    ) -> Recovery:
        """Find the base on the grid with these very options; see `refine`.

        Args:
            stack: The models.
            start: A recovery of them that knows no grid.
            rank: The most that any `M_i` can have.
            scales: How large each delta is; None measures it.
        """
        rounded = in_rounded_dtypes(stack)
        if scales is None and stack.n > 1:
            scales = delta_scales(rounded)
        coarse = scales is not None and is_coarse(rounded, scales)
        for grid in self._coarsest_first:
            if any(torch.finfo(W_i.dtype).eps > torch.finfo(grid).eps for W_i in rounded.matrices):
                continue
            from_start = start is not None and start.deltas and not coarse
            sizes = scales if scales is not None else [scatter(rounded.matrices[0], grid)]
            fit = self._fit(rounded, start if from_start else None, rank, grid, sizes)
            # Where deltas are below a step, the models' own grid is what a base that was merged in place has.
            own = coarse and all(W_i.dtype == grid for W_i in rounded.matrices)
            bound = 0.0 if own else math.log10(self.most_false_positive)
            if fit is not None and fit.log10_false_positive < bound:
                alone = left_alone_by_fit(stack, fit.estimates, scales) if coarse and scales is not None else None
                return alone or _answer(stack, start, fit)
        raise NoGrid(self.why_not(stack))

    def shows_on(self, stack: Stack, start: Recovery) -> bool:
        """Whether a recovery that knows no grid has its weight on one, as far as a few rows and columns tell."""
        rounded = in_rounded_dtypes(stack)
        entries = StoredEntries.of(rounded)
        block = Submatrix.small(entries.shape, self.seed)
        part, estimates = block.entries(entries), block.estimates(from_least_squares(rounded, start))
        held = held_out(part.shape, self.seed)
        return any(
            calibrated(part, estimates, grid_of(grid), held, -math.log10(self.most_false_positive)) is not None
            for grid in self.grids
            if all(torch.finfo(W_i.dtype).eps <= torch.finfo(grid).eps for W_i in rounded.matrices)
        )

    def without_grid(self, stack: Stack, start: Recovery) -> Recovery:
        """The base between the intervals of the models' rounding, where no grid shows.

        The mean of n rounding errors has the variance `step^2 / 12 n`; what n intervals of a step's width have in
        common is `step^2 / 2 (n + 1) (n + 2)` wide in the same sense, and finely stored entries count for more.

        The start is returned as it is where rounding is so fine that it does not matter, where a model seems to have
        no delta (W would lie around points of that model's grid, and look as if it were on it), and where the start
        leaves more than rounding explains.

        Args:
            stack: The models.
            start: A least-squares recovery of them.
        """
        rounded = in_rounded_dtypes(stack)
        if not {W_i.dtype for W_i in rounded.matrices} & set(HALVES) or not all(start.ranks):
            return start
        if (start.noise_ratio or 0.0) > MOST_NOISE:
            return start
        entries, grid = StoredEntries.of(rounded), grid_of(None)
        estimates: Sequence[Estimate] = from_least_squares(rounded, start)
        if len({W_i.dtype for W_i in rounded.matrices}) > 1 and start.weight.numel() <= SMALL_ENTRIES:
            # Finely stored models gain ten times as much from each sweep; others a tenth, for four times the time.
            held = held_out(entries.shape, self.seed)
            estimates, _ = self._sweeps.until_settled(entries, estimates, None, held, None, growing=False)
        estimates = sweep(entries, estimates, grid)
        found = decoded(entries, estimates, grid)
        variances = float(stack.noise.square().sum()) + sum(e.variance for e in estimates)
        before = variances / stack.n**2
        return replace(
            start,
            weight=found.weight.to(stack.device, stack.dtype),
            method=f"{start.method}+intervals",
            reason=f"{start.reason}; then the mean of what the models' rounding leaves of each entry",
            deltas=tuple(e.low_rank.to(stack.device) for e in estimates),
            relative_residual=found.relative_residual,
            noise_ratio=found.noise_ratio,
            residuals=None,
            mse_reduction=max(0.0, before - found.expected.mse),
        )

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

    def why_not(self, stack: Stack) -> str:
        """The sentence that says why no grid was found."""
        names = ", ".join(name_of(grid) for grid in self.grids)
        return (
            f"no grid of the base shows in {stack.n} model{'s' * (stack.n != 1)} (tried: {names}); "
            "the base was stored more finely than that, or the deltas are too large against its steps, or the models "
            "as coarse as the base; " + ("use --method auto" if stack.n > 2 else "add models: three need no grid")
        )

    @property
    def _sweeps(self) -> Sweeps:
        return Sweeps(self.sweeps, self.least_gain, self.patience, self.seed)

    @property
    def _coarsest_first(self) -> list[torch.dtype]:
        """A bf16 base lies on the float32 grid too: the coarsest says most."""
        return sorted(self.grids, key=lambda grid: torch.finfo(grid).eps, reverse=True)

    def _fit(
        self, stack: Stack, start: Recovery | None, rank: int | None, grid: torch.dtype, scales: Sequence[DeltaScale]
    ) -> Fit | None:
        """Sweep on one grid. None where no delta shows on it."""
        entries = StoredEntries.of(stack)
        if start is not None:
            estimates: Sequence[Estimate] = from_least_squares(stack, start)
        else:
            if stack.n == 1 and scales[0].rms > MOST_STEPS * float(spacing(stack.matrices[0][::16], grid).median()):
                return None
            estimates = [Estimate.nothing(stack.shape, scale.rms**2) for scale in scales]
        return self._sweeps.fit(entries, estimates, grid, rank, _known_spaces(stack, rank, scales))


def _known_spaces(stack: Stack, rank: int | None, scales: Sequence[DeltaScale]) -> tuple[Tensor, Tensor] | None:
    """Column and row space of `W_1 - W_2 = M_1 - M_2` where there are two models: they hold those of both."""
    if stack.n != 2 or is_coarse(stack, scales):
        return None
    rows, columns = (find_differences(s, rank, fold=False).of(0, 1) for s in (stack, stack.transposed))
    if rows.full_rank or columns.full_rank or not rows.rank or not columns.rank:
        return None
    return columns.basis.cpu().float(), rows.basis.cpu().float()


def _answer(stack: Stack, start: Recovery | None, fit: Fit) -> Recovery:
    found = decoded(fit.entries, fit.estimates, grid_of(fit.grid))
    assert fit.grid is not None
    used = bool(start is not None and start.deltas)
    bits = DecodedBits(
        fit.grid, fit.log10_false_positive, found.certain.to(stack.device), found.expected, found.foreseeable, used
    )
    before = f"{start.reason}; then " if start is not None and used else ""
    return Recovery(
        found.weight.to(stack.device, stack.dtype),
        f"{start.method}+lattice" if start is not None and used else "lattice",
        f"{before}{fit.sweeps} sweeps on the {name_of(fit.grid)} grid",
        tuple(e.low_rank.to(stack.device) for e in fit.estimates),
        tuple(e.rank for e in fit.estimates),
        found.relative_residual,
        found.noise_ratio,
        fit.sweeps,
        bits,
    )


def stays(again: Recovery, found: Recovery) -> bool:
    """Whether the deltas of the models that an answer is from are the same in one of all models."""
    kept = [i for i in found.source_models if found.ranks[i]]
    return all(again.deltas[i].correlation(found.deltas[i]) > SAME for i in kept)
