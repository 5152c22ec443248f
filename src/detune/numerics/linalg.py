"""Products, and small dense factorisations of tall matrices."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# oneDNN's float32 product: torch has no public name for it, and some builds have it not. MKL, which `A @ B` calls, uses
# half of the vector width on processors that are not Intel's, and takes more than twice as long.
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
# oneDNN is called from 2^21 multiplications on (measured on one thread, square matrices of 32 to 406 rows: as fast as
# MKL at 2^20, and about twice as fast from 2^21 on).
_LARGE = 1 << 21
# Spaces are far from each other where no pivot of their bases' Gram matrix is smaller; each is at most 1. Rounding is
# then enlarged about tenfold at most (derived).
_FAR = 0.1
# Squares of singular values of 1e-4 of the largest or more are about as exact in float32 as half
# precision stores numbers (derived: 6e-8 / 1e-4 is about 2^-11).
_CLOSE = 1e-4
# The smallest pivot over the largest down to which Cholesky QR in a dtype, done twice, is exact for it: the condition
# number may be up to the root of the precision's inverse (Yamamoto et al. 2015, doi 10.1553/etna_vol44s306), less room.
_LEAST_SPREAD = {torch.float32: 1e-2, torch.float64: 1e-5}
# Normal equations with a smaller pivot are solved by a pseudo-inverse: above it eight of float64's 16 digits are lost
# at most, as pivots are roots (derived).
_LEAST_PIVOT = 1e-4


def product(A: Tensor, B: Tensor) -> Tensor:
    """`A B`, by oneDNN where that is faster: large float32 matrices on a CPU.

    Args:
        A: `(rows, inner)`.
        B: `(inner, columns)`, of the same dtype.
    """
    multiplications = A.shape[0] * B.numel()
    if _ONEDNN is None or A.dtype != torch.float32 or A.device.type != "cpu" or multiplications < _LARGE:
        return A @ B
    # oneDNN copies the first factor if it does not lie row by row.
    if A.stride(1) > A.stride(0) and A.numel() > B.numel():
        turned: Tensor = _ONEDNN(B.mT, _without_gaps(A), None, "none", [], "")
        return turned.mT
    result: Tensor = _ONEDNN(A, _without_gaps(B).mT, None, "none", [], "")
    return result


def _without_gaps(matrix: Tensor) -> Tensor:
    """Copy a part of a wider matrix: oneDNN takes a thousand times as long with gaps between its rows."""
    return matrix if matrix.is_contiguous() or matrix.mT.is_contiguous() else matrix.contiguous()


def weighted_sum(matrices: Tensor, weight: float) -> Tensor:
    """`weight * sum_i X_i`, as a product: half the time of a sum over the first dimension.

    Args:
        matrices: `(n, rows, columns)`, row by row.
        weight: One for all.
    """
    total = matrices.new_full((1, len(matrices)), weight) @ matrices.flatten(1)
    return total.view(matrices.shape[1:])


class QR(NamedTuple):
    """`Q R` of a tall matrix, Q orthonormal."""

    Q: Tensor
    R: Tensor


def orthonormal(tall: Tensor) -> Tensor:
    """An orthonormal basis of the column span, same shape and dtype."""
    return qr(tall).Q


def qr(tall: Tensor) -> QR:
    """`tall = Q R`, both of its width; R is any square matrix, float64.

    Exact to the precision of its dtype, which Q has. Products are in float32 where that loses nothing: much quicker.
    """
    found = _cholesky_qr(tall)
    if found is None:
        exact = tall.double()
        found = _cholesky_qr(exact) or QR(*torch.linalg.qr(exact))
    return QR(found.Q.to(tall.dtype), found.R)


def _cholesky_qr(tall: Tensor) -> QR | None:
    """Cholesky QR, several times faster than Householder reflections; None where it would be inexact.

    The error of Cholesky QR grows with the square of the condition number, so it is done again (then it is as
    orthogonal as any: Yamamoto et al. 2015, doi 10.1553/etna_vol44s306) unless that is small.
    """
    Q, R = tall, None
    for _ in range(2):
        L, failed = torch.linalg.cholesky_ex(gram(Q))
        diagonal = L.diagonal()
        spread = float(diagonal.min() / diagonal.max()) if diagonal.numel() else 1.0
        if failed or not spread > _LEAST_SPREAD[tall.dtype]:
            return None
        Q = _divided(Q, L)
        R = L.mT if R is None else L.mT @ R
        if spread > 0.1:
            break
    assert R is not None
    return QR(Q, R)


def _divided(tall: Tensor, L: Tensor) -> Tensor:
    """`X L^-T` in the dtype of X, for a triangular L in float64."""
    if tall.dtype == torch.float64:
        solved: Tensor = torch.linalg.solve_triangular(L, tall.mT, upper=False).mT
        return solved
    eye = torch.eye(len(L), dtype=L.dtype, device=L.device)
    return product(tall, torch.linalg.solve_triangular(L, eye, upper=False).mT.to(tall.dtype))


def thin_svd(tall: Tensor, least: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """`U, S, V` of a tall matrix, exact to the precision of its dtype, which U has; S and V are float64.

    Args:
        tall: `(rows, width)`.
        least: Smaller singular values, and what they do to U, do not matter.
    """
    if tall.dtype == torch.float64:
        Q, R = torch.linalg.qr(tall)
        U, S, Vh = torch.linalg.svd(R)
        return Q @ U, S, Vh.mT
    V = _right_vectors(tall, least)
    U = product(tall, V.to(tall.dtype))
    S = torch.linalg.vector_norm(U, dim=0, dtype=torch.float64)
    return U.div_(S.to(U.dtype).clamp(min=torch.finfo(U.dtype).tiny)), S, V


def randomized_svd(
    matrices: Tensor, rank: int, generator: torch.Generator, power_passes: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `U, S, V` of matrices, from their products with random vectors.

    torch's own `svd_lowrank` draws from the generator that all threads share.

    Args:
        matrices: `(..., rows, columns)`, float32 or float64.
        rank: How many singular values; at most the smaller side.
        generator: Draws the random vectors, on the device of the matrices.
        power_passes: Products with `X X^T`: more of them where singular values fall slowly.

    Returns:
        `(..., rows, rank)`, `(..., rank)` and `(..., columns, rank)`, in the dtype of the matrices.

    Reference:
        Halko, Martinsson & Tropp 2011 (arXiv 0909.4061), Algorithms 4.4 and 5.1.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        V, S, U = randomized_svd(matrices.mT, rank, generator, power_passes)
        return U, S, V
    drawn = torch.randn(matrices.shape[-1], rank, generator=generator, dtype=matrices.dtype, device=matrices.device)
    Q = torch.linalg.qr(matrices @ drawn).Q
    for _ in range(power_passes):
        Q = torch.linalg.qr(matrices.mT @ Q).Q
        Q = torch.linalg.qr(matrices @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ matrices, full_matrices=False)
    return Q @ U, S, Vh.mT


def _right_vectors(tall: Tensor, least: float) -> Tensor:
    """Right singular vectors from the Gram matrix. It halves the digits: half of float64's are as many as float32 has.

    Half of float32's are enough where no singular value that matters is much smaller than the largest.
    """
    vectors: Tensor
    if least:
        values, vectors = torch.linalg.eigh(product(tall.mT, tall))
        if least**2 > _CLOSE * float(values[-1]):
            return vectors.flip(1).double()
    exact = tall.double()
    vectors = torch.linalg.eigh(exact.mT @ exact)[1]
    return vectors.flip(1)


def joint_basis(bases: Sequence[Tensor]) -> QR:
    """Orthonormal basis of the sum of spaces; directions that coincide to about 1e-6 are counted once.

    Args:
        bases: Orthonormal columns, `(rows, r_i)`, of one dtype.

    Returns:
        The basis, `(rows, s)`, in their dtype, and the coordinates of all columns in it, `(s, sum r_i)`, float64.
    """
    joint = torch.cat(list(bases), dim=1)
    return _joint_basis_of_far_spaces(joint) or _joint_basis_of_any(joint)


def _joint_basis_of_far_spaces(joint: Tensor) -> QR | None:
    """One product in their dtype; its rounding is not enlarged where no direction is nearly in two spaces."""
    L, failed = torch.linalg.cholesky_ex(gram(joint))
    diagonal = L.diagonal()
    if failed or not diagonal.numel() or not float(diagonal.min()) > _FAR:
        return None
    return QR(_divided(joint, L), L.mT)


def _joint_basis_of_any(joint: Tensor) -> QR:
    exact = joint.double()
    found = _cholesky_qr(exact)
    if found is None:
        values, vectors = torch.linalg.eigh(exact.mT @ exact)
        keep = values.gt(1e-12)
        Q = orthonormal(exact @ (vectors[:, keep] / values[keep].sqrt()))
        found = QR(Q, Q.mT @ exact)
    return QR(found.Q.to(joint.dtype), found.R)


def gram(tall: Tensor) -> Tensor:
    """`X^T X` by a product in the dtype of X, as float64."""
    return product(tall.mT, tall).double()


def inverse_of_normal(normal: Tensor) -> Tensor:
    """The inverse of normal equations, or their pseudo-inverse where they are singular: the least-norm answer.

    Args:
        normal: Symmetric, no eigenvalue negative, of the order of 1 unless next to 0, float64.
    """
    L, failed = torch.linalg.cholesky_ex(normal)
    if not failed and bool(L.diagonal().gt(_LEAST_PIVOT).all()):
        return torch.cholesky_inverse(L)
    inverse: Tensor = torch.linalg.pinv(normal, hermitian=True, rtol=1e-12)
    return inverse
