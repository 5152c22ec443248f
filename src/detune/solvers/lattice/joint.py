"""Newton's step for one row of every L at once, from what the row's entries say of the `M_i` and of each other.

Where an entry's W is open, it says of the `M_i` only how they differ: if all rise by as much as W falls, every interval
holds as before. Adapters that were trained from one seed share most of their row spaces, and such a common error is of
low rank too. Rows that are fitted model by model, each taking W from the others, undo it in many small steps;
together they undo it in one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A model's own equations are close to those of all: so many steps, or so small a rest, are enough.
MOST_STEPS, REST = 12, 0.03
LEAST = torch.finfo(torch.float64).tiny


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

    @property
    def alone(self) -> Tensor:
        """Precisions of each `M_i` with the others as they are."""
        return self.precision - self.pull.square()


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

    def product(x: list[Tensor]) -> list[Tensor]:
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
        image = product(direction)
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
