"""Newton's step for one row of every L at once, from what the row's entries say of the `M_i` and of each other.

Where an entry's W is open, it says of the `M_i` only how they differ: if all rise by as much as W falls, every interval
holds as before. Adapters that were trained from one seed share most of their row spaces, and such a common error is of
low rank too. Rows that are fitted model by model, each taking W from the others, undo it in many small steps;
together they undo it in one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detune.lattice.estimate import LEAST_SIZE, Estimate
from detune.lattice.posterior import Posterior
from detune.numerics.linalg import product

# A model's own equations are close to those of all: so many steps, or so small a rest, are enough.
MOST_STEPS, REST = 12, 0.03
LEAST = torch.finfo(torch.float64).tiny
# Of what an entry says of all M_i together a little is left, whatever W.
MOST_PULL = 0.999
# A measurement that says nothing still has a precision: a line without any would leave its factors free.
LEAST_SHARE = 1e-9
# Entries of all models whose rows are solved for together: products with the other factors are large, and memory small.
TOGETHER = 1 << 20
# A model's own equations are made in float32, and must stay positive: so much of their diagonal is added.
ROUNDED = 1e-6


@dataclass(frozen=True)
class Measurements:
    """What the entries of some rows say of the `M_i`, each `(n, rows, in)`.

    To second order the logarithm of an entry's probability is `g^T x - x^T (diag(h) - q q^T) x / 2`, x the change of
    its `M_i`.

    Attributes:
        gradient: g.
        precision: h, were W known.
        pull: q, what is lost because it is not.
    """

    gradient: Tensor
    precision: Tensor
    pull: Tensor

    @classmethod
    def of(cls, found: Posterior, m: Tensor, v: Tensor) -> "Measurements":
        """What a posterior adds to `M_i ~ N(m, v)`, all of one shape."""
        precision = (1 - (found.delta_variance - found.pull.square()) / v).clamp(min=LEAST_SHARE) / v
        pull = found.pull / v
        pull *= (MOST_PULL / (pull.square() / precision).sum(dim=0)).clamp(max=1).sqrt()
        return cls((found.delta - m) / v, precision, pull)

    @classmethod
    def joined(cls, parts: Sequence["Measurements"]) -> "Measurements":
        """Of the rows of all parts, one after the other."""
        return cls(*(torch.cat(each, dim=1) for each in zip(*(p._tensors for p in parts), strict=True)))

    def only(self, used: Tensor) -> "Measurements":
        """What the others say is nothing; `(rows, in)`, bool."""
        return Measurements(*(each * used for each in self._tensors))

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gradient, self.precision, self.pull

    @property
    def alone(self) -> Tensor:
        """Precisions of each `M_i` with the others as they are."""
        return self.precision - self.pull.square()


def fit_rows(
    estimates: Sequence[Estimate],
    seen: Tensor | None,
    measured: Iterable[tuple[slice, Measurements]],
    uses: Sequence[Tensor | None] = (None,),
) -> list[tuple[Estimate, ...]]:
    """New left factors for the right ones: a step for each row, and how well its numbers are known then.

    Args:
        estimates: One for each model, normalised.
        seen: The columns that were looked at; None is all.
        measured: What their entries say, rows by rows, in order.
        uses: Choices of entries, `(out, seen)`, bool; None is all.

    Returns:
        New estimates for each choice.
    """
    right = [e.right if seen is None else e.right[seen] for e in estimates]
    pairs = [torch.tril_indices(R.shape[1], R.shape[1], device=R.device) for R in right]
    squares = [(R[:, i] * R[:, j]).float() for R, (i, j) in zip(right, pairs, strict=True)]
    # Rows of L are as large as they have been: what the data leave open stays near zero.
    prior = [1 / e.left.square().mean(dim=0).clamp(min=LEAST_SIZE) for e in estimates]

    def unfilled() -> tuple[Estimate, ...]:
        return tuple(
            replace(
                e,
                left=torch.empty_like(e.left),
                rows=e.rows.clone(),
                columns=torch.stack([e.columns[0], e.right.square().sum(dim=1)]),
            )
            for e in estimates
        )

    fitted = [unfilled() for _ in uses]
    for rows, all_here in _together(measured):
        start = [e.left[rows] for e in estimates]
        for used, new in zip(uses, fitted, strict=True):
            here = all_here if used is None else all_here.only(used[rows])
            factors = [
                _factor(product(alone.float(), square), i, j, p)
                for alone, square, (i, j), p in zip(here.alone, squares, pairs, prior, strict=True)
            ]
            steps = joint_steps(here, start, right, prior, factors)
            for e, L, step, factor in zip(new, start, steps, factors, strict=True):
                e.left[rows] = L + step
                e.rows[0, rows] = torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2).mean(dim=1)
    return fitted


def normalised(estimate: Estimate) -> Estimate:
    """The same product with orthogonal columns of L, and `R^T R = in * I`: R's coordinates are then all alike."""
    Q, T = torch.linalg.qr(estimate.right)
    U, S, Vh = torch.linalg.svd(estimate.left @ T.mT, full_matrices=False)
    root = Q.shape[0] ** 0.5
    return replace(estimate, left=U * (S / root), right=(Q @ Vh.mT) * root)


def _together(measured: Iterable[tuple[slice, Measurements]]) -> Iterator[tuple[slice, Measurements]]:
    """The same in larger parts."""
    parts: list[tuple[slice, Measurements]] = []

    def joined() -> tuple[slice, Measurements]:
        return slice(parts[0][0].start, parts[-1][0].stop), Measurements.joined([part for _, part in parts])

    for part in measured:
        parts.append(part)
        if sum(measurements.pull.numel() for _, measurements in parts) >= TOGETHER:
            yield joined()
            parts = []
    if parts:
        yield joined()


def _factor(packed: Tensor, i: Tensor, j: Tensor, prior: Tensor) -> Tensor:
    """Cholesky factors of a model's own equations in every row, of which the lower triangles are given."""
    normal = packed.new_zeros(len(packed), len(prior), len(prior), dtype=torch.float64)
    normal[:, i, j] = packed.double()
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += prior + ROUNDED * diagonal
    # Only the lower triangles are read.
    factor: Tensor = torch.linalg.cholesky(normal)
    return factor


def joint_steps(
    measured: Measurements,
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    prior: Sequence[Tensor],
    factors: Sequence[Tensor],
) -> list[Tensor]:
    """The steps of every L, by conjugate gradients that are preconditioned by each model's own equations.

    Args:
        measured: What the entries say.
        left: Rows of every L, `(rows, r_i)`.
        right: Every R, `(in, r_i)`.
        prior: Precisions of a row's coordinates before anything is seen, `(r_i,)`.
        factors: Cholesky factors of each model's own equations, `(rows, r_i, r_i)`.

    Returns:
        `(rows, r_i)` each.
    """

    def preconditioned(x: list[Tensor]) -> list[Tensor]:
        return [torch.cholesky_solve(x_i[..., None], factor)[..., 0] for x_i, factor in zip(x, factors, strict=True)]

    def applied(x: list[Tensor]) -> list[Tensor]:
        y = torch.stack([x_i @ R.mT for x_i, R in zip(x, right, strict=True)])
        z = measured.precision * y - measured.pull * (measured.pull * y).sum(dim=0)
        return [z_i @ R + p * x_i for z_i, R, p, x_i in zip(z, right, prior, x, strict=True)]

    residual = [g @ R - p * L for g, R, p, L in zip(measured.gradient, right, prior, left, strict=True)]
    steps = [torch.zeros_like(r) for r in residual]
    direction = preconditioned(residual)
    size = first = _dot(residual, direction)
    for _ in range(MOST_STEPS):
        unsolved = size > REST**2 * first
        if not bool(unsolved.any()):
            break
        image = applied(direction)
        along = unsolved * size / _dot(direction, image).clamp(min=LEAST)
        steps = [x + along * d for x, d in zip(steps, direction, strict=True)]
        residual = [r - along * a for r, a in zip(residual, image, strict=True)]
        toward = preconditioned(residual)
        before, size = size, _dot(residual, toward)
        direction = [t + size / before.clamp(min=LEAST) * d for t, d in zip(toward, direction, strict=True)]
    return steps


def _dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Row by row over all models, `(rows, 1)`."""
    return torch.stack([(x_i * y_i).sum(dim=1) for x_i, y_i in zip(x, y, strict=True)]).sum(dim=0)[:, None]
