"""Estimates to start the fit from: those of a recovery that has deltas."""

from dataclasses import replace

from detune.lattice.estimate import Estimate
from detune.problem.delta_sizes import beside_rounding
from detune.problem.recovery import Recovery
from detune.problem.stack import Stack


def from_least_squares(stack: Stack, start: Recovery) -> tuple[Estimate, ...]:
    """Estimates from a least-squares fit.

    The noise is that of the model less the mean of the others: a fine model's `M_i` is no better known than their W. It
    is as large in all rows and columns once these are balanced.

    Args:
        stack: The models.
        start: A recovery of them that knows no grid.
    """
    own = stack.noise.square().cpu()
    own = stack.balance.noise.square() if stack.balance else own
    noise = own + (own.sum() - own) / max(1, stack.n - 1) ** 2
    if stack.balance is None:
        return tuple(
            replace(Estimate.of(M_i, float(variance)), lack=float(variance) / 2)
            for M_i, variance in zip(start.deltas, noise, strict=True)
        )
    rows, columns = stack.balance.rows, stack.balance.columns
    typical = float((-2 * (rows.log().mean() + columns.log().mean())).exp())
    scaled = [Estimate.of(M_i.scaled(rows, columns), float(v)) for M_i, v in zip(start.deltas, noise, strict=True)]
    return tuple(
        replace(e.scaled(1 / rows, 1 / columns), lack=typical * float(variance) / 2)
        for e, variance in zip(scaled, noise, strict=True)
    )


def from_some(stack: Stack, found: Recovery) -> tuple[Estimate, ...]:
    """Estimates of all models from an answer of some: what a model's delta and rounding leave of it, these lack.

    Args:
        stack: All models.
        found: The answer of some, with the deltas of all.
    """
    estimates = []
    for W_i, M_i, e in zip(stack.matrices, found.deltas, from_least_squares(stack, found), strict=True):
        rest = (W_i.to(found.weight) - found.weight - M_i.dense()).cpu()
        estimates.append(replace(e, lack=max(e.lack, beside_rounding(rest, W_i.cpu()))))
    return tuple(estimates)
