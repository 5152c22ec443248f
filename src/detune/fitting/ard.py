"""Adapters under noise: the most likely low-rank deltas, each direction held down as far as noise could have made it.

    W_i = W + L_i R_i^T + noise ,   a row of [L_1 ... L_n] ~ N(0, K_L) ,   a row of [R_1 ... R_n] ~ N(0, K_R) ,

where W may be anything, and the covariances are set to what the rows show (empirical Bayes). A direction that noise
accounts for shrinks to nothing, so no rank has to be chosen. On one side K joins all models, on the other it is block
by block: adapters of one seed start from one A, so their R_i are much alike, and how much is learned; their L_i are
their own. What several adapters have nearly in common, which a least-squares fit would split by amplifying the noise,
stays in the mean instead as far as the angles between the R_i may be noise.

Rows and columns take turns. Each turn is one ridge regression for all models, which takes the other side with its
uncertainty (variational Bayes). It takes a pass over the matrices.

Reference:
    MacKay, "Bayesian non-linear modelling for the prediction competition", 1994 (automatic relevance determination);
    Lim & Teh, "Variational Bayesian approach to movie rating prediction", KDD Cup 2007;
    Salakhutdinov & Mnih, "Bayesian probabilistic matrix factorization using MCMC", ICML 2008 (full covariances).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from detune.fitting.least_squares import project_left, project_right, w_step
from detune.numerics.linalg import orthonormal
from detune.problem.low_rank import LowRank, SVDFactors
from detune.problem.recovery import PredictedError, Recovery
from detune.problem.stack import SMALL_ENTRIES, Stack
from detune.problem.storage_noise import AT_NOISE, noise_edge

__all__ = ["ARDFit", "fit_ard", "shrink_where_run_off"]

# Measured on quantised merges of all-MiniLM-L6-v2 (24 and 100 steps of training, 3 and 5 models): twice as many turns
# change the W-Error by 0.03 at most. Any number does from there on.
TURNS = 12
# A turn takes four eigenvalue problems of all models' directions together. Of many directions fewer turns are taken,
# for a second or two of one core in all (any numbers do that leave some hundred directions all turns).
EIGENPROBLEMS, LEAST_TURNS, MOST_CUBES = 4, 6, 1e10
# Singular values of a model's own deviation are followed from this share of the noise's edge on: 0.6 and 0.9 come to
# the same W-Error within 0.02, 1.0 to 0.04 less (measured on these merges).
FOLLOWED = 0.8
# Test vectors for them, and passes: any numbers do that are above the directions near the noise, and above one.
MOST = 64
POWER_PASSES = 2
# Directions of an answer below this share of the noise's edge are what is left of noise: true ones end at 0.7 of it or
# more, those of noise are held down to 0.5 at most (measured on these merges).
NOTHING = 0.5
# Deltas whose weakest direction stands eight times over the noise are what least squares says: holding it down would
# take a 64th of it (derived).
CLEAR = 8.0
# Energy of the deltas over that of deltas held down, from which on they have run off. Below that, holding down costs
# the weak directions that are real as much as it saves (measured on these merges).
RAN_OFF = 1.5
# The two sides' uncertainties are taken for independent. What the adapters have in common was off by up to 1.5 times
# what they say (measured: root mean square on these merges, and random ones).
OPTIMISM = 1.5
# An error of noise alone is known to a factor of 1.4: 0.15 in log10, half of the least range of a verdict (definition).
SCATTER = 1.4


@dataclass(frozen=True)
class ARDFit:
    """Deltas split off from noisy models.

    Attributes:
        weight: The mean of what is left, `(out, in)`.
        deltas: The deltas.
        energy: `sum |rest|^2`: what neither explains.
        taken: Parameters that count.
        noise: Root mean square of the models' noise.
        common: Variance of an entry of the deltas' mean, as far as it is known.
        relative_residual: As in `Recovery`.
        noise_ratio: As there.
    """

    weight: Tensor
    deltas: tuple[LowRank, ...]
    energy: float
    taken: float
    noise: float
    common: float
    relative_residual: float
    noise_ratio: float

    @property
    def cost(self) -> float:
        """Akaike's criterion, `sum |rest|^2 / sigma^2 + 2 (parameters that count)`: of two splits, which to trust."""
        return self.energy / self.noise**2 + 2 * self.taken

    @property
    def excess(self) -> float:
        """The variance that is left over the noise's; below 1 models were rounded alike."""
        return self.energy / self.noise**2 / max(1.0, (len(self.deltas) - 1) * self.weight.numel() - self.taken)

    @property
    def expected_common(self) -> float:
        """Mean square of the deltas' mean, were they independent of each other, by how far they are apart."""
        n = len(self.deltas)
        energy = sum(M_i.energy for M_i in self.deltas)
        apart = energy - _mean(self.deltas).energy * n
        return apart / (n * (n - 1)) / self.weight.numel()

    def rest(self, stack: Stack) -> Tensor:
        """The residual of weight and deltas, `(n, out, in)`, float64."""
        split = zip(stack.matrices, self.deltas, strict=True)
        return torch.stack([W_i.double() - M_i.dense() for W_i, M_i in split]) - self.weight.double()


def shrink_where_run_off(stack: Stack, recovery: Recovery) -> Recovery:
    """The recovery with its deltas held down, where least squares has taken noise for a part that all of them share.

    Adapters of one seed have row spaces that nearly coincide. What is common to all `M_i` in such a direction the data
    hardly see, and least squares gives it any size. Here it gets the size that the rest of the direction shows.

    Where noise was told, deltas near it are always held down: directions that are in it are missing, too.

    Args:
        stack: The models, three at least; of more than a million entries a matrix they are left alone, unless their
            noise was told.
        recovery: What least squares made of them.

    Returns:
        The recovery itself where its deltas stand clear of the noise, where it leaves more than noise, or where they
        have not run off.
    """
    if not recovery.deltas or stack.n < 3 or recovery.noise_ratio is None:
        return recovery
    at_noise = recovery.noise_ratio <= AT_NOISE
    is_clear = all(_is_clear(stack, i, M_i) for i, M_i in enumerate(recovery.deltas))
    if at_noise and is_clear and any(recovery.ranks):
        return recovery
    if stack.noise_override:
        return _held_down(stack, recovery)
    if not at_noise or is_clear or stack.shape[0] * stack.shape[1] > SMALL_ENTRIES:
        return recovery
    split = fit_ard(stack, [orthonormal(M_i.right.double()) for M_i in recovery.deltas])
    if sum(M_i.energy for M_i in recovery.deltas) <= RAN_OFF * sum(M_i.energy for M_i in split.deltas):
        return recovery
    return _answer(recovery, split, "no direction larger than it shows")


def _held_down(stack: Stack, recovery: Recovery) -> Recovery:
    """The better of the fits from what least squares found and from what each model has of its own; or the mean."""
    own = fit_ard(stack)
    splits = [own]
    # Least squares that leaves more than noise lacks directions, and to start from it takes as long again.
    is_whole = (recovery.noise_ratio or 0.0) <= AT_NOISE
    if any(M_i.rank for M_i in recovery.deltas) and (is_whole or not any(M_i.rank for M_i in own.deltas)):
        splits.append(fit_ard(stack, [orthonormal(M_i.right.double()) for M_i in recovery.deltas]))
    split = min(splits, key=lambda split: split.cost)
    if not any(M_i.rank for M_i in split.deltas):
        return recovery
    averaged = split.excess * split.noise**2 / stack.n
    # What was rounded off all models alike no average brings back, and no residual shows.
    alike = max(0.0, 1 - split.excess) * split.noise**2
    if OPTIMISM**2 * split.common < split.expected_common:
        found, common = split, split.common
        said = "no direction larger than it shows"
    else:
        mean = w_step(stack, ())
        found, common = replace(split, weight=mean.weight), split.expected_common
        said = "what the adapters have in common, which is within its uncertainty, stays in the mean of the models"
    mse = averaged + alike + common
    most = SCATTER * (averaged + alike) + OPTIMISM**2 * common
    answer = _answer(recovery, found, said)
    return replace(answer, expected=PredictedError(mse, mse / SCATTER, most))


def _answer(recovery: Recovery, split: ARDFit, said: str) -> Recovery:
    return replace(
        recovery,
        weight=split.weight,
        method=f"{recovery.method}+relevance",
        reason=f"{recovery.reason}; then {said}",
        deltas=split.deltas,
        ranks=tuple(M_i.rank for M_i in split.deltas),
        relative_residual=split.relative_residual,
        noise_ratio=split.noise_ratio,
        residuals=None,
    )


def _is_clear(stack: Stack, model: int, M_i: LowRank) -> bool:
    S = SVDFactors.of(M_i).S
    return not len(S) or float(S[-1]) > CLEAR * float(stack.noise_norm(model, stack.shape[0]))


def fit_ard(stack: Stack, V: Sequence[Tensor] | None = None, turns: int = TURNS) -> ARDFit:
    """Split the adapters off.

    Args:
        stack: The models, their noise told.
        V: Orthonormal row spaces to start from, `(in, q_i)`, float64; None takes those of each model's own deviation.
        turns: How often rows and columns take turns.
    """
    noise = float(stack.noise.square().mean().sqrt())
    edges = _edges(stack)
    V = _leading(stack, edges) if V is None else V
    shown = [torch.linalg.svd(F_i.double(), full_matrices=False) for F_i in project_right(stack, V)]
    # The side on which the models are more alike is the one that K joins.
    left = [of_i.U * of_i.S for of_i in shown]
    right = [V_i @ of_i.Vh.mT * of_i.S for V_i, of_i in zip(V, shown, strict=True)]
    if _overlap(left) > _overlap(right):
        turned = _take_turns(stack.transposed, [of_i.U for of_i in shown], noise, turns)
        found = turned._replace(deltas=tuple(M_i.transposed for M_i in turned.deltas))
    else:
        found = _take_turns(stack, V, noise, turns)
    step = w_step(stack, [_above(M_i, NOTHING * edge) for M_i, edge in zip(found.deltas, edges, strict=True)])
    of_step = step.energy, found.taken, noise, found.common, step.relative_residual, step.noise_ratio
    return ARDFit(step.weight, step.deltas, *of_step)


@dataclass(frozen=True)
class _Side:
    """The factors of all models on one side.

    Attributes:
        factors: `(size, sum q_i)`.
        covariance: What is open in a row of them, `(sum q_i, sum q_i)`.
        prior: What a row is drawn from, likewise.
        taken: How many numbers of a row the data decide.
    """

    factors: Tensor
    covariance: Tensor
    prior: Tensor
    taken: float = 0.0

    @property
    def squares(self) -> Tensor:
        """Expected products of a row's numbers, `(sum q_i, sum q_i)`."""
        return self.factors.mT @ self.factors / len(self.factors) + self.covariance

    def updated(self, projected: Sequence[Tensor], other: "_Side", noise: float, between: Tensor) -> "_Side":
        """One ridge regression for all rows, W eliminated, and the covariance that they then show.

        Args:
            projected: `(W_i - mean)` times the other side's factors, for each model.
            other: The other side.
            noise: Its root mean square.
            between: `1 - 1/n` where two columns are of one model, `-1/n` elsewhere.
        """
        values, vectors = torch.linalg.eigh(self.prior)
        half = vectors * values.clamp(min=0).sqrt()
        # In coordinates whose prior is the identity.
        normal = half.mT @ (other.squares * between) @ half * (len(other.factors) / noise**2)
        seen, directions = torch.linalg.eigh(normal)
        root = half @ directions
        covariance = (root / (1 + seen.clamp(min=0))) @ root.mT
        factors = torch.cat(list(projected), dim=1).double() @ covariance / noise**2
        found = _Side(factors, covariance, self.prior, float((seen / (1 + seen)).sum()))
        return replace(found, prior=found.squares)


class _Turns(NamedTuple):
    """The result of taking turns; see `ARDFit`."""

    deltas: tuple[LowRank, ...]
    taken: float
    common: float


def _take_turns(stack: Stack, V: Sequence[Tensor], noise: float, turns: int) -> _Turns:
    """Fit with a covariance that joins the models on the right, and is block by block on the left."""
    ranks, (out, columns) = [V_i.shape[1] for V_i in V], stack.shape
    model = torch.repeat_interleave(torch.tensor(ranks, device=V[0].device))
    same = (model[:, None] == model).double()
    between = same - 1 / stack.n
    # As large as each model shows them by itself: from a size that has run off the turns come back slowly.
    shown = torch.cat(project_right(stack, V), dim=1).double().square().mean(dim=0) / columns
    nothing = torch.zeros_like(same)
    turns = max(LEAST_TURNS, min(turns, int(MOST_CUBES / (EIGENPROBLEMS * max(1, len(model)) ** 3))))
    left = _Side(shown.new_zeros(out, len(model)), nothing, torch.diag(shown * stack.n / (stack.n - 1)))
    right = _Side(torch.cat(list(V), dim=1).double() * columns**0.5, nothing, nothing)
    right = replace(right, prior=right.squares)
    for _ in range(turns):
        left = left.updated(project_right(stack, right.factors.split(ranks, dim=1)), right, noise, between)
        left = replace(left, prior=left.prior * same)
        onto_left = project_left(stack, left.factors.split(ranks, dim=1))
        right = right.updated([E_i.mT for E_i in onto_left], left, noise, between)
    deltas = map(LowRank, *(side.factors.split(ranks, dim=1) for side in (left, right)))
    open_left, open_right = right.squares * left.covariance, (left.squares - left.covariance) * right.covariance
    common = float(open_left.sum() + open_right.sum()) / stack.n**2
    return _Turns(tuple(deltas), out * left.taken + columns * right.taken, common)


def _edges(stack: Stack) -> list[float]:
    """The edge of the noise in each model's deviation from the mean, brought to the size of one model's noise.

    Where models are quantised differently, the deviation of a fine one has a part of the noise of a coarse one.
    """
    n, variances = stack.n, stack.noise.square()
    deviations = ((1 - 2 / n) * variances + variances.mean() / n) * n / (n - 1)
    return [noise_edge(stack.shape, float(variance)) for variance in deviations]


def _leading(stack: Stack, edges: Sequence[float]) -> list[Tensor]:
    """The row spaces of what may be more than noise in each model's own deviation, `(in, q_i)`, float64."""
    drawn = stack.gaussian(stack.generator(0), stack.shape[1], min(MOST, *stack.shape))
    V = [drawn.double()] * stack.n
    for _ in range(POWER_PASSES):
        U = [orthonormal(F_i.double()) for F_i in project_right(stack, V)]
        V = [orthonormal(E_i.mT.double()) for E_i in project_left(stack, U)]
    leading = []
    for V_i, F_i, edge in zip(V, project_right(stack, V), edges, strict=True):
        _, S, Vh = torch.linalg.svd(F_i.double(), full_matrices=False)
        # The bulk itself reaches to the edge: none is followed where the first does not stand over it.
        count = int(S.gt(FOLLOWED * edge).sum()) if float(S[0]) > edge else 0
        leading.append(V_i @ Vh.mT[:, :count])
    return leading


def _overlap(spaces: Sequence[Tensor]) -> float:
    """How much weighted spaces have in common."""
    return sum(float((one.mT @ other).square().sum()) for one, other in combinations(spaces, 2))


def _above(M_i: LowRank, least: float) -> LowRank:
    """The part of a matrix whose singular values are larger."""
    found = SVDFactors.of(M_i)
    kept = found.S.gt(least)
    return LowRank(found.U[:, kept] * found.S[kept], found.V[:, kept])


def _mean(deltas: Sequence[LowRank]) -> LowRank:
    left = torch.cat([M_i.left for M_i in deltas], dim=1)
    return LowRank(left / len(deltas), torch.cat([M_i.right for M_i in deltas], dim=1))
