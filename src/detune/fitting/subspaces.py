"""The closed form: every adapter's space is where the spaces of two differences meet.

`W_i - W_j = M_i - M_j` has the row space `row(M_i) + row(M_j)`, so `row(M_1)` is the intersection of
`row(W_1 - W_2)` and `row(W_1 - W_3)`, and likewise for columns. With the spaces of one side known, the rest is one
linear least-squares problem for all models (`detune.fitting.least_squares.normal_inverse`).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detune.fitting.differences import Differences, find_differences
from detune.numerics.linalg import orthonormal, product
from detune.problem.recovery import NotLowRank, NotRecoverable
from detune.problem.stack import Stack

# Spaces that are 45 degrees apart (sin^2) are told apart well enough, as noise is amplified by 1.4 at most (derived):
# the other side is not looked at.
GOOD_SEPARATION = 0.5
# Directions at a smaller cosine are not shared, whatever the ranks say: squares are exact to 1e-16, with a factor of a
# hundred to spare (derived).
LEAST_COSINE = 1e-6


@dataclass(frozen=True)
class RowSpaces:
    """The adapters' row spaces, or their column spaces as the row spaces of the transposed stack.

    Attributes:
        stack: The stack, transposed where `transposed`.
        transposed: Whether these are column spaces.
        bases: Orthonormal basis of each model's space, `(in, r_i)` of this stack, float64.
        separation: The smallest `sin^2` of an angle between what two differences share and what they do not: 1 where
            the adapters' spaces are orthogonal, 0 where they cannot be told apart.
    """

    stack: Stack
    transposed: bool
    bases: tuple[Tensor, ...]
    separation: float

    def __str__(self) -> str:
        return f"{'column' if self.transposed else 'row'} spaces, separation {self.separation:.2g}"


class RanksTooHigh(NotRecoverable):
    """The ranks are too high for the intersection; an iterative method may still do."""


def find_spaces(differences: Differences, rank: int | None = None, seed: int = 0) -> RowSpaces:
    """The adapters' spaces on the side where they are easier to tell apart.

    LoRAs of one seed keep their A near the shared start, so their row spaces nearly coincide and their column spaces
    do not: where the rows are badly separated the columns are looked at too.

    Args:
        differences: Differences of the stack as it is.
        rank: The most that any `M_i` can have.
        seed: Seed of the sketch of the columns.

    Raises:
        NotRecoverable: Fewer than three models.
        NotLowRank: A difference has full rank.
        RanksTooHigh: The ranks are too high for the matrix.
    """
    stack = differences.stack
    out, columns = stack.shape
    ranks = check_conditions(differences, rank)
    rows = intersect(differences, ranks) if _widest_triple(ranks) <= columns else None
    if rows is not None and (rows.separation >= GOOD_SEPARATION or _widest_triple(ranks) > out):
        return rows
    turned = intersect(find_differences(stack.transposed, rank, seed), ranks)
    turned = replace(turned, transposed=True)
    return turned if rows is None else max(rows, turned, key=lambda spaces: spaces.separation)


def intersect(differences: Differences, ranks: tuple[int, ...]) -> RowSpaces:
    """`row(M_i) = row(W_i - W_before) ∩ row(W_i - W_after)` for every model of the ring.

    The principal angles between the two spaces are zero on the intersection: the leading singular vectors of
    `R_before^T R_after`, whose singular values are the cosines (Björck & Golub 1973).
    """
    n = differences.stack.n
    dtype = differences.stack.factor_dtype
    bases = []
    separation = 1.0
    for i, r in enumerate(ranks):
        before, after = (differences.of(i, j % n).basis.to(dtype) for j in (i - 1, i + 1))
        overlap = product(before.mT, after).double()
        # An eigenproblem of the cosines' squares: five times faster, and as exact where they are near 1.
        squares, X = (values.flip(-1) for values in torch.linalg.eigh(overlap @ overlap.mT))
        cosines = squares[: min(overlap.shape)].clamp(min=0).sqrt()
        r = min(r, len(cosines))
        Y = overlap.mT @ X[:, :r] / cosines[:r].clamp(min=LEAST_COSINE)
        principal = product(before, X[:, :r].to(before)) + product(after, Y.to(after))
        bases.append(orthonormal(principal).double())
        if r and len(cosines) > r:
            separation = min(separation, max(0.0, 1 - float(cosines[r]) ** 2))
    return RowSpaces(differences.stack, False, tuple(bases), separation)


def _widest_triple(ranks: tuple[int, ...]) -> int:
    """The largest `r_{i-1} + r_i + r_{i+1}` on the ring."""
    n = len(ranks)
    return max(ranks[i - 1] + ranks[i] + ranks[(i + 1) % n] for i in range(n))


def check_conditions(differences: Differences, rank: int | None = None) -> tuple[int, ...]:
    """The ranks to work with, if the conditions of the intersection hold.

    Raises:
        NotRecoverable: Fewer than three models.
        NotLowRank: A difference has full rank.
        RanksTooHigh: The ranks are too high for the matrix.
    """
    stack = differences.stack
    out, columns = stack.shape
    if stack.n < 3:
        raise NotRecoverable(
            f"{stack.n} models: a difference of two splits into two adapters in infinitely many ways",
            "a third decides: add a model, or use --method lattice or mean",
        )
    if differences.full_rank_pairs:
        raise NotLowRank(differences.full_rank_pairs, stack.shape)
    ranks = differences.ranks if rank is None else tuple(min(r, rank) for r in differences.ranks)
    widest_pair = max(ranks[i] + ranks[j] for i, j in differences.by_pair)
    if widest_pair > min(out, columns) or _widest_triple(ranks) > max(out, columns):
        raise RanksTooHigh(
            f"ranks {ranks} are too high for a {out}x{columns} matrix",
            f"two sum to {widest_pair} of at most {min(out, columns)}, "
            f"three to {_widest_triple(ranks)} of at most {max(out, columns)}",
            "more models with lower ranks are needed",
        )
    return ranks
