"""Which rank each model has, decided by all models together.

A difference of two models hides what the two have nearly in common: with row spaces that overlap by a cosine c its
smallest singular value is down to `sqrt(1 - c)` of the adapters' own, below the noise of two models. All models
together leave more of it: what the other models would have to absorb in its place. So the ranks that the differences
give are only where to start. Wanted are the ranks that minimise the penalised misfit

    J(r) = min_{W, rank M_i = r_i} sum_i |W_i - W - M_i|^2  +  tau^2 sum_i r_i ,      tau = CLEAR * floor,

where the floor is the largest singular value of one model's storage noise: a direction is worth its place when it
explains more than noise can. For one matrix this is hard thresholding of its singular values at tau (Bunea, She &
Wegkamp 2011, arXiv 1004.2995, Section 2; Gavish & Donoho 2014, arXiv 1305.5870, for the lowest such tau).

What to try is proposed by the tests of `detune.ranks.score_tests`. Several models can claim one missing direction
almost equally well, and the greedy choice is then sometimes wrong. So at the end all directions that are not far above
tau are taken out at once and put back one at a time, the best by the misfit itself first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from detune.fitting.descent import ENOUGH, Fit, centred, descend
from detune.fitting.differences import find_differences
from detune.fitting.subspaces import RowSpaces, intersect
from detune.problem.stack import SMALL_ENTRIES, Stack
from detune.ranks.score_tests import (
    AddCandidate,
    DropCandidate,
    add_candidates,
    add_directions,
    drop_candidates,
    drop_directions,
    reassign_shared_direction,
    strongest_by_model,
    whitened_residuals,
)

# Noise alone reaches 1, and a little more where the fit bends to it.
CLEAR = 1.1
# For a model that has none so far: models of a set that left a matrix alone are rare.
FIRST = 1.05
# A direction that only a fit with the lowest floors has is real from so many of its own floors on.
SURE = 1.3
# Directions up to this many floors are taken out and put back at the end; a little more in each round.
DOUBTFUL = 1.9
MORE_DOUBTFUL = 0.25
ROUNDS = 4
# From this round on, twice.
DEEPER = 2
# Claims of at least this share of the strongest are granted together.
STRONG = 0.5
# Where a search from the differences as they are ends in doubt, they are cut at these multiples of the noise too.
OTHER_SIGNALS = (1.0, 1.5, 2.0, 2.5, 3.5)
# So far from tau, one model's direction may still be another's; only so many are tried.
EXCHANGED = 2.6
# With more models than this, what belongs to whom is seldom in doubt: only what is close to tau is.
FEW_MODELS = 4
MOST_EXCHANGED = 4
# The tests are linear and the fit is not: at the end, claims from here on are tried too.
NEARLY = 0.8
# A smaller gain, in floors squared, is no gain: the fits are not exact.
WORTHWHILE = 0.01
# Noise of this many times what storage explains is not noise: the fit is wrong, and no test built on it says anything.
BAD_FIT = 4.0
# Nor does it where strong directions are missing. One frozen A for all models is such a case: ranks that are wrong fit
# it perfectly, and a search would find them.
BAD_START = 10.0
# Models whose noise differs by more than this are not weighed as they should be.
UNEQUAL_NOISE = 2.0


def select_ranks(spaces: RowSpaces, rank: int | None = None) -> RowSpaces:
    """Spaces with the ranks of least penalised misfit.

    Left as they are where the stack is large (more than a million entries a matrix: it is held in float64), where
    rounding is no coarser than the computation (float64), where the models' noise differs by more than a factor of
    two, and where the fit is far from the noise: the tests would not hold.

    Args:
        spaces: Where to start.
        rank: The most that any `M_i` can have.
    """
    stack = spaces.stack
    if stack.shape[0] * stack.shape[1] > SMALL_ENTRIES or not any(V_i.shape[1] for V_i in spaces.bases):
        return spaces
    if any(W_i.dtype == torch.float64 for W_i in stack.matrices):
        return spaces
    if float(stack.noise.min()) * UNEQUAL_NOISE < float(stack.noise.max()):
        return spaces
    search = _Search.of(stack, spaces.bases, rank or min(stack.shape))
    if search is None:
        return spaces
    best = search.best()
    return spaces if best.ranks == search.start.ranks else replace(spaces, bases=best.V)


@dataclass(frozen=True)
class _Search:
    """A local search over ranks.

    Attributes:
        stack: The models.
        centred: `W_i - mean`, `(n, out, in)`, float64.
        noise: Root mean square of the storage noise.
        floor: Largest singular value of one model's noise, were it independent of what is stored.
        floors: Largest singular value of each model's noise.
        most: The most that any `M_i` can have.
        start: The fit to start from.
    """

    stack: Stack
    centred: Tensor
    noise: float
    floor: float
    floors: tuple[float, ...]
    most: int
    start: Fit

    @classmethod
    def of(cls, stack: Stack, V: Sequence[Tensor], most: int) -> "_Search | None":
        """Measure the noise and fit the start; None where that fit is not down to the noise."""
        differences = centred(stack)
        noise = float(stack.noise.square().mean().sqrt())
        spectrum = noise_spectrum(stack)
        floor = float(spectrum[0])
        start = descend(differences, V, noise, ENOUGH * floor**2)
        # Rounding on the way to the merge is in the residual too; outliers do not move the median.
        middles = [float(torch.linalg.svdvals(Z).median()) for Z in whitened_residuals(start)]
        excess = max(1.0, median(middles) / float(spectrum.median()))
        degrees = (stack.n - 1) * stack.shape[0] * stack.shape[1]
        if excess > BAD_FIT or start.misfit > (BAD_START * excess * noise) ** 2 * degrees:
            return None
        return cls(stack, differences, noise, floor * excess, (floor * excess,) * stack.n, most, start)

    def best(self) -> Fit:
        """The best ranks found."""
        first = self._grow(self.start)
        search = replace(self, floors=self._rounding(first))
        fit = search._cleared(search._best(search._cleared(search._grow(self.start))))
        # Higher floors hide directions before they are fitted: the first fit may have some that stand well over them.
        fit = min(fit, search._cleared(first, SURE), key=self._penalised)
        return self._without_patterns(fit)

    def _cleared(self, fit: Fit, least: float = 1.0) -> Fit:
        """Without what stands over its own model's noise by less, although it lowers the misfit."""
        while below := self._doubtful(fit, least):
            fit = self._fit(drop_directions(fit, below[:1]))
        return fit

    def _without_patterns(self, fit: Fit) -> Fit:
        """Without directions that are a pattern of rounding, see `_errors`.

        A fit that took a pattern for a direction is rounded to less of it. So patterns are foreseen from what is beyond
        doubt, and taken off: a direction that is then gone was none.
        """
        sure = fit
        while doubtful := self._doubtful(sure, DOUBTFUL):
            sure = self._fit(drop_directions(sure, doubtful))
        patterns = torch.stack([_above(error, self.floor) for error in self._errors(sure)])
        if not bool(patterns.any()):
            return fit
        search = replace(self, centred=self.centred - patterns + patterns.mean(dim=0))
        cleared = search._cleared(search._fit(fit.V), CLEAR)
        return fit if cleared.ranks == fit.ranks else self._fit(cleared.V)

    def _rounding(self, fit: Fit) -> tuple[float, ...]:
        """Each model's floor for such deltas."""
        return tuple(max(self.floor, float(torch.linalg.matrix_norm(error, 2))) for error in self._errors(fit))

    def _errors(self, fit: Fit) -> list[Tensor]:
        """What rounding does to such deltas, the base on the grid of the dtype, `(out, in)` each.

        A delta below half a step of the grid is lost, or comes back as a pattern of its own largest entries: noise
        that depends on it, has low rank and stands over what rounding leaves elsewhere.
        """
        first = self.stack.matrices[0].to(self.stack.device, torch.float64)
        mean = torch.stack([W_i.to(first) - first for W_i in self.stack.matrices]).mean(dim=0)
        W_star = first + mean - torch.stack([M_i.dense() for M_i in fit.deltas]).mean(dim=0)
        errors = []
        for M_i, dtype in zip(fit.deltas, self.stack.rounded_dtypes, strict=True):
            exact = W_star.to(dtype).double() + M_i.dense()
            error = exact.to(dtype).double() - exact
            # Deltas so large that they overflow are no deltas: the fit has run off along what the data leave open.
            errors.append(error.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
        return errors

    def _best(self, fit: Fit) -> Fit:
        """The best ranks from a fit."""
        unsure = EXCHANGED if self.stack.n <= FEW_MODELS else DOUBTFUL
        if self._doubtful(fit, unsure):
            fit = self._searched(fit, unsure)
        while (better := self._reassigned(fit)) is not None:
            fit = better
        return fit

    def _searched(self, fit: Fit, unsure: float) -> Fit:
        """The best ranks from a fit of which some directions are in doubt."""
        fit = min([fit, *map(self._grow, self._other_starts())], key=self._penalised)
        for round_ in range(ROUNDS):
            doubtful = self._doubtful(fit, DOUBTFUL + MORE_DOUBTFUL * round_)
            if not doubtful:
                break
            fewer = self._fit(drop_directions(fit, doubtful))
            if round_ >= DEEPER:
                fewer = self._fit(drop_directions(fewer, self._doubtful(fewer, DOUBTFUL)))
            again = self._grow(fewer, careful=True)
            if self._penalised(again) < self._penalised(fit):
                fit = again
            elif round_ >= DEEPER:
                break
        while (better := self._exchanged(fit, unsure)) is not None:
            fit = self._grow(better)
        return fit

    def _other_starts(self) -> Iterator[Fit]:
        """What the differences give when they are cut elsewhere: the search may end elsewhere."""
        for signal in OTHER_SIGNALS:
            differences = find_differences(self.stack, signal=signal, fold=False)
            ranks = tuple(min(r, self.most) for r in differences.ranks)
            if any(ranks) and self._allowed(ranks):
                yield self._fit(intersect(differences, ranks).bases)

    def _allowed(self, ranks: Sequence[int]) -> bool:
        """The conditions of the closed form, for any three models."""
        largest = sorted(ranks)[-3:]
        shape = self.stack.shape
        return largest[-1] <= self.most and sum(largest) <= max(shape) and sum(largest[-2:]) <= min(shape)

    def _grow(self, fit: Fit, careful: bool = False) -> Fit:
        """Add and drop directions as long as that lowers the penalised misfit.

        Careful takes the best of all that is proposed, not the first that is better.
        """
        while True:
            better = None
            for V in self._moves(fit, careful):
                moved = self._fit_allowed(V)
                if moved and self._penalised(moved) < self._penalised(better or fit) - WORTHWHILE:
                    better = moved
                    if not careful:
                        break
            if better is None:
                return fit
            fit = better

    def _moves(self, fit: Fit, careful: bool) -> Iterator[list[Tensor]]:
        """Row spaces to try next, the most promising first."""
        claims = add_candidates(fit, self.floors, CLEAR, NEARLY)
        together: list[AddCandidate] = []
        for claim in claims:
            if claim.strength >= STRONG * claims[0].strength and not any(map(claim.same_as, together)):
                together.append(claim)
        if len(together) > 1 and not careful:
            yield add_directions(fit, together)
        for claim in strongest_by_model(claims)[:3]:
            yield add_directions(fit, [claim])
        for doubt in drop_candidates(fit, self.floors)[:2]:
            if doubt.strength < DOUBTFUL:
                yield drop_directions(fit, [doubt])

    def _exchanged(self, fit: Fit, unsure: float) -> Fit | None:
        """A better fit with a weak claim granted or a doubtful direction given to another model; None without one."""
        for claim in strongest_by_model(add_candidates(fit, self.floors, NEARLY, NEARLY))[:3]:
            moved = self._fit_allowed(add_directions(fit, [claim]))
            if moved and self._penalised(moved) < self._penalised(fit) - WORTHWHILE:
                return moved
        for doubt in self._doubtful(fit, unsure)[:MOST_EXCHANGED]:
            fewer = self._fit(drop_directions(fit, [doubt]))
            claims = [
                claim for claim in add_candidates(fewer, self.floors, NEARLY, NEARLY) if claim.model != doubt.model
            ]
            for claim in strongest_by_model(claims)[:3]:
                moved = self._fit_allowed(add_directions(fewer, [claim]))
                if moved and self._penalised(moved) < self._penalised(fit) - WORTHWHILE:
                    return moved
        return None

    def _reassigned(self, fit: Fit) -> Fit | None:
        """A better fit after what all models but one share is given to that one; None without one.

        No step of one direction leads there: one out of four models and into the fifth, for instance.
        """
        for V in reassign_shared_direction(fit):
            moved = self._fit_allowed(V)
            moved = moved and self._cleared(self._grow(moved))
            if moved and self._penalised(moved) < self._penalised(fit) - WORTHWHILE:
                return moved
        return None

    def _fit(self, V: Sequence[Tensor]) -> Fit:
        return descend(self.centred, V, self.noise, ENOUGH * self.floor**2)

    def _fit_allowed(self, V: Sequence[Tensor]) -> Fit | None:
        return self._fit(V) if self._allowed([V_i.shape[1] for V_i in V]) else None

    def _penalised(self, fit: Fit) -> float:
        """J in units of the floor's square; that a model changed something costs a little less than how much."""
        changed = sum(rank > 0 for rank in fit.ranks)
        return fit.misfit / self.floor**2 + CLEAR**2 * (sum(fit.ranks) - changed) + FIRST**2 * changed

    def _doubtful(self, fit: Fit, below: float) -> list[DropCandidate]:
        """The weakest directions of fewer floors than that."""
        return [doubt for doubt in drop_candidates(fit, self.floors) if doubt.strength < below]


def _above(error: Tensor, floor: float) -> Tensor:
    """The part of an error that stands clear of the floor."""
    U, S, Vh = torch.linalg.svd(error, full_matrices=False)
    clear = S.gt(CLEAR * floor)
    part: Tensor = (U[:, clear] * S[clear]) @ Vh[clear]
    return part


def noise_spectrum(stack: Stack, seed: int = 0) -> Tensor:
    """Singular values of one model's storage noise, descending, float64: of a draw with every entry's own variance.

    Bounds from variances alone (`Stack.noise_norm`) lie up to a third above it, too much to tell one direction from
    none.

    Args:
        stack: The models; the noise is that of the first, brought to the mean variance of all.
        seed: Of the draw.
    """
    deviation = stack.variance(0).sqrt().to(stack.device)
    generator = stack.generator(seed)
    uniform = torch.rand(deviation.shape, generator=generator, dtype=torch.float64, device=stack.device) - 0.5
    scale = float(stack.noise.square().mean().sqrt() / stack.noise[0])
    spectrum: Tensor = torch.linalg.svdvals(uniform * deviation * (12**0.5 * scale))
    return spectrum
