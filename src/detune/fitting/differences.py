"""The pairwise differences `W_i - W_j = M_i - M_j`: their ranks and their row spaces.

Two sketches, one inside the other. Rows are first folded onto a few hundred with random signs (a sparse embedding:
Clarkson & Woodruff 2013, arXiv 1207.6365), one pass over the models and no products. What is left is small, and a
Gaussian range finder (Halko, Martinsson & Tropp 2011, arXiv 0909.4061, Algorithms 4.2 and 5.1) takes its singular
values and row space, starting narrow and widening, so that the cost follows the rank that is there.

Column spaces are the row spaces of the transposed stack.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from detune.fitting.ranks_from_pairs import solve_ranks
from detune.numerics.linalg import orthonormal, product, thin_svd
from detune.numerics.random import seeded
from detune.problem.rank_rule import SIGNAL, difference_floor, has_full_rank, rank_over
from detune.problem.stack import SMALL_ENTRIES, Stack

# Test vectors beyond the rank: five to ten (Halko, Martinsson & Tropp 2011, arXiv 0909.4061, Section 4.3).
OVERSAMPLING = 8
# The rank looked for first: any number does, as it is widened where it is too small.
FIRST_RANK = 32
# Rows after folding: any numbers do that are twice the ranks. In half precision storage noise is not far below the
# deltas, and folding more would lift it.
FOLDED_ROWS = {torch.float32: 512, torch.float64: 512, torch.bfloat16: 1024, torch.float16: 1024}
# Folding keeps a space of up to half of its rows: singular values change by a factor of `1 ± sqrt(1 / 2)`, and none is
# lost (derived).
FOLDED_RANK = 0.5
# Test vectors show a direction weaker than it is: one hardly above the noise by at most a quarter. Where a value lies
# between, the matrix is multiplied once more (Halko, Martinsson & Tropp 2011, arXiv 0909.4061, Algorithm 4.3). Test
# vectors show more of small matrices, and `detune.fitting.rank_refinement` looks closer there.
HIDDEN = 0.75


@dataclass(frozen=True)
class Difference:
    """The part of `W_i - W_j` that stands over the storage noise.

    Attributes:
        pair: `(i, j)`.
        basis: Orthonormal row space, `(in, rank)`, in the dtype of the computation.
        singular_values: Singular values of the folded difference, descending, `(rank,)`, float64.
        noise_norm: Singular values below this are storage noise.
        full_rank: There is no low-rank structure.
    """

    pair: tuple[int, int]
    basis: Tensor
    singular_values: Tensor
    noise_norm: float
    full_rank: bool

    @property
    def rank(self) -> int:
        """Numerical rank over the storage noise."""
        return self.singular_values.shape[0]


@dataclass(frozen=True)
class Differences:
    """The differences of a stack: the input of the closed form.

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

    Each model then meets two others, which is what its space needs. An even ring leaves the ranks undetermined (add
    one to every second model, take one from the others), so a chord makes a triangle.

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


def find_differences(
    stack: Stack, rank: int | None = None, seed: int = 0, fold: bool = True, signal: float = SIGNAL
) -> Differences:
    """Ranks and row spaces of the differences on the ring.

    Args:
        stack: At least two models.
        rank: The most that any `M_i` can have: spaces are cut to twice that.
        seed: Seed of the random signs and test vectors.
        fold: False works on all rows: slower, and sure where only a few rows differ.
        signal: A singular value counts from this multiple of the storage noise's estimated spectral norm.

    Returns:
        The differences, their ranks as `detune.problem.rank_rule` has it.

    Raises:
        InputError: The stack holds NaN or Inf.
    """
    out, columns = stack.shape
    cut = columns if rank is None else 2 * rank
    expected = FIRST_RANK if rank is None else cut
    rows = FOLDED_ROWS.get(stack.matrices[0].dtype, max(FOLDED_ROWS.values())) if fold else out
    found: dict[tuple[int, int], Difference] = {}
    while missing := [pair for pair in ring(stack.n) if pair not in found]:
        finder = _RangeFinder(_fold(stack, rows, seed), stack, seed)
        for i, j in missing:
            norm = difference_floor(stack.noise_norm(i, finder.rows), stack.noise_norm(j, finder.rows), signal)
            basis, S = finder.row_space(i, j, norm, expected)
            # The other pairs will need about as much.
            expected = max(expected, len(S))
            full_rank = has_full_rank(S, norm, min(out, columns))
            if full_rank or len(S) <= FOLDED_RANK * finder.rows or finder.rows == out:
                found[i, j] = Difference((i, j), basis[:, :cut], S[:cut], norm, full_rank)
        rows *= 4
    return Differences(stack, {pair: found[pair] for pair in ring(stack.n)})


def _fold(stack: Stack, rows: int, seed: int) -> Tensor:
    """`S (W_i - W_1)` for all models but the first, `(n - 1, rows or a little more, in)`.

    S is a sparse sign embedding of the rows. The dtype is `stack.sketch_dtype`.

    Rows that lie a multiple of the height apart share a bucket: neighbours, which often belong to one attention head
    and change together, do not. Where there are no more rows than asked for, they are taken as they are.
    """
    out, height = stack.shape[0], stack.block_height
    buckets = out if rows >= out else min(out, -(-rows // height) * height)
    signs = stack.gaussian(stack.generator(seed), out, 1).sign() if buckets < out else stack.zeros(out, 1) + 1
    if stack.by_columns:
        folded = _fold_columns(stack.transposed, buckets, signs.mT).mT
    else:
        folded = _fold_rows(stack, buckets, signs)
    stack.require_finite(folded.sum(dtype=stack.dtype))
    return folded


def _fold_rows(stack: Stack, buckets: int, signs: Tensor) -> Tensor:
    """`S (W_i - W_1)`, `(n - 1, buckets, in)`, for signs `(out, 1)`: one block of buckets after the other."""
    (out, columns), height = stack.shape, stack.block_height
    folded = torch.empty(stack.n - 1, buckets, columns, dtype=stack.sketch_dtype, device=stack.device)
    # Sums are in the compute dtype: of a coarser sketch they are kept apart until a bucket is full.
    coarse = folded.dtype != stack.dtype
    total = stack.zeros(stack.n - 1, height, columns) if coarse else folded
    for block in stack.blocks(buckets):
        start, bucket = block.rows.start, block.rows.start % buckets
        kept = folded[:, bucket : bucket + height]
        target = total[:, : kept.shape[1]] if coarse else kept
        if start == bucket:
            torch.mul(block.differences, signs[block.rows], out=target)
        else:
            target[:, : block.reference.shape[0]].addcmul_(block.differences, signs[block.rows])
        if coarse and start + buckets >= out:
            # The last of the bucket.
            kept.copy_(target)
    return folded


def _fold_columns(stack: Stack, buckets: int, signs: Tensor) -> Tensor:
    """`(W_i - W_1) S^T`, `(n - 1, out, buckets)`, for signs `(1, in)`."""
    out, columns = stack.shape
    folded = torch.empty(stack.n - 1, out, buckets, dtype=stack.sketch_dtype, device=stack.device)
    for block in stack.blocks():
        total = block.differences[:, :, :buckets] * signs[:, :buckets]
        for start in range(buckets, columns, buckets):
            some = slice(start, start + buckets)
            differences = block.differences[:, :, some]
            total[:, :, : differences.shape[2]].addcmul_(differences, signs[:, some])
        folded[:, block.rows] = total
    return folded


class _Seen(NamedTuple):
    """A matrix as test vectors show it: `Q^T A` for a basis Q of their images, its row vectors and singular values."""

    projected: Tensor
    V: Tensor
    S: Tensor
    floor: float

    @property
    def rank(self) -> int:
        """How many singular values stand over the noise."""
        return rank_over(self.S, self.floor)

    @property
    def next_over_noise(self) -> float:
        """The largest of the others."""
        others = self.S[self.rank :]
        return float(others[0]) / self.floor if len(others) else 0.0


class _RangeFinder:
    """Row spaces of differences, by test vectors that all of them share: the models are multiplied, not the pairs.

    Args:
        matrices: `W_i - W_1`, folded, for all models but the first, `(n - 1, rows, in)`.
        stack: That they are of.
        seed: Seed of the test vectors.
    """

    def __init__(self, matrices: Tensor, stack: Stack, seed: int) -> None:
        self._matrices = matrices
        self._stack = stack
        self._is_large = stack.matrices[0].numel() > SMALL_ENTRIES
        self._generator = seeded(seed, matrices.device)
        self._images = matrices.new_empty(*matrices.shape[:2], 0)

    @property
    def rows(self) -> int:
        """Rows after folding."""
        return self._matrices.shape[1]

    def row_space(self, i: int, j: int, noise_norm: float, expected: int) -> tuple[Tensor, Tensor]:
        """Row space and singular values of `W_i - W_j` over the noise, the rank expected or not."""
        A = _between(self._matrices, i, j)
        limit = min(A.shape)
        while True:
            width = min(limit, _padded(expected))
            self._widen(width)
            seen = self._seen(A, _between(self._images, i, j)[:, :width], noise_norm)
            if _padded(seen.rank) <= width < limit and self._is_large and seen.next_over_noise > HIDDEN:
                seen = self._seen(A, product(A, seen.projected.mT), noise_norm)
            if _padded(seen.rank) <= width or width == limit:
                return seen.V[:, : seen.rank], seen.S[: seen.rank]
            expected *= 4

    def _seen(self, A: Tensor, images: Tensor, noise_norm: float) -> "_Seen":
        """Row space and singular values of A on the span of some images, `(rows, width)`."""
        Q = orthonormal(images.to(self._stack.factor_dtype))
        projected = product(Q.mT.to(A), A)
        V, S, _ = thin_svd(projected.mT.to(self._stack.dtype), noise_norm)
        # Below this is the rounding error of the products, not the storage's.
        floor = max(noise_norm, 8 * torch.finfo(V.dtype).eps * float(S[0]))
        return _Seen(projected, V, S, floor)

    def _widen(self, width: int) -> None:
        """Bring the images to this number of test vectors, keeping those that there are."""
        matrices, before = self._matrices, self._images.shape[2]
        if width <= before:
            return
        size = matrices.shape[2], width - before
        test = self._stack.gaussian(self._generator, *size).to(matrices)
        self._images = torch.cat([self._images, torch.stack([product(matrix, test) for matrix in matrices])], dim=2)


def _between(matrices: Tensor, i: int, j: int) -> Tensor:
    """The difference of models i and j > i, from their differences from the first."""
    return matrices[j - 1] if i == 0 else matrices[j - 1] - matrices[i - 1]


def _padded(rank: int) -> int:
    """Test vectors for a rank: with few to spare, the weakest directions would drown in the noise of the others."""
    return rank + max(OVERSAMPLING, rank // 2)
