"""The low-rank test: whether two models' versions of a weight matrix are a low rank apart.

Fine-tunes of one base by LoRA differ by `M_i - M_j`, a matrix of low rank, and storage noise. Anything else differs in
every direction. What decides is the whole spectrum of the difference, on some of its rows and columns:

- Rows and columns are scaled so that the storage noise is about the same in all entries. That keeps the rank, and the
  noise has the spectrum of a random matrix with independent entries: for p x q entries of variance 1 none of its
  singular values is much above `sqrt(p) + sqrt(q)` (Davidson & Szarek 2001, Theorem II.13).
- The rank is the smallest k for which the next singular value is within the noise of a `(p - k) x (q - k)` matrix.
- What is left after that rank has the energy of storage noise if the difference has low rank. If it is full, and
  not all of it stands over the noise, the rank only cuts a continuous spectrum: the energy left is larger, by a factor
  of 1.3 to 1.6 (from the quarter-circle law), and many singular values crowd just above the cut.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from detune.numerics.float_grid import HALVES
from detune.numerics.linalg import product
from detune.numerics.random import seeded
from detune.problem.rank_rule import FULL_SHARE, OVER_EDGE, is_full_rank
from detune.problem.solving import told_by_others
from detune.problem.stack import Stack
from detune.problem.storage_noise import noise_edge, storage_variance

# Smaller matrices are full after a few ranks and tell nothing: two adapters of rank 32, an ordinary one, fill 64
# directions (derived).
SMALLEST = 64
# Rows and columns looked at; more, where the rank found is a large part of them. Any numbers do that double: a sample
# of rank k shows rank k.
FIRST_SAMPLE = 256
MIDDLE_SAMPLE = 512
LAST_SAMPLE = 1024
LARGE_PART = 1 / 3
# Singular values up to these, in units of the noise, leave it some digits once they are squared: three of float32's,
# nine of float64's (derived).
SQUARABLE = {torch.float32: 3e3, torch.float64: 1e6}
# Squares of singular values down to this share of the largest are known well enough to say that these are not noise:
# some hundred times what rounding adds to them (derived: eps of the dtype, times a few hundred rows).
SEEN = {torch.float32: 3e-2, torch.float64: 1e-6}
# Left after the rank, in units of the storage noise's variance: 1 for a low rank, up to 1.26 with weak directions in
# tiny matrices, about 1.6 for a cut-off full one (derived: the quarter-circle law, see `docs/method.md`).
MOST_LEFT = 1.3
# Share of the singular values that may lie within a factor of 3 above the noise, where more than noise is left below.
# A quarter at least of a full spectrum with fewer than 7/8 of its values over the noise lie there (derived: the
# quarter-circle law); flat LoRAs just above the noise crowd there too, which what is left tells apart.
CROWD = 0.15
CROWD_FACTOR = 3.0
# A delta carries rounding errors of its own, in eps of the difference: of a product of many terms, or of one rounding
# where the product was exact for the dtype (derived).
PRODUCT_ROUNDING = {torch.float32: 4.0, torch.float64: 4.0, torch.bfloat16: 0.5, torch.float16: 0.5}


class RelationKind(StrEnum):
    """A kind of difference between two versions of a matrix."""

    SAME = "same"
    """Not at all, or by no more than storage noise."""
    LOW_RANK = "low rank"
    """By a matrix of low rank, as fine-tunes by LoRA do."""
    FULL_RANK = "full rank"
    """In every direction."""


@dataclass(frozen=True)
class Relation:
    """The difference of two versions of a matrix, judged by some rows and columns.

    Attributes:
        kind: The verdict.
        rank: Rank of the part that stands over the storage noise, roughly.
        left: Mean square of the rest, in units of the storage noise's variance.
        crowd: Share of the singular values within a factor of 3 above the noise.
        coarse: Judged by the noise of a coarser dtype than one is stored in, which its values would fit in.
    """

    kind: RelationKind
    rank: int = 0
    left: float = 0.0
    crowd: float = 0.0
    coarse: bool = False


def relate(first: Tensor, second: Tensor, seed: int = 0, noise: float = 0.0) -> Relation:
    """Whether two versions of a matrix differ by a low rank.

    Args:
        first: `(out, in)`, as stored, any float dtype.
        second: The same shape; its dtype may differ.
        seed: Seed of the choice of rows and columns.
        noise: Root mean square of what their difference has more than the rounding to their dtypes.

    Returns:
        The relation. Matrices of fewer than `SMALLEST` rows or columns give an answer too, but not one to trust.

    Raises:
        NonFinite: One holds NaN or Inf where it was looked at.
    """
    pair = _seen((first, second), (0.0, noise))
    relation = _relate_seen(pair.matrices, seed, math.hypot(*pair.noise_override))
    # A merge that was saved more finely is seen in the dtype that it was merged in, and judged by its noise.
    coarser = any(seen.dtype != stored.dtype for seen, stored in zip(pair.matrices, (first, second), strict=True))
    return replace(relation, coarse=relation.coarse or coarser)


def _relate_seen(pair: Sequence[Tensor], seed: int, noise: float) -> Relation:
    shape = pair[0].shape
    for size in (FIRST_SAMPLE, MIDDLE_SAMPLE, LAST_SAMPLE):
        relation = _relate([sample(matrix, size, seed) for matrix in pair], noise)
        if relation.rank <= LARGE_PART * min(size, *shape) or max(shape) <= size:
            break
    return relation


def split(matrices: Sequence[Tensor], seed: int = 0, noise: Sequence[float | None] = ()) -> tuple[tuple[int, ...], ...]:
    """Group the versions of a matrix that differ by a low rank from each other.

    Each is compared with one of every group found so far, so the cost is linear in their number for a few groups.

    Args:
        matrices: `(out, in)`, as stored.
        seed: Seed of the choice of rows and columns.
        noise: Root mean square of each one's noise, where that is more than the rounding to its dtype; None, or no
            number at all, where it is not.

    Returns:
        Groups of places in `matrices`, the largest first; those of one size by their first.

    Raises:
        NonFinite: One holds NaN or Inf where it was looked at.
    """
    seen = _seen(matrices, [each or 0.0 for each in noise])
    matrices, told = seen.matrices, seen.noise_override or (0.0,) * seen.n
    groups: list[list[int]] = []
    # Versions with little storage noise first: a coarse one could hide what sets two fine ones apart.
    eps = [torch.finfo(rounded_to(sample(matrix, FIRST_SAMPLE, seed))).eps for matrix in matrices]
    for i in sorted(range(len(matrices)), key=lambda i: (told[i], eps[i])):
        related = [
            (_relate_seen((matrices[group[0]], matrices[i]), seed, math.hypot(told[group[0]], told[i])), group)
            for group in groups
        ]
        low = [pair for pair in related if pair[0].kind is not RelationKind.FULL_RANK]
        if low:
            min(low, key=lambda pair: (pair[0].coarse, pair[0].left))[1].append(i)
        else:
            groups.append([i])
    return tuple(sorted((tuple(sorted(group)) for group in groups), key=lambda group: (-len(group), group)))


def _seen(matrices: Sequence[Tensor], noise: Sequence[float]) -> Stack:
    """The versions of a matrix as numbers of the order of one, without outliers."""
    told = tuple(noise) if any(noise) else ()
    return told_by_others(Stack(tuple(matrices), torch.float64, matrices[0].device, told))


def sample(matrix: Tensor, size: int, seed: int = 0) -> Tensor:
    """At most `size` rows and columns of a matrix, chosen at random but the same for every matrix of a shape."""
    generator = seeded(seed)
    for dim in (0, 1):
        if matrix.shape[dim] > size:
            chosen = torch.randperm(matrix.shape[dim], generator=generator)[:size].sort().values
            matrix = matrix.index_select(dim, chosen)
    return matrix


def _relate(samples: Sequence[Tensor], noise: float) -> Relation:
    first, second = (matrix.double() for matrix in samples)
    difference = second - first
    if not bool(difference.any()):
        return Relation(RelationKind.SAME)
    stored = [matrix.dtype for matrix in samples]
    if noise:
        return _spectrum(difference, samples, stored, noise)
    rounded = [rounded_to(matrix) for matrix in samples]
    # Both on a coarse grid: that was the rounding. One alone may be a base of that dtype that was left as it was.
    relation = _spectrum(difference, samples, rounded if all(dtype.itemsize <= 2 for dtype in rounded) else stored)
    if relation.kind is RelationKind.FULL_RANK and rounded != stored:
        relation = _spectrum(difference, samples, rounded)
        return replace(relation, coarse=True)
    return relation


def _spectrum(
    difference: Tensor, samples: Sequence[Tensor], dtypes: Sequence[torch.dtype], noise: float = 0.0
) -> Relation:
    """The verdict from the singular values of the difference, scaled to noise of variance 1."""
    variance = torch.full_like(difference, noise**2)
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    for matrix, dtype in zip(samples, dtypes, strict=True):
        # The coarser of two dtypes may have been rounded twice: the base was converted to it, and then the merge.
        times = 2 if dtypes[0] != dtypes[1] and torch.finfo(dtype).eps == coarsest else 1
        variance += times * storage_variance(matrix.to(dtype))
    of_delta = max(PRODUCT_ROUNDING.get(dtype, 0.5) * torch.finfo(dtype).eps for dtype in dtypes)
    variance += of_delta**2 * difference.square().mean()
    rows, columns = variance.mean(dim=1, keepdim=True), variance.mean(dim=0, keepdim=True) / variance.mean()
    scale = (rows * columns).sqrt()
    size = (variance / scale.square()).mean().sqrt()
    values = _singular_values(difference / (scale * size))
    return _judge(values, difference.shape[0], difference.shape[1])


def _singular_values(scaled: Tensor) -> Tensor:
    """Descending, float64; by the Gram matrix, several times faster, where its rounding is far below a noise of 1.

    So it is, too, where next to all stand so far over the noise that rounding does not matter.
    """
    wide = scaled if scaled.shape[0] <= scaled.shape[1] else scaled.mT
    for dtype, most in SQUARABLE.items():
        rounded = wide.to(dtype)
        try:
            values: Tensor = torch.linalg.eigvalsh(product(rounded, rounded.mT)).clamp(min=0).sqrt().flip(0)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # it has no list of names
            # LAPACK gives up on some float32 matrices of which most rows are zero.
            continue
        least = float(values[min(len(values) - 1, int(FULL_SHARE * len(values)))])
        is_full = least > max(
            SEEN[dtype] * float(values[0]), 2 * OVER_EDGE * noise_edge((wide.shape[0], wide.shape[1]), 1.0)
        )
        if is_full or float(values[0]) < most:
            return values.double()
    values = torch.linalg.svdvals(scaled)
    return values


def _judge(values: Tensor, p: int, q: int) -> Relation:
    most, edges, rank = len(values), _edges(len(values), p, q), numerical_rank(values, p, q)
    if is_full_rank(rank, most):
        return Relation(RelationKind.FULL_RANK, rank)
    left = float(values[rank:].square().sum()) / ((p - rank) * (q - rank))
    crowd = int(values[:rank].lt(CROWD_FACTOR * edges[rank]).sum()) / most
    if left > MOST_LEFT and crowd > CROWD:
        return Relation(RelationKind.FULL_RANK, rank, left, crowd)
    return Relation(RelationKind.LOW_RANK if rank else RelationKind.SAME, rank, left, crowd)


def numerical_rank(values: Tensor, p: int, q: int) -> int:
    """The smallest k for which the next singular value is within the noise.

    Args:
        values: All singular values of a `p x q` matrix, descending, float64, in units of the noise's deviation.
        p: Rows.
        q: Columns.
    """
    below = values.le(_edges(len(values), p, q))
    return int(below.to(torch.int8).argmax()) if bool(below.any()) else len(values)


def _edges(most: int, p: int, q: int) -> Tensor:
    """Above what a singular value is signal after k others, for each k, `(most,)`, float64."""
    edges = [OVER_EDGE * noise_edge((p - k, q - k), 1.0) for k in range(most)]
    return torch.tensor(edges, dtype=torch.float64)


def rounded_to(matrix: Tensor) -> torch.dtype:
    """The coarsest of bfloat16, float16 and its own dtype that holds these values exactly."""
    for dtype in HALVES:
        if matrix.dtype.itemsize > 1 and torch.equal(matrix.to(dtype).to(matrix.dtype), matrix):
            return dtype
    return matrix.dtype
