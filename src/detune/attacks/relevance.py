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
from dataclasses import dataclass

import torch
from torch import Tensor

from detune.solvers import Stack

__all__ = ["Split", "split_off"]

TURNS = 25
# A direction whose prior weighs this much more than its data is gone.
GONE = 1e3
# Singular values of a model's own deviation are followed from this share of the noise's edge on.
FOLLOWED = 0.7
MOST = 64


@dataclass(frozen=True)
class Split:
    """Deltas split off from noisy models.

    Attributes:
        weight: The mean of what is left, `(out, in)`.
        rest: What neither it nor the deltas explain, `(n, out, in)`.
        cost: Akaike's criterion, `sum |rest|^2 / sigma^2 + 2 (parameters that count)`: of two splits, which to trust.
    """

    weight: Tensor
    rest: Tensor
    cost: float


def split_off(stack: Stack, V: Sequence[Tensor] | None = None, turns: int = TURNS) -> Split:
    """Split the adapters off.

    Args:
        stack: The models, their noise told.
        V: Orthonormal row spaces to start from, `(in, q_i)`, float64; None takes those of each model's own deviation.
        turns: How often rows and columns take turns.
    """
    noise = float(stack.noise.square().mean().sqrt())
    models = torch.stack([W_i.double() for W_i in stack.matrices])
    mean = models.mean(dim=0)
    centred = models - mean
    V = V or [_leading(X_i, noise) for X_i in centred]
    if not any(V_i.shape[1] for V_i in V):
        return _split(mean, centred, torch.zeros_like(centred), noise, 0)
    prior = [torch.zeros(V_i.shape[1], dtype=torch.float64) for V_i in V]
    for _ in range(turns):
        U, prior = _relevant(_regress(centred, V, prior), stack.shape[1], noise)
        V, prior = _relevant(_regress(centred.mT, U, prior), stack.shape[0], noise)
    F = _regress(centred, V, prior)
    deltas = torch.stack([F_i @ V_i.mT for F_i, V_i in zip(F, V, strict=True)])
    taken = sum(float((1 / (1 + weight)).sum()) for weight in prior) * sum(stack.shape)
    return _split(mean, centred, deltas, noise, taken)


def _split(mean: Tensor, centred: Tensor, deltas: Tensor, noise: float, taken: float) -> Split:
    left = deltas.mean(dim=0)
    rest = centred - deltas + left
    return Split(mean - left, rest, float(rest.square().sum()) / noise**2 + 2 * taken)


def _leading(X_i: Tensor, noise: float) -> Tensor:
    """The right singular vectors of a deviation that may be more than noise, `(in, q)`."""
    edge = noise * sum(size**0.5 for size in X_i.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, values, V = torch.svd_lowrank(X_i, q=min(MOST, *X_i.shape), niter=4)
    # The bulk itself reaches to the edge: none is followed where the first does not stand over it.
    leading: Tensor = V[:, : int(values.gt(FOLLOWED * edge).sum()) if float(values[0]) > edge else 0]
    return leading


def _regress(centred: Tensor, V: Sequence[Tensor], prior: Sequence[Tensor]) -> list[Tensor]:
    """`F_i` of `M_i = F_i V_i^T`, W eliminated: `[F_i] (I - V_i^T V_j / n + prior) = [(W_i - mean) V_i]`."""
    joint = torch.cat(list(V), dim=1)
    normal = torch.diag(1 + torch.cat(list(prior))) - joint.mT @ joint / len(V)
    projected = torch.cat([X_i @ V_i for X_i, V_i in zip(centred, V, strict=True)], dim=1)
    # Without a prior, spaces that coincide leave it singular.
    ridge = torch.eye(len(normal), dtype=normal.dtype) * 1e-9
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
        weights = noise**2 * entries / sizes.square().clamp(min=1e-300)
        kept = weights < GONE
        bases.append((Q @ left)[:, kept])
        prior.append(weights[kept])
    return bases, prior
