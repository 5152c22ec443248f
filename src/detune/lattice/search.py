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
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from detune.fitting.differences import find_differences
from detune.lattice.decode import decoded
from detune.lattice.entries import Entries, StoredEntries, grid_of
from detune.lattice.estimate import Estimate
from detune.lattice.growth import grown
from detune.lattice.message_passing import stepped, sweep
from detune.numerics.float_grid import lies_on, name_of, spacing
from detune.numerics.random import seeded
from detune.problem.balance import Balance
from detune.problem.delta_sizes import MOST_ALIKE, DeltaScale, beside_rounding, delta_scales, scatter
from detune.problem.low_rank import LowRank
from detune.problem.recovery import DecodedBits, NotRecoverable, Recovery, left_alone
from detune.problem.stack import Stack

HALVES = (torch.bfloat16, torch.float16)
# Entries kept from the fit: their share, and how many the test for a grid looks at (any number does:
# `benchmarks/constants.py`).
HELD, TESTED = 1 / 16, 1 << 12
# Larger matrices are fitted in so many rows and columns, or so many for each direction; the others follow from those
# (measured: `benchmarks/constants.py`).
BLOCK, BLOCK_PER_RANK = 512, 16
# Least squares promises variances that are too small where it lacks directions (any number does:
# `benchmarks/constants.py`).
WIDE = 4.0
# Newton steps for the others: each looks at every second entry, or at all, and brings down what a row is uncertain by,
# to a fifth at most. In random 2048x2048 matrices half of the entries in the first steps cost 0.02 % of the bits and
# save a tenth of the time; a quarter of them left columns wrong in small matrices (measured:
# `benchmarks/constants.py`).
STEPS_OUT, MOST_FALL = (2, 2, 1), 0.2
# Deltas of more steps than this do not show modulo the step of a single fine model (any number does:
# `benchmarks/constants.py`).
MOST_STEPS = 8.0
# Deltas below this share of the models' step do not show in least squares, which takes rounding for noise. Measured on
# random matrices and a language model's: the two starts are as good at 0.6 (`benchmarks/llm.py`).
FINE = 0.6
# Least squares that leaves more times the rounding noise than this has not explained the models (any number does:
# `benchmarks/constants.py`).
MOST_NOISE = 1.2
# A delta that seems to be below this share of the others' may be what these have in common, as MOST_ALIKE allows (any
# number does: `benchmarks/constants.py`).
COMMON = 0.4
# Estimates that are known to this share of a step leave one entry in a thousand open: the grid's finest steps (any
# number does: `benchmarks/constants.py`).
SETTLED = 1e-3
# A delta that correlates less with what it was before other models came in has been lost to them: in 100 random sets
# this was at least 0.999 where more bits were right then, and at most 0.93 where fewer were (measured).
SAME = 0.97
# What is left of a delta's size, as a share of the others', where it is none (any number does:
# `benchmarks/constants.py`).
NOTHING = 0.15
# The fit that looks at it: rows and columns, and sweeps (any number does: `benchmarks/constants.py`).
SMALL_BLOCK, FEW_SWEEPS = 256, 4
# Where the score has shown nothing new so often, it is not asked again (any number does: `benchmarks/constants.py`).
BARREN = 2
# With fewer models W itself is open, and the fit takes its time (any number does: `benchmarks/constants.py`).
FEW_MODELS, MOST_SWEEPS, PATIENCE = 3, 24, 4
# A start may be off by more than it promises: variances so many times as large are tried for a sign of the grid (any
# numbers do).
WIDER = (1.0, 4.0, 16.0, 64.0, 256.0, 4096.0)
# A sign: it comes by chance once in ten times (derived: Markov's inequality).
SIGN = 1.0


class NoGrid(NotRecoverable):
    """No grid was found that the base lies on, or no fit on it."""


@dataclass(frozen=True)
class Fit:
    """What the sweeps gave on one grid.

    Attributes:
        entries: The models.
        estimates: One for each model.
        grid: The dtype tried; None is no grid.
        log10_false_positive: Bound for the chance that a base off the grid looks as much as if it were on it.
        sweeps: How many were made.
    """

    entries: Entries
    estimates: tuple[Estimate, ...]
    grid: torch.dtype | None
    log10_false_positive: float
    sweeps: int


@dataclass(frozen=True)
class LatticeSearch:
    """How to look for the base's bits.

    Attributes:
        grids: Dtypes that the base may have been stored in; those finer than the models' are not tried.
        sweeps: Most sweeps of the fit.
        least_gain: A sweep that leaves more than this share of the variance of the `M_i` has gained nothing.
        patience: How many such sweeps in a row are followed by another.
        most_false_positive: Largest probability, by its bound, that a base off the grid passes the test for it.
        seed: Of the entries that are held out, and of the rows and columns of large matrices.
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
        if stack.n < FEW_MODELS:
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
        return left_alone_in_part(stack, self, scales) or self.refined(stack, None, rank, scales)

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
        rounded = as_rounded(stack)
        fit = self._swept(StoredEntries.of(rounded), _from_answer(rounded, found), found.bits.grid, rank, None)
        if fit is None:
            return found
        fit = replace(fit, log10_false_positive=found.bits.log10_false_positive)
        again = replace(_answer(stack, None, fit), method=found.method, reason=f"{found.reason}; then all models")
        assert again.bits is not None
        kept = [i for i in found.source_models if found.ranks[i]]
        stays = all(again.deltas[i].correlation(found.deltas[i]) > SAME for i in kept)
        return again if stays and again.bits.expected.mse < found.bits.expected.mse else found

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
        rounded = as_rounded(stack)
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
                alone = _left_alone(stack, fit.estimates, scales) if coarse and scales is not None else None
                return alone or _answer(stack, start, fit)
        raise NoGrid(self.why_not(stack))

    def shows_on(self, stack: Stack, start: Recovery) -> bool:
        """Whether a recovery that knows no grid has its weight on one, as far as a few rows and columns tell."""
        rounded = as_rounded(stack)
        entries = StoredEntries.of(rounded)
        rows, columns = (_some(size, SMALL_BLOCK, self.seed) for size in entries.shape)
        part = entries.part(rows, columns)
        estimates = [e.part(_all_or(rows), _all_or(columns)) for e in _from_recovery(rounded, start)]
        held = _held(part.shape, self.seed)
        return any(
            _as_wide_as_shows(part, estimates, grid_of(grid), held, -math.log10(self.most_false_positive)) is not None
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
        rounded = as_rounded(stack)
        if not {W_i.dtype for W_i in rounded.matrices} & set(HALVES) or not all(start.ranks):
            return start
        if (start.noise_ratio or 0.0) > MOST_NOISE:
            return start
        entries, grid = StoredEntries.of(rounded), grid_of(None)
        estimates = sweep(entries, _from_recovery(rounded, start), grid)
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
    def _coarsest_first(self) -> list[torch.dtype]:
        """A bf16 base lies on the float32 grid too: the coarsest says most."""
        return sorted(self.grids, key=lambda grid: torch.finfo(grid).eps, reverse=True)

    def _fit(
        self, stack: Stack, start: Recovery | None, rank: int | None, grid: torch.dtype, scales: Sequence[DeltaScale]
    ) -> Fit | None:
        """Sweep on one grid. None where no delta shows on it."""
        entries = StoredEntries.of(stack)
        if start is not None:
            estimates: Sequence[Estimate] = _from_recovery(stack, start)
        else:
            if stack.n == 1 and scales[0].rms > MOST_STEPS * float(spacing(stack.matrices[0][::16], grid).median()):
                return None
            estimates = [Estimate.nothing(stack.shape, scale.rms**2) for scale in scales]
        return self._swept(entries, estimates, grid, rank, _known_spaces(stack, rank, scales))

    def _swept(
        self,
        entries: StoredEntries,
        estimates: Sequence[Estimate],
        grid: torch.dtype,
        rank: int | None,
        spaces: tuple[Tensor, Tensor] | None,
    ) -> Fit | None:
        widest = max(e.rank for e in estimates)
        most = max(BLOCK, BLOCK_PER_RANK * widest)
        rows, columns = (_some(size, most, self.seed) for size in entries.shape)
        part = entries if rows is None and columns is None else entries.part(rows, columns)
        chosen = [e.part(_all_or(rows), _all_or(columns)) for e in estimates]
        held = _held(part.shape, self.seed)
        if widest:
            wider = _as_wide_as_shows(part, chosen, grid_of(grid), held)
            if wider is None:
                return None
            chosen = wider
        if widest and _is_fine(chosen, part, grid):
            # Nothing is gained by sweeps.
            ratio = _log10_ratio(part, chosen, grid_of(grid), held)
            return Fit(entries, tuple(estimates), grid, -ratio, 0)
        if rows is not None or columns is not None:
            spaces = None
        fitted, sweeps = self.until_settled(part, chosen, grid_of(grid), held, rank, spaces)
        log10_ratio = _log10_ratio(part, fitted, grid_of(grid), held)
        if rows is not None:
            begun = [e.part(slice(None), _all_or(columns)) for e in estimates]
            strip = entries.part(None, columns)
            fitted = _extended(strip, begun, fitted, rows, grid_of(grid))
            if entries.n >= FEW_MODELS:
                # More directions stand over the noise in more entries.
                fitted, came = grown(strip, fitted, grid_of(grid), None, rank, self.seed)
                fitted = sweep(strip, fitted, grid_of(grid), _held(strip.shape, self.seed)) if came else fitted
        if columns is not None:
            seen = entries if rows is None else entries.part(rows, None)
            turned, begun = ([e.transposed for e in each] for each in (fitted, estimates))
            extended = _extended(seen.transposed, begun, turned, columns, grid_of(grid), _all_or(rows))
            fitted = tuple(e.transposed for e in extended)
        if entries.n >= FEW_MODELS:
            # One or two models lock onto wrong points unseen but by what is held out, so there it stays held out.
            fitted = tuple(e.within(spaces) for e in sweep(entries, fitted, grid_of(grid)))
            if part is not entries and self.patience:
                fitted, came = grown(entries, fitted, grid_of(grid), None, rank, self.seed)
                fitted = sweep(entries, fitted, grid_of(grid)) if came else fitted
        return Fit(entries, tuple(fitted), grid, -log10_ratio, sweeps)

    def until_settled(
        self,
        entries: Entries,
        estimates: Sequence[Estimate],
        grid: np.ndarray,
        held: Tensor,
        rank: int | None,
        spaces: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[tuple[Estimate, ...], int]:
        """Sweep until nothing new comes.

        Args:
            entries: The models.
            estimates: To start from.
            grid: That W lies on.
            held: Entries that are kept from the fit.
            rank: The most directions of any model.
            spaces: Orthonormal bases that hold the left and the right factors of every model.

        Returns:
            The estimates, and how many sweeps were made.
        """
        found, before = tuple(estimates), math.inf
        # Least squares is at its best before directions are taken from what it leaves.
        barren, stalls = 0, 0
        first = int(any(e.rank for e in found))
        for turn in range(self.sweeps):
            came = 0
            if turn >= first and barren < BARREN:
                found, came = grown(entries, found, grid, held, rank, self.seed)
                found = tuple(e.within(spaces) for e in found)
                barren = 0 if came else barren + 1
            if not any(e.rank for e in found):
                return found, turn
            found = tuple(e.within(spaces) for e in sweep(entries, found, grid, held))
            uncertain = sum(e.variance for e in found)
            stalls = 0 if came or uncertain < self.least_gain * before else stalls + 1
            if stalls > self.patience:
                return found, turn + 1
            before = uncertain
        return found, self.sweeps


def _known_spaces(stack: Stack, rank: int | None, scales: Sequence[DeltaScale]) -> tuple[Tensor, Tensor] | None:
    """Column and row space of `W_1 - W_2 = M_1 - M_2` where there are two models: they hold those of both."""
    if stack.n != 2 or is_coarse(stack, scales):
        return None
    rows, columns = (find_differences(s, rank, fold=False).of(0, 1) for s in (stack, stack.transposed))
    if rows.full_rank or columns.full_rank or not rows.rank or not columns.rank:
        return None
    return columns.basis.cpu().float(), rows.basis.cpu().float()


def _held(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.rand(shape, generator=seeded(seed)) < HELD


def _extended(
    entries: Entries,
    begun: Sequence[Estimate],
    estimates: Sequence[Estimate],
    rows: Tensor,
    grid: np.ndarray,
    columns: Tensor | slice = slice(None),
) -> tuple[Estimate, ...]:
    """Left factors for all rows, from those of some.

    The others start from what the fit has begun with, or from nothing, as uncertain as rows are large.

    Args:
        entries: The models, all rows and the columns that are looked at.
        begun: What the fit has begun with, all rows and columns.
        estimates: Of some rows and all columns.
        rows: Which rows.
        grid: That W lies on.
        columns: The columns that are looked at, of the estimates'.
    """
    whole = []
    for start, e in zip(begun, (e.normalised() for e in estimates), strict=True):
        left = start.left @ (start.right.mT @ e.right) / len(e.right)
        variance = torch.full((len(left),), float(e.left.square().mean()) if e.rank else 0.0)
        if start.rank:
            variance = torch.minimum(variance, WIDE * start.rows * (start.right.square().mean()))
        left[rows], variance[rows] = e.left, e.rows
        whole.append(replace(e, left=left, rows=variance))
    seen = [e.part(slice(None), columns) for e in whole]
    for every in STEPS_OUT:
        # The first steps are taken far from the answer, and promise too much: a part of the entries is enough for them.
        some = None if every == 1 else torch.arange(0, entries.shape[1], every)
        here = entries if some is None else entries.part(None, some)
        found = stepped(here, [e.part(slice(None), _all_or(some)) for e in seen], grid)
        least = [torch.maximum(new.rows, MOST_FALL * e.rows) for new, e in zip(found, seen, strict=True)]
        seen = [replace(e, left=new.left, rows=v) for e, new, v in zip(seen, found, least, strict=True)]
    return tuple(replace(e, left=new.left, rows=new.rows) for e, new in zip(whole, seen, strict=True))


def _some(size: int, most: int, seed: int) -> Tensor | None:
    """Some of so many rows or columns, in order; None is all."""
    if size <= most + most // 2:
        return None
    return torch.randperm(size, generator=seeded(seed))[:most].sort().values


def _all_or(some: Tensor | None) -> Tensor | slice:
    return slice(None) if some is None else some


def _from_recovery(stack: Stack, start: Recovery) -> tuple[Estimate, ...]:
    """Estimates from a least-squares fit.

    The noise is that of the model less the mean of the others: a fine model's `M_i` is no better known than their W. It
    is as large in all rows and columns once these are balanced.
    """
    own = stack.noise.square().cpu()
    balance = Balance.of(stack) if all_half(stack) else None
    own = balance.noise.square() if balance else own
    noise = own + (own.sum() - own) / max(1, stack.n - 1) ** 2
    if balance is None:
        return tuple(
            replace(Estimate.of(M_i, float(variance)), lack=float(variance) / 2)
            for M_i, variance in zip(start.deltas, noise, strict=True)
        )
    typical = float((-2 * (balance.rows.log().mean() + balance.columns.log().mean())).exp())
    scaled = [Estimate.of(balance.delta(M_i), float(v)) for M_i, v in zip(start.deltas, noise, strict=True)]
    return tuple(
        replace(e.scaled(1 / balance.rows, 1 / balance.columns), lack=typical * float(variance) / 2)
        for e, variance in zip(scaled, noise, strict=True)
    )


def _from_answer(stack: Stack, found: Recovery) -> tuple[Estimate, ...]:
    """Estimates from an answer's deltas; what a model differs by beside its delta and its rounding, these lack."""
    estimates = []
    for W_i, M_i, e in zip(stack.matrices, found.deltas, _from_recovery(stack, found), strict=True):
        rest = (W_i.to(found.weight) - found.weight - M_i.dense()).cpu()
        estimates.append(replace(e, lack=max(e.lack, beside_rounding(rest, W_i.cpu()))))
    return tuple(estimates)


def _log10_ratio(entries: Entries, estimates: Sequence[Estimate], grid: np.ndarray, held: Tensor) -> float:
    """How much likelier the held-out entries are with W on the grid, as a decimal logarithm.

    Were W off the grid, the ratio's expectation would be 1, so by Markov's inequality it exceeds 10^x with a
    probability of at most 10^-x: an e-value (Vovk & Wang 2021, arXiv 1912.06116), if the `M_i` are what they are
    taken for.
    """
    from detune.lattice.kernels import log_ratios

    rows, columns = held.nonzero(as_tuple=True)
    every = max(1, len(rows) // TESTED)
    rows, columns = rows[::every], columns[::every]
    ends = [np.empty((entries.n, len(rows))) for _ in range(2)]
    for start in range(0, len(rows), 1024):
        # One row of the matrix at a time would be read whole; some entries of some rows are.
        chosen = slice(start, start + 1024)
        here, inverse = rows[chosen].unique(return_inverse=True)
        low, high = entries.part(here, None).block(slice(None))
        for whole, end in zip(ends, (low, high), strict=True):
            whole[:, chosen] = end[:, inverse, columns[chosen]]
    m = torch.stack([(e.left[rows] * e.right[columns]).sum(dim=1) for e in estimates]).double().numpy()
    v = torch.stack(
        [
            e.rows[rows] * e.right[columns].square().sum(dim=1)
            + e.left[rows].square().sum(dim=1) * e.columns[columns]
            + e.lack
            for e in estimates
        ]
    ).double()
    ratios = np.empty(len(rows))
    log_ratios(ends[0], ends[1], m, v.numpy(), grid, ratios)
    return float(ratios.sum()) / math.log(10)


def _as_wide_as_shows(
    entries: Entries, estimates: Sequence[Estimate], grid: np.ndarray, held: Tensor, sign: float = SIGN
) -> list[Estimate] | None:
    """The estimates, as uncertain as they are when a grid shows best; None where none shows."""
    tries = [[e.wider(factor) for e in estimates] for factor in WIDER]
    ratios = [_log10_ratio(entries, tried, grid, held) for tried in tries]
    best = max(range(len(tries)), key=ratios.__getitem__)
    return tries[best] if ratios[best] > sign else None


def _is_fine(estimates: Sequence[Estimate], entries: StoredEntries, grid: torch.dtype) -> bool:
    """Whether the `M_i` are known so well that next to all entries have one grid point."""
    step = float(spacing(entries.matrices[0][::16], grid).median())
    return bool(max(e.variance for e in estimates) ** 0.5 < SETTLED * step)


def _answer(stack: Stack, start: Recovery | None, fit: Fit) -> Recovery:
    found = decoded(fit.entries, fit.estimates, grid_of(fit.grid))
    assert fit.grid is not None
    bits = DecodedBits(
        fit.grid, fit.log10_false_positive, found.certain.to(stack.device), found.expected, found.foreseeable
    )
    used = start is not None and start.deltas
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


def all_half(stack: Stack) -> bool:
    """Whether all models were rounded to half precision."""
    return set(stack.rounded_dtypes) <= set(HALVES)


def is_coarse(stack: Stack, scales: Sequence[DeltaScale] | None = None) -> bool:
    """Whether the models are stored so coarsely that their deltas are rounded away in most entries.

    Args:
        stack: The models.
        scales: How large each delta is; None measures it.
    """
    if stack.n < 2 or not set(stack.rounded_dtypes) & set(HALVES):
        return False
    step = max(
        float(spacing(W_i[::16], dtype).median())
        for W_i, dtype in zip(stack.matrices, stack.rounded_dtypes, strict=True)
    )
    return bool(max(scale.rms for scale in scales or delta_scales(stack)) < FINE * step)


def left_alone_in_part(stack: Stack, lattice: LatticeSearch, scales: Sequence[DeltaScale]) -> Recovery | None:
    """The matrix of a model that seems to have no delta of its own, by a fit to a few rows and columns.

    The products that show its size show what the others' deltas have in common, too; so where it is small by them, a
    fit decides: no direction of that model's, and nothing of size that is not in one. None where no model is so.
    """
    least = min(range(stack.n), key=lambda i: scales[i].at_most)
    if stack.n < FEW_MODELS or scales[least].at_most > COMMON * _typical(scales):
        return None
    entries, grid = (
        StoredEntries.of(as_rounded(stack)),
        max(stack.rounded_dtypes, key=lambda dtype: torch.finfo(dtype).eps),
    )
    rows, columns = (_some(size, SMALL_BLOCK, lattice.seed) for size in entries.shape)
    part = entries.part(rows, columns)
    estimates = [Estimate.nothing(part.shape, scale.rms**2) for scale in scales]
    quick = replace(lattice, sweeps=FEW_SWEEPS)
    found, _ = quick.until_settled(part, estimates, grid_of(grid), _held(part.shape, lattice.seed), None)
    return _left_alone(stack, found, scales)


def _left_alone(stack: Stack, found: Sequence[Estimate], scales: Sequence[DeltaScale]) -> Recovery | None:
    """The matrix of the model of which a fit has found no direction, and next to nothing that is not in one."""
    least = min(range(stack.n), key=lambda i: (found[i].rank, found[i].lack))
    others = [e for i, e in enumerate(found) if i != least]
    nothing = not found[least].rank and found[least].lack <= (NOTHING * _typical(scales)) ** 2
    if stack.n < FEW_MODELS or not nothing or not all(e.rank for e in others):
        return None
    if are_alike([e.low_rank for e in others]):
        return None
    sign = f"model {least} shows no change of its own"
    return left_alone(stack, least, sign, (COMMON * _typical(scales)) ** 2)


def are_alike(deltas: Sequence[LowRank]) -> bool:
    """Whether deltas are more alike than those of independent fine-tunes.

    Beside a copy of itself at another strength a model may pass for the base: all others then miss its delta.
    """
    return any(abs(a.correlation(b)) > MOST_ALIKE for a, b in combinations(deltas, 2))


def _typical(scales: Sequence[DeltaScale]) -> float:
    return sorted(scale.rms for scale in scales)[len(scales) // 2]


def as_rounded(stack: Stack) -> Stack:
    """The stack in the dtypes that its models were rounded to: float32 files may hold what was bf16 or fp16 before."""
    rounded = tuple(
        W_i.to(dtype) if W_i.dtype != dtype and lies_on(W_i, dtype) else W_i
        for W_i, dtype in zip(stack.matrices, stack.rounded_dtypes, strict=True)
    )
    # One model alone may have left a half-precision base as it was.
    return replace(stack, matrices=rounded) if stack.n > 1 else stack
