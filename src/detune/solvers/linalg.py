"""Small dense factorisations of tall matrices."""

from collections.abc import Sequence

import torch
from torch import Tensor


def orthonormal(tall: Tensor) -> Tensor:
    """An orthonormal basis of the column span, same shape and dtype."""
    Q = _cholesky_qr(tall)
    if Q is None:
        Q = torch.linalg.qr(tall)[0]
    return Q.to(tall.dtype)


def _cholesky_qr(tall: Tensor) -> Tensor | None:
    """The same in float64, several times faster than by Householder reflections; None where it would be inexact.

    The error of Cholesky QR grows with the square of the condition number, so it is done again (then it is as
    orthogonal as any: Yamamoto et al. 2015, doi 10.1553/etna_vol44s306) unless that is small.
    """
    Q = tall.double()
    for _ in range(2):
        L, failed = torch.linalg.cholesky_ex(Q.mT @ Q)
        diagonal = L.diagonal()
        spread = float(diagonal.min() / diagonal.max()) if diagonal.numel() else 1.0
        if failed or not spread > 1e-5:
            return None
        Q = torch.linalg.solve_triangular(L, Q.mT, upper=False).mT
        if spread > 0.1:
            break
    return Q


def thin_svd(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`U, S, V` in float64 of a tall matrix, exact to the precision of its own dtype."""
    if tall.dtype == torch.float64:
        Q, R = torch.linalg.qr(tall)
        U, S, Vh = torch.linalg.svd(R)
        return Q @ U, S, Vh.mT
    # The Gram matrix halves the digits: half of float64's are as many as float32 has.
    tall = tall.double()
    V = torch.linalg.eigh(tall.mT @ tall)[1].flip(1)
    U = tall @ V
    S = torch.linalg.vector_norm(U, dim=0)
    return U / S.clamp(min=torch.finfo(S.dtype).tiny), S, V


def joint_basis(bases: Sequence[Tensor]) -> Tensor:
    """Orthonormal basis of the sum of spaces; directions that coincide to about 1e-6 are counted once.

    Args:
        bases: Orthonormal columns, `(rows, r_i)`.
    """
    joint = torch.cat(list(bases), dim=1)
    Q = _cholesky_qr(joint)
    if Q is None:
        exact = joint.double()
        values, vectors = torch.linalg.eigh(exact.mT @ exact)
        keep = values.gt(1e-12)
        Q = orthonormal(exact @ (vectors[:, keep] / values[keep].sqrt()))
    return Q.to(joint.dtype)
