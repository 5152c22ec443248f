"""Steps of all models' rows against the dense equations."""

import pytest
import torch

from detune.lattice.joint_rows import Measurements, joint_steps
from tests.cases import normal, rms, seeded

ROWS, WIDTH = 4, 60


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_steps_solve_the_equations_of_all_models(shared):
    """Blocks `R_i^T diag(h_i) R_i` on the diagonal, less `R_i^T diag(q_i q_j) R_j` everywhere."""
    generator = seeded()
    ranks = (2, 3, 4)
    start = normal(generator, WIDTH, max(ranks))
    right = [shared * start[:, :r] + (1 - shared) * normal(generator, WIDTH, r) for r in ranks]
    left = [normal(generator, ROWS, r) for r in ranks]
    h = torch.rand(len(ranks), ROWS, WIDTH, generator=generator, dtype=torch.float64)
    # An entry says of all M_i together from nothing to half of what it would, were W known.
    q = h.sqrt() * torch.rand(ROWS, WIDTH, generator=generator, dtype=torch.float64).add(1).div(2 * len(ranks)).sqrt()
    measured = Measurements(normal(generator, *h.shape), h, q)
    prior = [torch.full((r,), 0.1, dtype=torch.float64) for r in ranks]
    factors = [
        torch.linalg.cholesky(torch.einsum("ab,br,bs->ars", alone, R, R) + p.diag())
        for alone, R, p in zip(measured.alone, right, prior, strict=True)
    ]
    found = torch.cat(joint_steps(measured, left, right, prior, factors), dim=1)
    for a in range(ROWS):
        J = torch.block_diag(*right)
        H = torch.diag(h[:, a].flatten()) - torch.einsum("ib,jc,bc->ibjc", q[:, a], q[:, a], torch.eye(WIDTH)).reshape(
            len(ranks) * WIDTH, -1
        )
        slope = J.mT @ measured.gradient[:, a].flatten() - torch.cat(
            [p * L[a] for p, L in zip(prior, left, strict=True)]
        )
        expected = torch.linalg.solve(J.mT @ H @ J + torch.cat(prior).diag(), slope)
        assert rms(found[a] - expected) < 0.05 * rms(expected)
