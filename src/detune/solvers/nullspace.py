"""The changes of W that the data cannot see: the null space of `A: Delta -> sum_i P_i Delta R_i`.

`P_i Delta R_i = 0` for every i. Where the row spaces are linearly independent, `Delta = sum_k X_k V_k^T + X_0 V_0^T`
with V_0 outside all of them; then `P_i X_k = 0` for all `i != k`, and `P_i X_0 = 0` for all i, so that the dimension is

    sum_k r_k dim(intersection of col(M_i), i != k) + (in - sum_k r_k) dim(intersection of all col(M_i)),

and the same with rows and columns exchanged. It is `2 r_1 r_2` for two adapters, and 0 for three or more in general
position. Where neither side is independent, zeros of the core's spectrum are counted, or estimated by probes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from detune.solvers.polish import Core

# Eigenvalues of sums of projectors below this are zeros of the arithmetic.
ZERO = 1e-11
# The spectrum of a core of so many unknowns is computed.
COUNTED = 2500
PROBES = 4
# What conjugate gradients leave of a probe above this share is in the null space.
LEFT = 1e-3
# Spaces coincide as far as anybody can tell where they are apart by no more than their noise; with it, twice that.
BLURRED = 2.0


def undetermined(core: Core, blur_U: Sequence[Tensor], blur_V: Sequence[Tensor], seed: int = 0) -> int:
    """Dimension of the null space, counting directions that all models share within the noise.

    Args:
        core: The operator, float64.
        blur_U: For each column of each `U_i` the expected square of its error, `(r_i,)`; zeros count exactly.
        blur_V: The same for `V_i`.
        seed: Of the probes, where it comes to them.
    """
    d, k = core.Q.shape[0], core.P.shape[0]
    p_U, p_V = _common(core.a, blur_U), _common(core.b, blur_V)
    if p_U or p_V:
        return p_U * k + p_V * d - p_U * p_V
    for inner, outer in ((core.b, core.a), (core.a, core.b)):
        ranks = [c_i.shape[1] for c_i in inner]
        if inner[0].shape[0] == sum(ranks):
            others = [[c_i for i, c_i in enumerate(outer) if i != j] for j in range(len(outer))]
            return sum(r * _common(rest) for r, rest in zip(ranks, others, strict=True) if rest)
    return _of_core(core, seed)


def _common(coordinates: Sequence[Tensor], blur: Sequence[Tensor] | None = None) -> int:
    """Number of directions that lie in all spaces."""
    joint = torch.cat(list(coordinates), dim=1)
    if not joint.shape[0]:
        return 0
    values, vectors = torch.linalg.eigh(joint @ joint.mT)
    apart = len(coordinates) - values
    noise = torch.zeros_like(apart)
    if blur is not None:
        noise = (vectors.mT @ joint).square() @ torch.cat(list(blur)).to(joint)
    return int(apart.le((BLURRED * noise).clamp(min=ZERO)).sum())


def _of_core(core: Core, seed: int) -> int:
    """Both sides dependent: outside the core A has no null space, or it had been found."""
    shape = core.Q.shape[1], core.P.shape[1]
    left = 0.0
    generator = torch.Generator(device=core.Q.device).manual_seed(seed)
    for _ in range(PROBES):
        probe = torch.randint(0, 2, shape, generator=generator, device=core.Q.device).to(core.Q.dtype) * 2 - 1
        solved = core.solve(probe, LEFT / 10 * probe.numel() ** 0.5)
        share = float((probe - core.apply(solved)).square().mean())
        if share <= LEFT**2:
            # A random probe has a part in every null space.
            return 0
        if shape[0] * shape[1] <= COUNTED:
            return int(torch.linalg.eigvalsh(dense_core(core)).le(ZERO * len(core.a)).sum())
        left += share / PROBES
    # What is left of a probe of random signs is its part in the null space: its mean square is the dimension's share.
    return max(1, round(left * shape[0] * shape[1]))


def dense_core(core: Core) -> Tensor:
    """A on the core as a matrix on row-major vectors, `(s_U s_V, s_U s_V)`."""
    eye_U, eye_V = (torch.eye(B.shape[1], dtype=B.dtype, device=B.device) for B in (core.Q, core.P))
    terms = [torch.kron(eye_U - a_i @ a_i.mT, eye_V - b_i @ b_i.mT) for a_i, b_i in zip(core.a, core.b, strict=True)]
    return torch.stack(terms).sum(dim=0)
