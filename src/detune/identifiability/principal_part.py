"""Adapters that start from a part of the base's own matrix: PiSSA, OLoRA and their kin.

PiSSA (Meng, Wang & Zhang 2024, arXiv 2404.02948) splits `W = W_res + P`, P the principal part of rank r, freezes W_res
and trains `B_i A_i` from P. The merges are `W_i = W_res + B_i A_i`: the base of lowest-rank adapters is W_res, and
nothing in their differences tells W_res from W. W_res itself shows what happened: P's column and row spaces are its
null spaces. OLoRA (Büyükakyüz 2024, arXiv 2406.01775) takes P from a QR decomposition, and only its columns are in a
null space. P is in every model, so no method does better than their average.
"""

import math
from collections.abc import Sequence

from detune.numerics.linalg import product
from detune.problem.low_rank import LowRank
from detune.problem.recovery import NotRecoverable, Recovery
from detune.problem.storage_noise import FLOOR_RATIO

__all__ = ["lacks_principal_part", "require_own_adapters"]

# Adapters that start from one part of the base and are trained a little have a larger cosine than 0.9 to each other:
# 0.95 to 0.97 for PEFT's PiSSA and OLoRA, at most 0.11 for eight other methods (measured on `tiny_set` of
# benchmarks/peft_sets.py, three and five models). Checkpoints of one run do too; the null space tells these apart.
ALIKE = 0.9
# In a base as it is, the columns that an adapter moves carry their share, 1.0 to 1.1; in one without its principal part
# 0.13 to 0.14 of it (measured on the same models).
EMPTY = 0.3


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


def require_own_adapters(recovery: Recovery) -> None:
    """Refuse an answer whose adapters hold a part of the base, or are nearly the same and explain nothing.

    Args:
        recovery: An answer with deltas.

    Raises:
        NotRecoverable: It is one; the average of the models is as close.
    """
    if lacks_principal_part(recovery):
        raise NotRecoverable(
            "the adapters start from a part of the base, as PiSSA's do",
            "they are nearly the same, and the weight without them is empty where they are",
            "average the models with --method mean",
        )
    # Such a fit has no evidence for what the adapters have in common; HRA's run off like that.
    if _alike(recovery.deltas) and (recovery.noise_ratio or 0.0) > FLOOR_RATIO:
        raise NotRecoverable(
            "adapters that are nearly the same do not explain the data",
            f"{recovery.noise_ratio:.2g} times the storage noise is left, expected {FLOOR_RATIO:g} at most",
            "average the models with --method mean",
        )


def _alike(M: Sequence[LowRank]) -> bool:
    """Whether neighbours are nearly the same."""
    if len(M) < 2 or not all(M_i.rank for M_i in M):
        return False
    neighbours = zip(M, (*M[1:], M[0]), strict=True)
    return all(_inner(M_i, M_j) >= ALIKE * math.sqrt(M_i.energy * M_j.energy) for M_i, M_j in neighbours)


def _inner(A: LowRank, B: LowRank) -> float:
    """`tr(A^T B)`."""
    return float((product(A.left.mT, B.left).double() * product(A.right.mT, B.right)).sum())
