"""What storing an answer does to its error.

Rounding to a dtype adds `ulp^2 / 12` where the base lies anywhere between the dtype's numbers. But a base was mostly
stored in that dtype itself: then an answer closer than half a unit in the last place becomes the base's own number.
"""

import torch
from torch import Tensor

from detune.solvers.base import Recovery
from detune.solvers.lattice.grid import spacing
from detune.solvers.polish import Core

# Enough entries to know the average of what rounding does.
SAMPLED = 1 << 14
DRAWS = 4
# Standard errors by which the answer must be closer to the dtype's numbers than by chance.
SURE = 6.0


def rounded_mse(
    recovery: Recovery, core: Core, stored: torch.dtype, mse: float, averaged: float, seed: int = 0
) -> float:
    """The mean squared error per entry that an answer has once its weight is stored.

    Args:
        recovery: The answer, with a delta for each model.
        core: The operator at its spaces.
        stored: The dtype to round to.
        mse: The error of the weight as it is, per entry.
        averaged: The part of it that is the mean of the n models' rounding errors in that very entry; the rest comes
            from everywhere, is normal, and larger where the spaces have large entries.
        seed: Of the sampled entries and of the draws.
    """
    generator = torch.Generator(device=recovery.weight.device).manual_seed(seed)
    rows, columns = _entries(recovery.weight, generator)
    weight = recovery.weight[rows, columns]
    ulp = spacing(weight, stored)
    if not _on_grid(recovery, rows, columns, stored):
        return mse + float(ulp.square().mean()) / 12
    n = len(recovery.deltas)
    uniform = torch.rand((DRAWS, n, len(weight)), generator=generator, dtype=ulp.dtype, device=ulp.device).sub_(0.5)
    # As much as `averaged`, spread over the entries as rounding errors are.
    local = uniform.mean(dim=1) * ulp * (averaged * 12 * n / float(ulp.square().mean())) ** 0.5
    normal = torch.randn(local.shape, generator=generator, dtype=ulp.dtype, device=ulp.device)
    error = local + normal * (max(0.0, mse - averaged) * _leverage(core, rows, columns)).sqrt()
    return float((torch.round(error / ulp) * ulp).square().mean())


def _leverage(core: Core, rows: Tensor, columns: Tensor) -> Tensor:
    """How the error that comes from everywhere is spread over entries, mean 1: the diagonal of A^-1 less 1/n.

    On the core A is taken for the Kronecker product that preconditions it.
    """
    n = len(core.a)
    Q, P = core.Q[rows], core.P[columns]
    u, v = ((basis @ inverse * basis).sum(dim=1) for basis, inverse in ((Q, core.inverse_G_U), (P, core.inverse_G_V)))
    q, p = Q.square().sum(dim=1), P.square().sum(dim=1)
    diagonal = ((1 - q) * (1 - p) - 1) / n + u * (1 - p) + (1 - q) * v + n * u * v
    spread = diagonal.clamp(min=0)
    return spread / spread.mean().clamp(min=torch.finfo(spread.dtype).tiny)


def _entries(weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows and columns of different entries: all of a small matrix, some of a large one."""
    step = max(1, weight.numel() // SAMPLED)
    starts = torch.arange(0, weight.numel() - step + 1, step, device=weight.device)
    places = starts + torch.randint(step, starts.shape, generator=generator, device=weight.device)
    return places // weight.shape[1], places % weight.shape[1]


def _on_grid(recovery: Recovery, rows: Tensor, columns: Tensor, stored: torch.dtype) -> bool:
    """Whether the base was a number of the dtype that its estimate will be stored in.

    The distance to the nearest such number, in units in the last place, has the mean square 1/12 and the variance 1/180
    for a base anywhere; it is less where the base is such a number and the estimate's error is below half a unit. That
    holds where the models differ by more than a unit: elsewhere all may round alike, and their mean is near a number
    of the dtype wherever the base is. An estimate in the dtype itself says nothing; then the base is taken to have been
    stored in it too.
    """
    weight = recovery.weight[rows, columns]
    if torch.finfo(weight.dtype).eps >= torch.finfo(stored).eps:
        return True
    ulp = spacing(weight, stored)
    entries = torch.stack(
        [(M_i.left[rows].double() * M_i.right[columns].double()).sum(dim=1) for M_i in recovery.deltas]
    )
    telling = entries.abs().amin(dim=0) > ulp
    distances = ((weight.to(stored).double() - weight.double()) / ulp)[telling].square()
    return bool(telling.any()) and float(distances.mean()) < 1 / 12 - SURE * (180 * distances.numel()) ** -0.5
