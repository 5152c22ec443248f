"""The closed form: every adapter's space is where the spaces of two differences meet.

`W_i - W_j = M_i - M_j` has the column space `col(M_i) + col(M_j)`, so `col(M_1)` is the intersection of
`col(W_1 - W_2)` and `col(W_1 - W_3)`, and likewise for rows. With the spaces of one side known, the rest is one
linear least-squares problem for all models (`solve_given_spaces`).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detune.solvers.base import LowRank, NotLowRank, NotRecoverable, Recovery
from detune.solvers.differences import Differences, find_differences, orthonormal
from detune.solvers.fit import project, solve_given_spaces, w_step
from detune.solvers.stack import Stack

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Spaces:
    """The adapters' spaces on one side.

    Attributes:
        side: "left" for column spaces (in `R^out`), "right" for row spaces (in `R^in`).
        bases: Orthonormal basis of each model's space, `(out or in, r_i)`, float64.
        separation: The smallest `sin^2` of an angle between what two differences share and what they do not:
            1 where the adapters' spaces are orthogonal, 0 where they cannot be told apart.
    """

    side: Side
    bases: tuple[Tensor, ...]
    separation: float

    @property
    def side_name(self) -> str:
        """The side in words."""
        return "column" if self.side == "left" else "row"


class Unsplittable(NotRecoverable):
    """The ranks are too high for the intersection; an iterative method may still do."""


@dataclass(frozen=True)
class Intersect:
    """Closed form from three models on. It needs `r_1 + r_2 + r_3 <= max(out, in)` and `r_i + r_j <= min(out, in)`.

    Attributes:
        seed: Seed of the sketch.
    """

    min_models: ClassVar[int] = 3
    seed: int = 0

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        """Recover by intersection; see `Solver.solve`."""
        deltas, spaces = split(find_differences(stack, rank, self.seed), rank)
        step = w_step(stack, deltas)
        return Recovery(
            step.weight,
            "intersect",
            f"closed form from the {spaces.side_name} spaces, separation {spaces.separation:.2g}",
            deltas,
            tuple(M_i.rank for M_i in deltas),
            step.relative_residual,
            step.noise_ratio,
        )


def split(differences: Differences, rank: int | None) -> tuple[tuple[LowRank, ...], Spaces]:
    """Every model's delta in closed form.

    Raises:
        NotRecoverable: As `find_spaces`.
    """
    stack = differences.stack
    spaces = find_spaces(differences, rank)
    if spaces.side == "left":
        onto_left = project(stack, spaces.bases, ()).onto_left
        right = solve_given_spaces(torch.cat([E.mT for E in onto_left], dim=1), spaces.bases)
        return tuple(LowRank(U, V) for U, V in zip(spaces.bases, right, strict=True)), spaces
    onto_right = project(stack, (), spaces.bases).onto_right
    left = solve_given_spaces(torch.cat(onto_right, dim=1), spaces.bases)
    return tuple(LowRank(U, V) for U, V in zip(left, spaces.bases, strict=True)), spaces


def find_spaces(differences: Differences, rank: int | None) -> Spaces:
    """The adapters' spaces on the side where they are easier to tell apart.

    Raises:
        NotRecoverable: Fewer than three models.
        NotLowRank: A difference has full rank.
        Unsplittable: The ranks are too high for the matrix.
    """
    ranks = differences.ranks if rank is None else tuple(min(r, rank) for r in differences.ranks)
    _check(differences, ranks)
    out, columns = differences.stack.shape
    need = _widest_triple(ranks)
    candidates = [intersect(differences, ranks, "left")] if need <= out else []
    candidates += [intersect(differences, ranks, "right")] if need <= columns else []
    return max(candidates, key=lambda spaces: spaces.separation)


def intersect(differences: Differences, ranks: tuple[int, ...], side: Side) -> Spaces:
    """`span(M_i) = span(W_i - W_prev) ∩ span(W_i - W_next)` for every model of the ring.

    The principal angles between the two spans are zero on the intersection: the leading singular vectors of
    `R_prev^T R_next`, whose singular values are the cosines (Björck & Golub 1973).
    """
    n = differences.stack.n
    bases = []
    separation = 1.0
    for i, r in enumerate(ranks):
        before = getattr(differences.of(i, (i - 1) % n), side)
        after = getattr(differences.of(i, (i + 1) % n), side)
        X, cosines, Yh = torch.linalg.svd(before.mT @ after)
        r = min(r, len(cosines))
        bases.append(orthonormal(before @ X[:, :r] + after @ Yh[:r].mT))
        if r and len(cosines) > r:
            separation = min(separation, max(0.0, 1 - float(cosines[r]) ** 2))
    return Spaces(side, tuple(bases), separation)


def _widest_triple(ranks: tuple[int, ...]) -> int:
    """The largest `r_{i-1} + r_i + r_{i+1}` on the ring."""
    n = len(ranks)
    return max(ranks[i - 1] + ranks[i] + ranks[(i + 1) % n] for i in range(n))


def _check(differences: Differences, ranks: tuple[int, ...]) -> None:
    stack = differences.stack
    out, columns = stack.shape
    if stack.n < 3:
        raise NotRecoverable(
            f"{stack.n} models: intersect needs three, because a difference of two splits in many ways; "
            "add a model, or use --method mean"
        )
    if differences.full_rank_pairs:
        raise NotLowRank(differences.full_rank_pairs, stack.shape)
    widest_pair = max(ranks[i] + ranks[j] for i, j in differences.by_pair)
    if widest_pair > min(out, columns) or _widest_triple(ranks) > max(out, columns):
        raise Unsplittable(
            f"ranks {ranks} are too high for a {out}x{columns} matrix: three neighbours sum to "
            f"{_widest_triple(ranks)}, at most {max(out, columns)} can be told apart"
        )
