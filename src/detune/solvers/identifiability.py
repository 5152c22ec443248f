"""What the data determine, and how well: the Cramér-Rao bound of the recovery problem.

With storage noise of variance `sigma^2` the maximum-likelihood W has the covariance `sigma^2 A^-1`, where A is the
operator `Delta -> sum_i P_i Delta R_i` of `detune.solvers.polish`. Its trace falls apart as A does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from detune.solvers.polish import Core


def cramer_rao_mse(U: Sequence[Tensor], V: Sequence[Tensor], variance: float, probes: int = 16, seed: int = 0) -> float:
    """The least mean squared error per entry that an unbiased recovery can have.

    Args:
        U: Orthonormal column spaces of the true `M_i`, `(out, r_i)`, float64.
        V: Orthonormal row spaces, `(in, r_i)`, float64.
        variance: Of the storage noise, per entry and model.
        probes: Random sign matrices for the trace of the core (Hutchinson 1990); the rest is exact.
        seed: Of the probes.

    Returns:
        `variance * trace(A^-1) / (out * in)`.
    """
    core = Core.of(U, V)
    (d, s_U), (k, s_V) = core.Q.shape, core.P.shape
    generator = torch.Generator(device=core.Q.device).manual_seed(seed)
    inner = 0.0
    for _ in range(probes):
        probe = torch.randint(0, 2, (s_U, s_V), generator=generator, device=core.Q.device).to(core.Q.dtype) * 2 - 1
        inner += float((probe * core.solve(probe, 1e-8 * probe.numel() ** 0.5)).sum()) / probes
    trace = (
        (d - s_U) * (k - s_V) / len(U)
        + (k - s_V) * float(core.inverse_G_U.trace())
        + (d - s_U) * float(core.inverse_G_V.trace())
        + inner
    )
    return variance * trace / (d * k)
