"""Adapters under noise: the most likely low-rank deltas, each direction held down as far as noise could have made it.

Wanted are W and `M_i = sum_j u_ij v_ij^T` that minimise

    sum_i |W_i - W - M_i|_F^2 / sigma^2  +  sum_ij |u_ij|^2 / tau_ij^2 ,      |v_ij| = 1,

where tau_ij^2, the variance of a direction's entries, is itself set to what they show, `|u_ij|^2 / out`. A direction
that noise accounts for shrinks to nothing, so no rank has to be chosen; and what several adapters have nearly in
common, which a least-squares fit would split by amplifying the noise, stays in the mean instead. Rows and columns take
turns. Each turn is one ridge regression for all models.

Reference:
    MacKay, "Bayesian non-linear modelling for the prediction competition", 1994 (automatic relevance determination);
    Bishop, "Bayesian PCA", NeurIPS 1998.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detune.fitting.least_squares import w_step
from detune.numerics.linalg import orthonormal, randomized_svd
from detune.numerics.random import seeded
from detune.problem.low_rank import LowRank, SVDFactors
from detune.problem.recovery import Recovery
from detune.problem.stack import SMALL_ENTRIES, Stack

__all__ = ["ARDFit", "fit_ard", "shrink_where_run_off"]

TURNS = 25
SMALLEST = 1e-300
# A direction whose prior weighs this much more than its data is gone.
GONE = 1e3
# Singular values of a model's own deviation are followed from this share of the noise's edge on.
FOLLOWED = 0.7
MOST = 64
# Deltas whose weakest direction stands so many times over the noise are what least squares says.
CLEAR = 8.0
# A fit that leaves more than this times the noise lacks directions: its size says nothing of those it has.
AT_NOISE = 1.05
# Energy of the deltas over that of deltas held down, from which on they have run off. Below that, holding down costs
# the weak directions that are real as much as it saves.
RAN_OFF = 1.5


@dataclass(frozen=True)
class ARDFit:
    """Deltas split off from noisy models.

    Attributes:
        weight: The mean of what is left, `(out, in)`.
        rest: What neither it nor the deltas explain, `(n, out, in)`.
        deltas: The deltas.
        cost: Akaike's criterion, `sum |rest|^2 / sigma^2 + 2 (parameters that count)`: of two splits, which to trust.
    """

    weight: Tensor
    rest: Tensor
    deltas: tuple[LowRank, ...]
    cost: float


def shrink_where_run_off(stack: Stack, recovery: Recovery) -> Recovery:
    """The recovery with its deltas held down, where least squares has taken noise for a part that all of them share.

    Adapters of one seed have row spaces that nearly coincide. What is common to all `M_i` in such a direction the data
    hardly see, and least squares gives it any size. Here it gets the size that the rest of the direction shows.

    Args:
        stack: The models, three at least; of more than a million entries a matrix they are left alone.
        recovery: What least squares made of them.

    Returns:
        The recovery itself where its deltas stand clear of the noise, where it leaves more than noise, or where they
        have not run off.
    """
    if not recovery.deltas or stack.n < 3 or stack.shape[0] * stack.shape[1] > SMALL_ENTRIES:
        return recovery
    if recovery.noise_ratio is None or recovery.noise_ratio > AT_NOISE:
        return recovery
    if all(_is_clear(stack, i, M_i) for i, M_i in enumerate(recovery.deltas)):
        return recovery
    split = fit_ard(stack, [orthonormal(M_i.right.double()) for M_i in recovery.deltas])
    if _energy(recovery.deltas) <= RAN_OFF * _energy(split.deltas):
        return recovery
    step = w_step(stack, split.deltas)
    return replace(
        recovery,
        weight=step.weight,
        method=f"{recovery.method}+relevance",
        reason=f"{recovery.reason}; then no direction larger than it shows",
        deltas=step.deltas,
        ranks=tuple(M_i.rank for M_i in step.deltas),
        relative_residual=step.relative_residual,
        noise_ratio=step.noise_ratio,
        residuals=None,
    )


def _energy(deltas: Sequence[LowRank]) -> float:
    return sum(M_i.energy for M_i in deltas)


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
    models = torch.stack([W_i.to(stack.device, torch.float64) for W_i in stack.matrices])
    mean = models.mean(dim=0)
    centred = models - mean
    right = V or [_leading(X_i, noise) for X_i in centred]
    if not any(V_i.shape[1] for V_i in right):
        nothing = [LowRank(X_i.new_zeros(len(X_i), 0), X_i.new_zeros(X_i.shape[1], 0)) for X_i in centred]
        return _split(mean, centred, nothing, noise, 0)
    prior: Sequence[Tensor] = [V_i.new_zeros(V_i.shape[1]) for V_i in right]
    if V is not None:
        # As large as each model shows them by itself: from a size that has run off the turns come back slowly.
        shown = [torch.linalg.svd(X_i @ V_i, full_matrices=False) for X_i, V_i in zip(centred, V, strict=True)]
        right = [V_i @ of_i.Vh.mT for V_i, of_i in zip(V, shown, strict=True)]
        prior = [noise**2 * len(mean) / of_i.S.square().clamp(min=SMALLEST) for of_i in shown]
    F = _regress(centred, right, prior)
    for _ in range(turns):
        left, prior = _relevant(F, stack.shape[1], noise)
        right, prior = _relevant(_regress(centred.mT, left, prior), stack.shape[0], noise)
        F = _regress(centred, right, prior)
    taken = sum(float((1 / (1 + weight)).sum()) for weight in prior) * sum(stack.shape)
    return _split(mean, centred, list(map(LowRank, F, right)), noise, taken)


def _split(mean: Tensor, centred: Tensor, deltas: Sequence[LowRank], noise: float, taken: float) -> ARDFit:
    rest = torch.stack([X_i - M_i.dense() for X_i, M_i in zip(centred, deltas, strict=True)])
    left = rest.mean(dim=0)
    rest -= left
    return ARDFit(mean + left, rest, tuple(deltas), float(rest.square().sum()) / noise**2 + 2 * taken)


def _leading(X_i: Tensor, noise: float) -> Tensor:
    """The right singular vectors of a deviation that may be more than noise, `(in, q)`."""
    edge = noise * sum(size**0.5 for size in X_i.shape)
    _, values, V = randomized_svd(X_i, min(MOST, *X_i.shape), seeded(0, X_i.device), power_passes=4)
    # The bulk itself reaches to the edge: none is followed where the first does not stand over it.
    return V[:, : int(values.gt(FOLLOWED * edge).sum()) if float(values[0]) > edge else 0]


def _regress(centred: Tensor, V: Sequence[Tensor], prior: Sequence[Tensor]) -> list[Tensor]:
    """`F_i` of `M_i = F_i V_i^T`, W eliminated: `[F_i] (I - V_i^T V_j / n + prior) = [(W_i - mean) V_i]`."""
    joint = torch.cat(list(V), dim=1)
    normal = torch.diag(1 + torch.cat(list(prior))) - joint.mT @ joint / len(V)
    projected = torch.cat([X_i @ V_i for X_i, V_i in zip(centred, V, strict=True)], dim=1)
    # Without a prior, spaces that coincide leave it singular.
    ridge = torch.eye(len(normal), dtype=normal.dtype, device=normal.device) * 1e-9
    solved = torch.linalg.solve(normal + ridge, projected.mT).mT
    return list(solved.split([V_i.shape[1] for V_i in V], dim=1))


def _relevant(F: Sequence[Tensor], entries: int, noise: float) -> tuple[list[Tensor], list[Tensor]]:
    """Orthonormal bases of factors, along principal directions that are not gone, and `sigma^2 / tau_ij^2` of each.

    Args:
        F: The factors.
        entries: Of the other side's vectors.
        noise: Its root mean square.
    """
    bases, prior = [], []
    for F_i in F:
        Q, R = torch.linalg.qr(F_i)
        left, sizes, _ = torch.linalg.svd(R)
        weights = noise**2 * entries / sizes.square().clamp(min=SMALLEST)
        kept = weights < GONE
        bases.append((Q @ left)[:, kept])
        prior.append(weights[kept])
    return bases, prior
