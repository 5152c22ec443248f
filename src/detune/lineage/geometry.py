"""The evidence of weights for descent: distances, ranks, and who was rounded last.

Let `W_j = W_i + M` for each step of training, with updates M that have nothing to do with each other. Then

- squared distances add up along the tree of descent, `|W_i - W_k|^2 = |W_i - W_j|^2 + |W_j - W_k|^2` for j between i
  and k, because high-dimensional updates are next to orthogonal: weights are a Brownian motion on the tree, as
  continuous characters of species are in phylogenetics;
- ranks of low-rank updates add up, exactly, whatever angles they have;
- a merge rounds the child and not the parent. Where `W_j - W_i` has low rank, what is left beside it has the variance
  `step^2 / 12` of the steps of the one that was rounded. Steps of parent and child differ wherever a weight crossed a
  power of two, and least squares tells the shares `a_i`, `a_j` of both: (0, 1) for a parent i and its child j, (1, 1)
  for two children of one parent, (0, 2) over two merges.
"""

import math
from collections.abc import Sequence
from functools import cache
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from detune.compatibility.light import is_light
from detune.compatibility.low_rank_test import Relation, RelationKind, numerical_rank, relate, rounded_to
from detune.problem.storage_noise import storage_variance

# Matrices in which ranks and roundings of two models are looked at: any number does, it bounds the time.
LOOKED_AT = 4
# A rank of more than half of the smaller side leaves no residual to judge rounding by: a quarter
# of the entries (derived).
MOST_RANK = 1 / 2
# The part of each rounding that is seen. An error above the second is no estimate: that side's steps are too fine
# (measured, see docs/lineage.md).
SEEN, UNKNOWN = 0.9, 0.5
TINY = torch.finfo(torch.float64).tiny
# No error is smaller: any number does that is far below those that are measured.
LEAST = 1e-3


class Share(NamedTuple):
    """An estimate with its standard error."""

    value: float
    error: float


class Rounding(NamedTuple):
    """The number of times that each of two models was rounded since they parted: 0 where the other descends from it."""

    first: Share
    second: Share


class Geometry:
    """Blocks of several models' matrices at the same places, compared.

    Args:
        blocks: For each matrix looked at the block of each model, `(rows, columns)` as stored.
        noise: For each matrix and model the root mean square of what its levels round off; None where it lies on none.
    """

    def __init__(self, blocks: Sequence[Sequence[Tensor]], noise: Sequence[Sequence[float | None]]) -> None:
        self.blocks, self.noise = blocks, noise
        flat = [torch.stack([each.flatten().double() for each in block]) for block in blocks]
        self._by_matrix = torch.stack([_distances(each) for each in flat])
        self.cosines = torch.stack([_cosines(each) for each in flat]).mean(dim=0)
        # Memory of results: the same pair is asked about from several sides.
        self.relation = cache(self._relation)
        self._plain_relation = cache(self._related)
        self._rounding = cache(self._shares)

    @property
    def n(self) -> int:
        """Number of models."""
        return len(self.blocks[0])

    def part(self, models: Sequence[int]) -> "Geometry":
        """The geometry of some of the models, in that order."""
        return Geometry(
            [[block[i] for i in models] for block in self.blocks], [[noise[i] for i in models] for noise in self.noise]
        )

    @property
    def distances(self) -> Tensor:
        """Squared distances of all pairs, `(n, n)`, float64, in units of the weights' square, mean over matrices."""
        return self._by_matrix.mean(dim=0)

    def differing(self, *models: int) -> list[int]:
        """Some matrices in which all of these models differ, each from each."""
        apart = self._by_matrix[:, models][:, :, models] > 0
        found = (apart | torch.eye(len(models), dtype=torch.bool)).flatten(1).all(dim=1).nonzero().flatten().tolist()
        return found[:: max(1, len(found) // LOOKED_AT)][:LOOKED_AT]

    def ranks(self, i: int, j: int) -> tuple[int, ...]:
        """Ranks of `W_i - W_j` in the matrices where it is low; empty where it is not."""
        found = [self.relation(min(i, j), max(i, j), matrix) for matrix in self.differing(i, j)]
        return tuple(each.rank for each in found if each.kind is RelationKind.LOW_RANK)

    def kinds(self, i: int, j: int) -> list[RelationKind]:
        """The kinds of difference of two models in some matrices."""
        return [self.relation(min(i, j), max(i, j), matrix).kind for matrix in self.differing(i, j)]

    def shared_rank(self, v: int, j: int, k: int) -> float | None:
        """The share of the ranks of `W_j - W_v` and `W_k - W_v` that is one and the same update: 0 to 1.

        It is `(r_vj + r_vk - r_jk) / 2`, the rank of what j and k have in common against v, over the smaller of both.
        None where ranks do not show.
        """
        shares = []
        for matrix in self.differing(v, j, k):
            ranks = self._low_ranks(matrix, (v, j), (v, k), (j, k))
            if ranks is not None:
                shares.append((ranks[0] + ranks[1] - ranks[2]) / 2 / min(ranks[:2]))
        return sum(shares) / len(shares) if shares else None

    def rank_between(self, a: int, b: int, c: int, d: int) -> int | None:
        """The rank of an edge: a and b are on one side of it, c and d on the other, and their ways part at its ends.

        It is `(r_ac + r_bd - r_ab - r_cd) / 2`, the median over the matrices where it is not 0; None where ranks do not
        show. A model at an end stands for both of its side.
        """
        found = []
        for matrix in self.differing(*dict.fromkeys((a, b, c, d))):
            ranks = self._low_ranks(matrix, (a, c), (b, d), (a, b), (c, d))
            if ranks is not None:
                found.append((ranks[0] + ranks[1] - ranks[2] - ranks[3]) / 2)
        return round(median([rank for rank in found if rank >= 1] or [0])) if found else None

    def _low_ranks(self, matrix: int, *pairs: tuple[int, int]) -> list[int] | None:
        """The ranks of differences in a matrix; None where one is not low, or so light that it hardly shows."""
        ranks = []
        for i, j in pairs:
            if i == j:
                ranks.append(0)
                continue
            found = self.relation(min(i, j), max(i, j), matrix)
            if found.kind is not RelationKind.LOW_RANK or self._is_light(matrix, i, j):
                return None
            ranks.append(found.rank)
        return ranks

    def is_light(self, i: int, j: int) -> bool:
        """Whether two models differ by less than a step of half precision wherever they were looked at."""
        found = self.differing(i, j)
        return bool(found) and all(self._is_light(matrix, i, j) for matrix in found)

    def _is_light(self, matrix: int, i: int, j: int) -> bool:
        return is_light([self.blocks[matrix][i], self.blocks[matrix][j]])

    def cosine(self, i: int, j: int, k: int) -> float:
        """The cosine of the angle at model i between the ways to j and to k."""
        d = self.distances
        legs = float((d[i, j] * d[i, k]).sqrt())
        return float(d[i, j] + d[i, k] - d[j, k]) / 2 / legs if legs else 0.0

    def hides(self, i: int, j: int) -> bool:
        """Whether two models differ by no more than what the levels of one round off, and a low rank."""
        found = self.differing(i, j)
        return bool(found) and all(
            self.relation(min(i, j), max(i, j), matrix).kind is not RelationKind.FULL_RANK
            and self._plain_relation(min(i, j), max(i, j), matrix).kind is RelationKind.FULL_RANK
            for matrix in found
        )

    def _related(self, i: int, j: int, matrix: int) -> Relation:
        return relate(self.blocks[matrix][i], self.blocks[matrix][j])

    def _relation(self, i: int, j: int, matrix: int) -> Relation:
        plain, noise = self._plain_relation(i, j, matrix), [self.noise[matrix][each] or 0.0 for each in (i, j)]
        # A model on levels may be the base of others that are not.
        if plain.kind is not RelationKind.FULL_RANK or not any(noise):
            return plain
        return relate(self.blocks[matrix][i], self.blocks[matrix][j], noise=math.hypot(*noise))

    def roundings(self, i: int, j: int) -> list[Rounding]:
        """The shares of two models' roundings in some matrices, in that order; none where no low rank shows.

        None either where deltas are below a step: then what is left of them is no rounding to either's steps.
        """
        found = [self._rounding(min(i, j), max(i, j), matrix) for matrix in self.differing(i, j)]
        return [each if i < j else Rounding(each.second, each.first) for each in found if each is not None]

    def _shares(self, i: int, j: int, matrix: int) -> Rounding | None:
        if self._is_light(matrix, i, j):
            return None
        return rounding_shares(self.blocks[matrix][i], self.blocks[matrix][j])


def first_share(found: Sequence[Rounding], count: int) -> Share | None:
    """The first model's part of the roundings between two, over matrices.

    Args:
        found: The shares in each.
        count: How many merges lie between the two. In a matrix that one of these left alone there are fewer roundings,
            and it says nothing.

    Returns:
        Its part of `count`; None where nothing is known.
    """
    parts = []
    for first, second in found:
        known = [share.error < UNKNOWN for share in (first, second)]
        total = max(first.value, 0.0) + max(second.value, 0.0)
        if all(known) and abs(total / SEEN - count) < 1 / 2:
            # The fit takes a little of both away, so that they are held against their sum.
            error = math.hypot(second.value * first.error, first.value * second.error) / total**2
            parts.append(Share(count * max(first.value, 0.0) / total, count * error))
        elif any(known) and not all(known):
            parts.append(first if known[0] else Share(count - second.value, second.error))
    if not parts:
        return None
    weights = [1 / max(part.error, LEAST) ** 2 for part in parts]
    mean = sum(weight * part.value for weight, part in zip(weights, parts, strict=True)) / sum(weights)
    return Share(mean, 1 / math.sqrt(sum(weights)))


def rounding_shares(first: Tensor, second: Tensor) -> Rounding | None:
    """The amount of each one's rounding in the difference of two matrices, beside a low rank.

    Args:
        first: `(rows, columns)`, as stored.
        second: The same shape.

    Returns:
        The two shares; None where the rank is not low.
    """
    rounded = [rounded_to(matrix) for matrix in (first, second)]
    if all(dtype.itemsize <= 2 for dtype in rounded):
        # One alone on a coarse grid may be a base of that dtype.
        first, second = (matrix.to(dtype) for matrix, dtype in zip((first, second), rounded, strict=True))
    variances = [storage_variance(matrix) for matrix in (first, second)]
    total = variances[0] + variances[1]
    difference = second.double() - first.double()
    # Scaled so that noise is about the same in all entries; the product keeps the rank.
    scale = (total.mean(dim=1, keepdim=True) * total.mean(dim=0, keepdim=True) / total.mean()).sqrt()
    U, S, Vh = torch.linalg.svd(difference / scale, full_matrices=False)
    size = (total / scale.square()).mean().sqrt()
    p, q = difference.shape
    rank = numerical_rank(S / size, p, q)
    if rank == 0 or rank > MOST_RANK * min(p, q):
        return None
    left = difference / scale - (U[:, :rank] * S[:rank]) @ Vh[:rank]
    # The fit takes its share of the noise away, and spreads as much over all entries.
    squares = (left * scale).square().flatten() / ((1 - rank / p) * (1 - rank / q))
    spread = (scale * size).square().expand(p, q)
    causes = torch.stack([variances[0].flatten(), variances[1].flatten(), spread.flatten()], dim=1)
    # The square of a residual scatters as much as its mean.
    weights = 1 / (causes[:, 0] + causes[:, 1] + 0.1 * causes[:, 2])
    design, target = causes * weights[:, None], squares * weights
    sizes = design.square().mean(dim=0).sqrt()
    normal = (design / sizes).mT @ (design / sizes)
    inverse = torch.linalg.pinv(normal, hermitian=True, rtol=1e-12)
    solution = inverse @ ((design / sizes).mT @ target)
    scatter = (target - (design / sizes) @ solution).square().mean()
    errors = (inverse.diagonal() * scatter).sqrt() / sizes
    return Rounding(*(Share(float(solution[k] / sizes[k]), float(errors[k])) for k in (0, 1)))


def _distances(flat: Tensor) -> Tensor:
    """Squared distances of rows, over the first one's square, `(n, n)`; differences are taken before products."""
    moved = flat - flat[0]
    gram = moved @ moved.mT
    squares = gram.diagonal()
    apart = (squares[:, None] + squares - 2 * gram).clamp(min=0) / flat[0].square().sum().clamp(min=TINY)
    # Exactly 0 where two are the same, which sums of rounded products are not.
    same = torch.stack([(flat == row).all(dim=1) for row in flat])
    return apart.masked_fill(same, 0.0)


def _cosines(flat: Tensor) -> Tensor:
    norms = flat.norm(dim=1).clamp(min=TINY)
    cosines: Tensor = flat @ flat.mT / (norms[:, None] * norms)
    return cosines
