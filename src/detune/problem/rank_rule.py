"""The rank rule: which singular values of a matrix that was stored count as its rank, and which ranks are full.

With `s_k` the singular values of `W_i - W_j`, and `|E|` the spectral norm that storage noise has in a model,

    rank(W_i - W_j) = #{k : s_k > SIGNAL sqrt(|E_i|^2 + |E_j|^2)} .

`detune.fitting.differences` measures singular values and noise and asks here; `detune.fitting.rank_refinement` decides
anew, by all models at once, where a direction hides just below the floor.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "FULL_SHARE",
    "MOST_RANK",
    "OVER_EDGE",
    "SIGNAL",
    "difference_floor",
    "has_full_rank",
    "is_full_rank",
    "rank_over",
]

# A singular value counts as signal from this multiple of the noise's edge, a bound (arXiv 1408.6185) that lies a fifth
# above what rounding reaches where all entries are of a kind: noise alone does not come near.
SIGNAL = 1.15
# Where the edge is exact, that of noise with one variance, this multiple is enough: finite matrices scatter. Of 64x64
# entries one draw in 10^5 goes beyond, of larger ones fewer (derived: the Tracy-Widom law, Johnstone 2001, doi
# 10.1214/aos/1009210544).
OVER_EDGE = 1.1
# A difference of a higher rank is one of full rank: the ranks of two of LoWRA Bench's adapters (arXiv 2402.10208) add
# up to 128 at most, and eight times that is left for others.
MOST_RANK = 1024
# So is one of more than 7/8 of what its shape allows: of a square matrix it leaves less than a 64th of the
# entries' degrees of freedom to judge noise by (derived).
FULL_SHARE = 7 / 8
# A spectrum that takes nearly all of the shape ends there all the same if its last value stands four times over the
# noise and some values do not (definition of a gap).
WELL_ABOVE = 4.0


def difference_floor(first: Tensor, second: Tensor, signal: float = SIGNAL) -> float:
    """The size from which singular values of a difference of two models count.

    Args:
        first: Spectral norm of the first model's storage noise, see `Stack.noise_norm`.
        second: That of the second's.
        signal: The multiple of both together that counts.
    """
    return signal * float(torch.hypot(first, second))


def rank_over(singular_values: Tensor, floor: float) -> int:
    """The number of singular values that stand over a floor."""
    return int(singular_values.gt(floor).sum())


def has_full_rank(singular_values: Tensor, floor: float, most: int) -> bool:
    """Whether the singular values over a floor are too many for a low rank.

    Args:
        singular_values: Those over the floor, descending.
        floor: What they stand over.
        most: The rank that the shape allows.
    """
    rank = len(singular_values)
    ends = rank < most and float(singular_values[-1:].sum()) > WELL_ABOVE * floor
    return rank > MOST_RANK or (is_full_rank(rank, most) and not ends)


def is_full_rank(rank: int, most: int) -> bool:
    """Whether a rank is that of a matrix without a low one.

    Args:
        rank: Singular values that stand over the noise.
        most: The rank that the shape allows.
    """
    return rank > MOST_RANK or rank > math.ceil(FULL_SHARE * most)
