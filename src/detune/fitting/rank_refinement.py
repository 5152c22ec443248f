"""The rank of each model near the noise, decided by all models together.

A difference of two models hides what the two have nearly in common: with row spaces that overlap by a cosine c its
smallest singular value is down to `sqrt(1 - c)` of the adapters' own, below the noise of two models. All models
together leave more of it: what the other models would have to absorb in its place. Wanted are the ranks that minimise
the penalised misfit

    J(r) = min_{W, rank M_i = r_i} sum_i |W_i - W - M_i|^2  +  tau^2 sum_i r_i ,      tau = CLEAR * floor,

where the floor is the largest singular value of one model's storage noise: a direction is worth its place when it
explains more than noise can. For one matrix this is hard thresholding of its singular values at tau (Bunea, She &
Wegkamp 2011, arXiv 1004.2995, Section 2; Gavish & Donoho 2014, arXiv 1305.5870, for the lowest such tau).

Automatic relevance determination (`detune.fitting.ard`) proposes the directions, a few too many rather than too few.
Backward elimination then drops the weakest, one at a time, as long as the misfit's root rises by less than tau without
it (Wald's test), and fits again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from detune.fitting.ard import fit_ard
from detune.fitting.descent import ENOUGH, MOST_STEPS, Fit, centred, descend
from detune.fitting.least_squares import normal_inverse
from detune.fitting.subspaces import RowSpaces
from detune.numerics.linalg import orthonormal
from detune.problem.low_rank import SVDFactors
from detune.problem.stack import SMALL_ENTRIES, Stack
from detune.problem.storage_noise import FLOOR_RATIO, draw_rounding

# Noise alone reaches 1, and a little more where the fit bends to it. Of 120 sets of benchmarks/ranks.py all ranks are
# right in 116 at 1.1, in 119 from 1.15 to 1.4; with the weakest direction at 2 floors of 60 sets in 46 at 1.1 and 1.15,
# in 40 at 1.2 (measured: seeds from 0, 12 turns).
CLEAR = 1.15
# A start that leaves ten times the noise lacks strong directions. One frozen A for all models is such a case: ranks
# that are wrong fit it perfectly. Any number does between what missed weak directions leave, and strong ones.
BAD_START = 10.0
# Rows and columns take turns three times as often as where ranks are not asked for: the one of 80 sets of
# benchmarks/ranks.py (seeds 120 to 199) that has a rank one too high with 12 turns has the right ones with 36. Any
# number does from there on.
TURNS = 36
# Steps of a fit that only tells which direction is the next to go (any number does: 1 to 25 give the same ranks in 30
# sets of benchmarks/ranks.py).
FEW_STEPS = 2
# Fits of an elimination: for some seconds of one core at most. Where these are not enough the start is kept, or has
# fewer directions to lose (any numbers do that are enough for 60 sets of benchmarks/ranks.py).
FEWEST_FITS, MOST_WORK = 10, 2.5e9


def refine_ranks(spaces: RowSpaces, rank: int | None = None) -> RowSpaces:
    """Spaces with the ranks of least penalised misfit.

    Left as they are where the stack is large (more than a million entries a matrix: it is held in float64), where
    rounding is no coarser than the computation (float64), where the models' noise differs by more than a factor of
    two, and where the fit is far from the noise: the test would not hold.

    Args:
        spaces: Where to start.
        rank: The most that any `M_i` can have.
    """
    stack = spaces.stack
    if stack.shape[0] * stack.shape[1] > SMALL_ENTRIES or not any(V_i.shape[1] for V_i in spaces.bases):
        return spaces
    if any(W_i.dtype == torch.float64 for W_i in stack.matrices):
        return spaces
    if float(stack.noise.min()) * FLOOR_RATIO < float(stack.noise.max()):
        return spaces
    elimination = _Elimination.of(stack, spaces.bases)
    if elimination is None:
        return spaces
    best = elimination.best(rank or min(stack.shape))
    return spaces if best.ranks == elimination.start.ranks else replace(spaces, bases=best.V)


@dataclass(frozen=True)
class _Elimination:
    """Backward elimination of directions.

    Attributes:
        stack: The models, their noise as found.
        centred: `W_i - mean`, `(n, out, in)`, float64.
        floor: Largest singular value of one model's noise, were it independent of what is stored.
        start: The fit to start from.
    """

    stack: Stack
    centred: Tensor
    floor: float
    start: Fit

    @classmethod
    def of(cls, stack: Stack, V: Sequence[Tensor]) -> "_Elimination | None":
        """Measure the noise and fit the start; None where that fit is not down to the noise."""
        differences, noise = centred(stack), float(stack.noise.square().mean().sqrt())
        spectrum = drawn_spectrum(stack)
        start = descend(differences, V, noise, ENOUGH * float(spectrum[0]) ** 2)
        # Rounding on the way to the merge is in the residual too; outliers do not move the median.
        middles = [float(torch.linalg.svdvals(R_i).median()) for R_i in start.residual]
        excess = max(1.0, median(middles) / float(spectrum.median()) / (1 - 1 / stack.n) ** 0.5)
        degrees = (stack.n - 1) * stack.shape[0] * stack.shape[1]
        if excess > FLOOR_RATIO or start.misfit > (BAD_START * excess * noise) ** 2 * degrees:
            return None
        noisy = replace(stack, noise_override=tuple(excess * sigma for sigma in stack.noise.tolist()))
        return cls(noisy, differences, float(spectrum[0]) * excess, start)

    def best(self, most: int) -> Fit:
        """The fit of least penalised misfit that is found, of ranks up to `most`."""
        found = fit_ard(self.stack, turns=TURNS)
        V = [SVDFactors.of(M_i).V[:, :most] for M_i in found.deltas]
        options = [self.start]
        if _is_allowed([V_i.shape[1] for V_i in V], self.stack):
            options.append(self._eliminated(self._fit(V, FEW_STEPS), settled=False))
        if _is_allowed(self.start.ranks, self.stack):
            options.append(self._eliminated(self.start, settled=True))
        return min(options, key=self._penalised)

    def _eliminated(self, fit: Fit, settled: bool) -> Fit:
        """A fit without directions that its model's noise accounts for.

        Where a model has several, half of them go at once; else the weakest of all models goes alone.

        Args:
            fit: Where to start.
            settled: Whether it has taken all steps that it needs.
        """
        floors = self._floors(fit)
        work = self.stack.n * sum(self.stack.shape) * max(1, sum(fit.ranks)) ** 2
        for _ in range(max(FEWEST_FITS, int(MOST_WORK / work))):
            weak = [drop for drop in drop_candidates(fit, floors) if drop.strength < CLEAR]
            if weak:
                several = [drop for drop in weak if drop.count > 1]
                dropped = {drop.model: drop.rest for drop in several or [min(weak, key=lambda drop: drop.strength)]}
                fit, settled = self._fit([dropped.get(i, V_i) for i, V_i in enumerate(fit.V)], FEW_STEPS), False
            elif settled:
                break
            else:
                fit, settled = self._fit(fit.V), True
        return fit

    def _floors(self, fit: Fit) -> list[float]:
        """The largest singular value of each model's noise for such deltas, the base on the grid of the dtype.

        A delta below half a step of the grid is lost, or comes back as a pattern of its own largest entries: noise
        that depends on it, has low rank and stands over what rounding leaves elsewhere.
        """
        first = self.stack.matrices[0].to(self.stack.device, torch.float64)
        mean = torch.stack([W_i.to(first) - first for W_i in self.stack.matrices]).mean(dim=0)
        W_star = first + mean - torch.stack([M_i.dense() for M_i in fit.deltas]).mean(dim=0)
        floors = []
        for M_i, dtype in zip(fit.deltas, self.stack.rounded_dtypes, strict=True):
            exact = W_star.to(dtype).double() + M_i.dense()
            error = exact.to(dtype).double() - exact
            # Deltas so large that they overflow are no deltas: the fit has run off along what the data leave open.
            error = error.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            floors.append(max(self.floor, float(torch.linalg.matrix_norm(error, 2))))
        return floors

    def _fit(self, V: Sequence[Tensor], steps: int = MOST_STEPS) -> Fit:
        noise = float(self.stack.noise.square().mean().sqrt())
        return descend(self.centred, V, noise, ENOUGH * self.floor**2, steps)

    def _penalised(self, fit: Fit) -> float:
        """J in units of the floor's square."""
        return fit.misfit / self.floor**2 + CLEAR**2 * sum(fit.ranks)


def _is_allowed(ranks: Sequence[int], stack: Stack) -> bool:
    """Whether the conditions of the closed form hold, for any three models."""
    largest = sorted(ranks)[-3:]
    return sum(largest) <= max(stack.shape) and sum(largest[-2:]) <= min(stack.shape)


@dataclass(frozen=True)
class DropCandidate:
    """Directions of a model that explain least.

    Attributes:
        strength: By how many floors the root of the misfit rises without the weakest.
        model: The model.
        count: How many they are: half of those that are weak, one at least.
        rest: The model's row space without them, `(in, r_i - count)`.
    """

    strength: float
    model: int
    count: int
    rest: Tensor


def drop_candidates(fit: Fit, floors: Sequence[float]) -> list[DropCandidate]:
    """Find every model's weakest directions, on the side where they are weaker.

    Args:
        fit: The fit.
        floors: Largest singular value of each model's noise.
    """
    spaces = list(zip(fit.deltas, fit.U, fit.V, strict=True))
    by_row = weakest_directions(fit.V, [M_i.left @ (M_i.right.mT @ V_i) for M_i, _, V_i in spaces])
    by_column = weakest_directions(fit.U, [M_i.right @ (M_i.left.mT @ U_i) for M_i, U_i, _ in spaces])
    candidates = []
    for i in by_row:
        M_i, is_row = fit.deltas[i], by_row[i].rise <= by_column[i].rise or fit.deltas[i].rank == 1
        weakest = by_row[i] if is_row else by_column[i]
        count = max(1, int((weakest.rises < CLEAR * floors[i]).sum()) // 2)
        others = weakest.others(count)
        rest = others if is_row else orthonormal(M_i.right @ (M_i.left.mT @ others))
        candidates.append(DropCandidate(weakest.rise / floors[i], i, count, rest))
    return candidates


@dataclass(frozen=True)
class Directions:
    """The directions of one space, by what they explain.

    Attributes:
        basis: Of the space, `(in, r_i)`.
        directions: In its coordinates, the strongest first, `(r_i, r_i)`.
        rises: By how much the root of the misfit rises without each, descending.
    """

    basis: Tensor
    directions: Tensor
    rises: Tensor

    @property
    def rise(self) -> float:
        """That of the weakest."""
        return float(self.rises[-1])

    def others(self, count: int) -> Tensor:
        """Basis of the space without its weakest directions, `(in, r_i - count)`."""
        Q, _ = torch.linalg.qr(self.directions[:, -count:], mode="complete")
        others: Tensor = self.basis @ Q[:, count:]
        return others


def weakest_directions(V: Sequence[Tensor], F: Sequence[Tensor]) -> dict[int, Directions]:
    """Test every model that has a direction (Wald), from the fit `M_i = F_i V_i^T` for given spaces V.

    With N the normal matrix of all F, the singular values of `F_i (N^{-1}_ii)^{-1/2}` are by how much the misfit's root
    rises without a direction.
    """
    ranks = [V_i.shape[1] for V_i in V]
    inverse = torch.split(normal_inverse(V), ranks)
    found = {}
    for i, (F_i, V_i, rows) in enumerate(zip(F, V, inverse, strict=True)):
        if not ranks[i]:
            continue
        values, X = torch.linalg.eigh(torch.split(rows, ranks, dim=1)[i])
        root = (X * values.clamp(min=1e-12).rsqrt()) @ X.mT
        _, S, Yh = torch.linalg.svd(F_i @ root, full_matrices=False)
        found[i] = Directions(V_i, root @ Yh.mT, S)
    return found


def drawn_spectrum(stack: Stack, seed: int = 0) -> Tensor:
    """Singular values of one model's storage noise, descending, float64: of a draw with every entry's own variance.

    Bounds from variances alone (`noise_edge`) lie up to a third above it, too much to tell one direction from none.

    Args:
        stack: The models; the noise is that of the first, brought to the mean variance of all.
        seed: Seed of the draw.
    """
    deviation = stack.variance(0).sqrt().to(stack.device)
    scale = float(stack.noise.square().mean().sqrt() / stack.noise[0])
    spectrum: Tensor = torch.linalg.svdvals(draw_rounding(deviation, stack.generator(seed), scale))
    return spectrum
