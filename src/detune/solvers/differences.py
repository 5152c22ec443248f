"""The pairwise differences `W_i - W_j = M_i - M_j`: their ranks and their column and row spaces.

Halko, Martinsson & Tropp 2011 (arXiv 0909.4061), Algorithms 4.3 and 5.1: a Gaussian sketch finds the row space,
one power pass `B = D P` corrects it, and a small SVD of `B` gives the singular triples.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from detune.solvers.ranks import solve_ranks
from detune.solvers.stack import Stack

OVERSAMPLING = 8
FIRST_WIDTH = 40
# Adapters add up to less than this in practice; a difference of more is one of full rank.
MOST_RANK = 1024
# A singular value counts as signal from this multiple of the noise's estimated spectral norm.
SIGNAL = 1.3


@dataclass(frozen=True)
class Difference:
    """The part of `W_i - W_j` that stands over the storage noise.

    Attributes:
        pair: `(i, j)`.
        left: Orthonormal column space, `(out, rank)`, float64.
        right: Orthonormal row space, `(in, rank)`, float64.
        singular_values: Descending, `(rank,)`, float64.
        noise_norm: Singular values below this are storage noise.
        full_rank: There is no low-rank structure.
        identical: The two matrices are equal in every entry.
    """

    pair: tuple[int, int]
    left: Tensor
    right: Tensor
    singular_values: Tensor
    noise_norm: float
    full_rank: bool
    identical: bool

    @property
    def rank(self) -> int:
        """Numerical rank over the storage noise."""
        return self.singular_values.shape[0]


@dataclass(frozen=True)
class Differences:
    """What the differences of a stack say: the input of every closed form.

    Attributes:
        stack: The stack they are of.
        by_pair: A difference for each pair looked at, keyed `(i, j)` with `i < j`.
    """

    stack: Stack
    by_pair: dict[tuple[int, int], Difference]

    def of(self, i: int, j: int) -> Difference:
        """The difference of models i and j, whichever way round."""
        return self.by_pair[min(i, j), max(i, j)]

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The rank of every model's `M_i` (integer least squares over the pairs)."""
        return solve_ranks({pair: difference.rank for pair, difference in self.by_pair.items()}, self.stack.n)

    @cached_property
    def full_rank_pairs(self) -> tuple[tuple[int, int], ...]:
        """Pairs whose difference has no low rank."""
        return tuple(pair for pair, difference in self.by_pair.items() if difference.full_rank)


def ring(n: int) -> tuple[tuple[int, int], ...]:
    """The pairs that are looked at: neighbours on a ring, so that the cost is linear in n.

    Each model then meets two others, which is what its subspaces need. An even ring leaves the ranks undetermined
    (add one to every second model, take one from the others), so a chord makes a triangle.

    Example:
        >>> ring(3)
        ((0, 1), (1, 2), (0, 2))
        >>> ring(4)
        ((0, 1), (1, 2), (2, 3), (0, 3), (0, 2))
    """
    if n < 3:
        return tuple(pairwise(range(n)))
    chord = ((0, 2),) if n % 2 == 0 else ()
    return (*pairwise(range(n)), (0, n - 1), *chord)


def find_differences(stack: Stack, rank: int | None = None, seed: int = 0) -> Differences:
    """Sketch the differences on the ring.

    The sketch starts narrow and doubles for the pairs whose rank it does not cover, so its cost follows the
    rank that is there and not the cap.

    Args:
        stack: At least two models.
        rank: The most that any `M_i` can have: differences are cut to twice that.
        seed: Seed of the Gaussian test matrix.

    Returns:
        The differences. `full_rank` is set where more than 7/8 of the singular values, or more than `MOST_RANK`,
        stand over the noise.

    Raises:
        InputError: The stack holds NaN or Inf.
    """
    limit = min(stack.shape)
    most = min(MOST_RANK, limit - limit // 8)
    width = min(limit, FIRST_WIDTH if rank is None else 2 * rank + OVERSAMPLING)
    open_pairs = ring(stack.n)
    found: dict[tuple[int, int], Difference] = {}
    while open_pairs:
        for pair, difference in _sketch(stack, open_pairs, width, seed).items():
            full_rank = difference.rank > most
            if full_rank or difference.rank <= width - OVERSAMPLING or width == limit:
                found[pair] = _cut(difference, limit if rank is None else 2 * rank, full_rank)
        open_pairs = tuple(pair for pair in open_pairs if pair not in found)
        width = min(limit, 2 * width, max(width, most) + OVERSAMPLING)
    return Differences(stack, {pair: found[pair] for pair in ring(stack.n)})


def _sketch(
    stack: Stack, pairs: tuple[tuple[int, int], ...], width: int, seed: int
) -> dict[tuple[int, int], Difference]:
    """Singular triples of `W_j - W_i` for each pair, from two passes over the stack."""
    out, columns = stack.shape
    generator = stack.generator(seed)
    # One test matrix for all models: the sketch of a difference is the difference of the sketches.
    sketches = stack.zeros(stack.n, width, columns)
    for block in stack.blocks():
        height = block.reference.shape[0]
        test = stack.gaussian(generator, width, height)
        for i in range(1, stack.n):
            sketches[i].addmm_(test, block.deviations[i])
    stack.require_finite(sketches.sum())
    right = {(i, j): orthonormal((sketches[j] - sketches[i]).mT) for i, j in pairs}
    del sketches

    images = {pair: stack.zeros(out, width) for pair in pairs}
    for block in stack.blocks():
        for i, j in pairs:
            torch.mm(block.deviations[j] - block.deviations[i], right[i, j], out=images[i, j][block.rows])
    result = {}
    for i, j in pairs:
        U, S, V = thin_svd(images[i, j])
        noise = SIGNAL * float(torch.hypot(stack.noise_norm[i], stack.noise_norm[j]))
        # Rounding of the GEMM itself, relative to the largest singular value.
        noise = max(noise, 8 * torch.finfo(stack.dtype).eps * float(S[0]))
        keep = int(S.gt(noise).sum())
        result[i, j] = Difference(
            (i, j),
            U[:, :keep],
            right[i, j].double() @ V[:, :keep],
            S[:keep],
            noise,
            False,
            not bool(S[0] > 0),
        )
    return result


def _cut(difference: Difference, rank: int, full_rank: bool) -> Difference:
    return Difference(
        difference.pair,
        difference.left[:, :rank],
        difference.right[:, :rank],
        difference.singular_values[:rank],
        difference.noise_norm,
        full_rank,
        difference.identical,
    )


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the column span, same shape and dtype."""
    Q: Tensor = torch.linalg.qr(columns)[0]
    return Q


def thin_svd(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`U, S, V` in float64 of a tall matrix, through QR so that the SVD is of the small side."""
    Q, R = torch.linalg.qr(tall.double())
    U, S, Vh = torch.linalg.svd(R)
    return Q @ U, S, Vh.mT
