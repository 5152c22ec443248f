"""Which directions a fit lacks, and which it could do without: the tests that the search for ranks proposes by.

Both are made of the fit for given row spaces, where `Pi` projects onto what is left when every row of W and every `F_i`
of `M_i = F_i V_i^T` is free, and `A_i` is its i-th diagonal block:

- add: `R_i A_i^{-1/2}`, R_i the residual of model i, is white noise when nothing is missing. A singular value is by
  how much a new direction of model i lowers the root of the misfit (Rao's score test).
- drop: `F_i (N^{-1}_ii)^{-1/2}`, N the normal matrix: its smallest singular value is by how much the misfit's root
  rises without that direction (Wald's test).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from detune.fitting.descent import Fit
from detune.fitting.least_squares import normal_inverse
from detune.numerics.linalg import joint_basis, orthonormal

# A direction that two models show, up to this cos^2 on both sides, is one direction.
SAME = 0.3
# A direction that lies in all of some spaces to this mean cos^2 may be one that they share.
SHARED = 0.8
# Whitening amplifies no more than this.
LEAST_SHARE = 0.02


@dataclass(frozen=True)
class AddCandidate:
    """A direction that a model's residual shows over the noise.

    Attributes:
        strength: By how many floors it lowers the root of the misfit.
        model: The model.
        u: Unit left vector, `(out,)`.
        v: Unit right vector, `(in,)`.
    """

    strength: float
    model: int
    u: Tensor
    v: Tensor

    def same_as(self, other: "AddCandidate") -> bool:
        """Whether it may be the other model's direction showing through."""
        return self.model != other.model and (
            float(self.u @ other.u) ** 2 > SAME or float(self.v @ other.v) ** 2 > SAME
        )


@dataclass(frozen=True)
class DropCandidate:
    """The direction of a model that explains least.

    Attributes:
        strength: By how many floors the root of the misfit rises without it.
        model: The model.
        without: The model's row space without it, `(in, r_i - 1)`.
    """

    strength: float
    model: int
    without: Tensor


def add_candidates(fit: Fit, floors: Sequence[float], least: float, first: float) -> list[AddCandidate]:
    """What the residuals show, the strongest first.

    Args:
        fit: The fit.
        floors: Largest singular value of each model's noise.
        least: The strength from which a direction counts.
        first: The same for a model that has none.
    """
    claims = []
    right = _Whitener.of(fit.V)
    for i, Z in enumerate(whitened_residuals(fit)):
        if Z.shape[0] > Z.shape[1]:
            # The smaller Gram matrix.
            values, vectors = torch.linalg.eigh(Z.mT @ Z)
            vectors = Z @ vectors / values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
        else:
            values, vectors = torch.linalg.eigh(Z @ Z.mT)
        for value, u in zip(values.flip(0), vectors.mT.flip(0), strict=True):
            strength = float(value.clamp(min=0).sqrt()) / floors[i]
            if strength <= (least if fit.ranks[i] else first):
                break
            v = right.whiten(u[None] @ Z, i)[0]
            claims.append(AddCandidate(strength, i, u, v / v.norm()))
    return sorted(claims, key=lambda claim: -claim.strength)


def drop_candidates(fit: Fit, floors: Sequence[float]) -> list[DropCandidate]:
    """Every model's weakest direction, the most doubtful first.

    Args:
        fit: The fit.
        floors: Largest singular value of each model's noise.
    """
    spaces = list(zip(fit.deltas, fit.U, fit.V, strict=True))
    by_row = weakest_directions(fit.V, [M_i.left @ (M_i.right.mT @ V_i) for M_i, _, V_i in spaces])
    by_column = weakest_directions(fit.U, [M_i.right @ (M_i.left.mT @ U_i) for M_i, U_i, _ in spaces])
    doubts = []
    for i in by_row:
        row, column = by_row[i], by_column[i]
        if row.rise <= column.rise:
            rest = row.others
        else:
            M_i = fit.deltas[i]
            rest = orthonormal(M_i.right @ (M_i.left.mT @ column.others)) if M_i.rank > 1 else row.others
        doubts.append(DropCandidate(min(row.rise, column.rise) / floors[i], i, rest))
    return sorted(doubts, key=lambda doubt: doubt.strength)


@dataclass(frozen=True)
class Weakest:
    """The direction of one space that explains least.

    Attributes:
        rise: By how much the root of the misfit rises without it.
        others: Basis of the rest of the space.
    """

    rise: float
    others: Tensor


def weakest_directions(V: Sequence[Tensor], F: Sequence[Tensor]) -> dict[int, Weakest]:
    """Wald's test for every model that has a direction, from the fit `M_i = F_i V_i^T` for given spaces V."""
    ranks = [V_i.shape[1] for V_i in V]
    inverse = torch.split(normal_inverse(V), ranks)
    found = {}
    for i, (F_i, V_i, rows) in enumerate(zip(F, V, inverse, strict=True)):
        if not ranks[i]:
            continue
        values, X = torch.linalg.eigh(torch.split(rows, ranks, dim=1)[i])
        root = (X * values.clamp(min=1e-12).rsqrt()) @ X.mT
        _, S, Yh = torch.linalg.svd(F_i @ root, full_matrices=False)
        rest = torch.linalg.qr((root @ Yh[-1])[:, None], mode="complete")[0][:, 1:]
        found[i] = Weakest(float(S[-1]), V_i @ rest)
    return found


@dataclass(frozen=True)
class _Whitener:
    """What `A_i^{-1/2}` is made of, for all models.

    With G the i-th block row of the centred block-diagonal V, `A_i = (1 - 1/n) I - G N^{-1} G^T`.

    Attributes:
        P: Orthonormal basis of all spaces.
        coordinates: `P^T V_i`.
        inverse: `N^{-1}`.
    """

    P: Tensor
    coordinates: tuple[Tensor, ...]
    inverse: Tensor

    @classmethod
    def of(cls, V: Sequence[Tensor]) -> "_Whitener":
        """For orthonormal spaces V."""
        P = joint_basis(V).Q
        return cls(P, tuple(P.mT @ V_i for V_i in V), normal_inverse(V))

    def whiten(self, R: Tensor, model: int) -> Tensor:
        """`R A_i^{-1/2}`."""
        n = len(self.coordinates)
        G = torch.cat([(j == model) * c_j - c_j / n for j, c_j in enumerate(self.coordinates)], dim=1)
        outside = 1 - 1 / n
        core = outside * torch.eye(len(G), dtype=G.dtype, device=G.device) - G @ self.inverse @ G.mT
        values, X = torch.linalg.eigh(core)
        roots = torch.where(values > LEAST_SHARE, values.clamp(min=LEAST_SHARE).rsqrt(), 0.0)
        onto = self.P @ X
        inside = R @ onto
        whitened: Tensor = (R - inside @ onto.mT) * outside**-0.5 + (inside * roots) @ onto.mT
        return whitened


def whitened_residuals(fit: Fit) -> list[Tensor]:
    """Every `R_i` whitened on both sides: white where nothing is missing, but for the directions that the fit took."""
    n = len(fit.V)
    right, left = _Whitener.of(fit.V), _Whitener.of(fit.U)
    return [left.whiten(right.whiten(fit.residual[i], i).mT, i).mT * (1 - 1 / n) ** 0.5 for i in range(n)]


def add_directions(fit: Fit, claims: Sequence[AddCandidate]) -> list[Tensor]:
    """The row spaces with the claimed directions."""
    V = list(fit.V)
    for claim in claims:
        new = claim.v - V[claim.model] @ (V[claim.model].mT @ claim.v)
        V[claim.model] = torch.cat([V[claim.model], (new / new.norm())[:, None]], dim=1)
    return V


def drop_directions(fit: Fit, doubts: Sequence[DropCandidate]) -> list[Tensor]:
    """The row spaces without the doubtful directions."""
    V = list(fit.V)
    for doubt in doubts:
        V[doubt.model] = doubt.without
    return V


def reassign_shared_direction(fit: Fit) -> Iterator[list[Tensor]]:
    """The row spaces with what all models but one have in common taken from them and given to that one.

    A direction `u v^T` that all M_i lack or hold too much of is a change of W. A fit can have taken it for one of every
    model but the one in which it cancels a direction: as good a fit, of higher ranks, and as far from W as one likes.
    """
    for k in range(len(fit.V)):
        others = [i for i in range(len(fit.V)) if i != k and fit.ranks[i]]
        if len(others) < 2:
            continue
        u, v = (_most_shared([spaces[i] for i in others]) for spaces in (fit.U, fit.V))
        if min(u.share, v.share) < SHARED:
            continue
        V = list(fit.V)
        for i in others:
            M_i, along = fit.deltas[i], fit.U[i].mT @ u.direction
            rest = torch.linalg.qr((along / along.norm())[:, None], mode="complete")[0][:, 1:]
            V[i] = orthonormal(M_i.right @ (M_i.left.mT @ (fit.U[i] @ rest)))
        new = v.direction - V[k] @ (V[k].mT @ v.direction)
        V[k] = torch.cat([V[k], (new / new.norm())[:, None]], dim=1)
        yield V


class _Shared(NamedTuple):
    """A unit direction, and the mean cos^2 of its angles to spaces."""

    direction: Tensor
    share: float


def _most_shared(spaces: Sequence[Tensor]) -> _Shared:
    directions, S, _ = torch.linalg.svd(torch.cat(list(spaces), dim=1), full_matrices=False)
    return _Shared(directions[:, 0], float(S[0]) ** 2 / len(spaces))


def strongest_by_model(claims: Sequence[AddCandidate]) -> list[AddCandidate]:
    """Each model's first claim, in the order given."""
    first: dict[int, AddCandidate] = {}
    for claim in claims:
        first.setdefault(claim.model, claim)
    return list(first.values())
