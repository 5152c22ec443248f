"""Where the base lies on no grid that shows: W is the mean of what the rounding intervals leave of it.

The mean of n rounding errors has the variance `step^2 / 12 n`; what n intervals of a step's width have in common is
`step^2 / 2 (n + 1) (n + 2)` wide in the same sense, and entries and models that are stored finely count for more.
"""

from dataclasses import replace

import torch

from detune.identifiability.error_traces import cramer_rao_mse
from detune.lattice.estimate import Estimate, from_recovery
from detune.lattice.intervals import Residual, views
from detune.lattice.message_passing import sweep
from detune.numerics.linalg import orthonormal
from detune.problem.recovery import Recovery
from detune.problem.stack import Stack

# Random signs for the trace of the error.
PROBES = 4


def between_intervals(stack: Stack, start: Recovery, seed: int) -> Recovery:
    """One sweep of the interval fit, and the posterior mean of every entry.

    Args:
        stack: The models, in the dtypes that they were rounded to.
        start: A least-squares recovery of them, with deltas.
        seed: Of the rows and columns that the sweep looks at.

    Returns:
        The recovery; `mse_reduction` says by how much it is better than least squares.
    """
    before = from_recovery(stack, start)
    assert before is not None
    estimates = sweep(stack, before, None, seed=seed)
    weight = torch.empty(stack.shape, dtype=stack.dtype, device=stack.device)
    variance, residual = 0.0, Residual()
    for view in views(stack, estimates):
        places = torch.arange(view.m[0].numel(), device=stack.device)
        found = view.posterior(places, view.variance(places), None)
        weight[view.rows] = found.weight.unflatten(0, view.m.shape[1:]).to(weight.dtype)
        variance += float(found.variance.sum())
        residual.add(stack, view, weight[view.rows])
    return replace(
        start,
        weight=weight,
        method=f"{start.method}+intervals",
        reason=f"{start.reason}; then the mean of what the models' rounding leaves of each entry",
        deltas=tuple(e.low_rank for e in estimates),
        relative_residual=residual.relative,
        noise_ratio=residual.noise_ratio,
        mse_reduction=max(0.0, 1 - variance / weight.numel() / _least_squares_mse(stack, before))
        * _bound(stack, estimates),
    )


def _bound(stack: Stack, estimates: tuple[Estimate, ...]) -> float:
    """What least squares is off by: where the adapters' spaces nearly coincide it amplifies what it leaves.

    The intervals save the same share of that: the `M_i` are fitted to what is known that much better.
    """
    U, V = (
        [orthonormal(side) for side in sides] for sides in ([e.left for e in estimates], [e.right for e in estimates])
    )
    return cramer_rao_mse(U, V, float(stack.noise.square().mean()), PROBES)


def _least_squares_mse(stack: Stack, estimates: tuple[Estimate, ...]) -> float:
    """What `mean_i (W_i - M_i)` is off by, if rounding and the errors of the `M_i` are independent."""
    uncertain = sum(
        float(e.rows[0].mean() * e.columns[1].mean() + e.rows[1].mean() * e.columns[0].mean()) for e in estimates
    )
    return (float(stack.noise.square().sum()) + uncertain) / stack.n**2
