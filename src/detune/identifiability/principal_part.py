"""Adapters that start from a part of the base's own matrix: PiSSA, OLoRA and their kin.

PiSSA (Meng, Wang & Zhang 2024, arXiv 2404.02948) splits `W = W_res + P`, P the principal part of rank r, freezes W_res
and trains `B_i A_i` from P. The merges are `W_i = W_res + B_i A_i`: the base of lowest-rank adapters is W_res, and
nothing in their differences tells W_res from W. W_res itself does: P's column and row spaces are its null spaces. So
these are known, `P = U X V^T` with r² unknown numbers X, and the mean of `U^T B_i A_i V` is the best that there is for
them. OLoRA (Büyükakyüz 2024, arXiv 2406.01775) takes P from a QR decomposition: only its columns are in a null space.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detune.numerics.linalg import orthonormal, product
from detune.problem.low_rank import LowRank
from detune.problem.recovery import Recovery

# Adapters that start from one part of the base and are trained a little stay closer than this to each other (cosine).
# Others do not, but for checkpoints of one run: the null space tells these apart.
ALIKE = 0.9
# Of a base as it is, the columns that an adapter moves carry their share; of one without its principal part next to
# nothing.
EMPTY = 0.3
# A residual of more than this many times the storage noise is not storage noise.
FLOOR_RATIO = 2.0
STARTED = "the adapters start from a part of the base, as PiSSA's do"
# A part of the adapters lies in a null space if all but this share does.
OUTSIDE = 0.1
# Singular values fall by so much at the end of a matrix that has lost a part.
CLIFF = 10.0


def lacks_principal_part(recovery: Recovery) -> bool:
    """Whether the adapters are nearly the same and the weight is empty where they are.

    Args:
        recovery: An answer with deltas.
    """
    M = recovery.deltas
    if not _alike(M):
        return False
    W = recovery.weight.double()
    left, right = M[0].left.double(), M[0].right.double()
    # |M^T W|^2 and |W M^T|^2, of which a weight that does not know M has its share.
    columns, rows = left.mT @ W, W @ right
    expected = M[0].energy * float(W.square().sum())
    by_columns = float(((columns @ columns.mT) * (right.mT @ right)).sum()) / expected * W.shape[0]
    by_rows = float(((rows.mT @ rows) * (left.mT @ left)).sum()) / expected * W.shape[1]
    return min(by_columns, by_rows) < EMPTY**2


def with_principal_part(recovery: Recovery) -> Recovery:
    """The answer with what the adapters have in common in its weight's null space put back; as it is, if not so.

    Args:
        recovery: An answer with deltas.

    Returns:
        `W_res + P`, and `M_i - P` as the deltas.
    """
    M = recovery.deltas
    lacking = lacks_principal_part(recovery)
    if not lacking and not (_alike(M) and (recovery.noise_ratio or 0.0) > FLOOR_RATIO):
        return recovery
    left = torch.cat([M_i.left for M_i in M], dim=1).double() / len(M)
    right = torch.cat([M_i.right for M_i in M], dim=1).double()
    if not lacking:
        # Of such a fit nothing speaks for what the adapters have in common; HRA's run off like that.
        everything = _compressed(left, right, left.shape[1])
        return _moved(
            recovery, everything, "adapters that are nearly the same do not explain the data: the average stands in"
        )
    U, S, Vh = torch.linalg.svd(recovery.weight.double(), full_matrices=False)
    last = S[-1 - min(max(M_i.rank for M_i in M), len(S) - 1) :]
    falls = last[:-1] / last[1:].clamp(min=torch.finfo(S.dtype).tiny)
    cliffs = falls.ge(CLIFF).nonzero()
    kept = len(S) - len(last) + 1 + int(cliffs[0]) if len(cliffs) else len(S)
    sides = [_in_null_space(left, right, U[:, :kept]), _in_null_space(right, left, Vh[:kept].mT)]
    if not any(inside for _, inside in sides):
        everything = _compressed(left, right, left.shape[1])
        return _moved(recovery, everything, f"{STARTED}: which does not show, so the models' average stands in for it")
    left, right = (side if inside else factor for factor, (side, inside) in zip((left, right), sides, strict=True))
    P = _compressed(left, right, len(S) - kept)
    return _moved(recovery, P, f"{STARTED}, of rank {P.rank}: {_unknown(P, sides)} numbers are the models' average")


def _moved(recovery: Recovery, P: LowRank, why: str) -> Recovery:
    """P is taken from the deltas and given to the weight."""
    deltas = tuple(
        LowRank(
            torch.cat([M_i.left, -P.left.to(M_i.left)], dim=1), torch.cat([M_i.right, P.right.to(M_i.right)], dim=1)
        )
        for M_i in recovery.deltas
    )
    return replace(
        recovery,
        weight=recovery.weight + P.dense().to(recovery.weight),
        method=f"{recovery.method}+principal",
        reason=f"{recovery.reason}; {why}",
        deltas=deltas,
        ranks=tuple(M_i.rank for M_i in deltas),
        residuals=None,
    )


def _alike(M: Sequence[LowRank]) -> bool:
    """Whether neighbours are nearly the same."""
    if len(M) < 2 or not all(M_i.rank for M_i in M):
        return False
    neighbours = zip(M, (*M[1:], M[0]), strict=True)
    return all(_inner(M_i, M_j) >= ALIKE * math.sqrt(M_i.energy * M_j.energy) for M_i, M_j in neighbours)


def _unknown(P: LowRank, sides: list[tuple[Tensor, bool]]) -> int:
    """How many numbers of P nothing determines: it has r² in known spaces, r times a side where one is not known."""
    (_, columns), (_, rows) = sides
    return P.rank * (P.rank if rows else P.right.shape[0]) if columns else P.rank * P.left.shape[0]


def _in_null_space(factor: Tensor, other: Tensor, range_: Tensor) -> tuple[Tensor, bool]:
    """A factor of the mean delta without what is in a range, and whether that is next to nothing."""
    inside = factor - range_ @ (range_.mT @ factor)
    lost = _norm(factor - inside, other)
    return inside, lost < OUTSIDE * _norm(factor, other)


def _compressed(left: Tensor, right: Tensor, rank: int) -> LowRank:
    """The best approximation of a product of that rank."""
    Q, P = orthonormal(left), orthonormal(right)
    U, S, Vh = torch.linalg.svd((Q.mT @ left) @ (P.mT @ right).mT)
    return LowRank(Q @ (U[:, :rank] * S[:rank]), P @ Vh[:rank].mT)


def _norm(left: Tensor, right: Tensor) -> float:
    return math.sqrt(max(0.0, LowRank(left, right).energy))


def _inner(A: LowRank, B: LowRank) -> float:
    """`tr(A^T B)`."""
    return float((product(A.left.mT, B.left).double() * product(A.right.mT, B.right)).sum())
