"""What is known of one delta: changes of form keep it, and what it promises holds."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from detune.lattice.entries import grid_of
from detune.lattice.estimate import Estimate, known, means
from detune.problem.low_rank import LowRank
from tests.cases import normal, orthogonal, seeded


def random_estimate(out: int = 40, columns: int = 24, rank: int = 3) -> Estimate:
    generator = seeded()
    left, right = 0.1 * normal(generator, out, rank), normal(generator, columns, rank) + 1
    variances = (normal(generator, size, 1)[:, 0].square().float() for size in (out, columns))
    return Estimate(left.float(), right.float(), *variances, lack=0.5)


def variances(e: Estimate) -> np.ndarray:
    """The variance of every entry, by the words of the class."""
    right, left = (factor.square().sum(dim=1) for factor in (e.right, e.left))
    return (e.rows[:, None] * right + left[:, None] * e.columns + e.lack).numpy()


def test_normalised_keeps_the_product_and_the_variance():
    e = random_estimate()
    found = e.normalised()
    torch.testing.assert_close(found.left @ found.right.mT, e.left @ e.right.mT)
    torch.testing.assert_close(found.right.mT @ found.right, 24 * torch.eye(3), atol=1e-3, rtol=0)
    across = found.left.mT @ found.left
    torch.testing.assert_close(across, across.diagonal().diag(), atol=1e-4, rtol=0)
    assert found.variance == pytest.approx(variances(e).mean(), rel=1e-5)
    one = replace(e, left=e.left[:, :1], right=e.right[:, :1])
    # A single direction is only scaled, so that every entry keeps its own variance.
    np.testing.assert_allclose(variances(one.normalised()), variances(one), rtol=1e-4)


@pytest.mark.parametrize("shape", [(400, 60), (60, 400)])
def test_least_squares_is_off_by_what_is_promised(shape):
    generator, noise = seeded(), 0.05
    M_i = normal(generator, shape[0], 3) @ normal(generator, 3, shape[1])
    U, S, Vh = torch.linalg.svd(M_i + noise * normal(generator, *shape), full_matrices=False)
    fit = LowRank(U[:, :3] * S[:3], Vh[:3].mT)
    e = Estimate.of(fit, noise**2)
    assert float((fit.dense() - M_i).square().mean()) == pytest.approx(e.variance, rel=0.15)
    assert e.low_rank.dense().numpy() == pytest.approx(fit.dense().numpy(), abs=1e-4)


def test_the_spaces_of_the_true_factors_keep_those_and_take_away_the_rest():
    e, generator = random_estimate(), seeded(1)
    left, right = (torch.linalg.qr(factor).Q for factor in (e.left, e.right))
    torch.testing.assert_close(means([e.within((left, right))]), means([e]))
    others = orthogonal(generator, 40).float()[:, :20], orthogonal(generator, 24).float()[:, :12]
    found = e.within(others)
    torch.testing.assert_close(others[0] @ (others[0].mT @ found.left), found.left)
    torch.testing.assert_close(others[1] @ (others[1].mT @ found.right), found.right)
    assert e.within(None) is e


def test_directions_below_their_uncertainty_are_dropped():
    e = random_estimate().normalised()
    sizes = e.left.square().mean(dim=0)
    found = replace(e, rows=torch.full((40,), float(sizes[1:].mean()))).significant()
    assert found.rank == int((sizes > sizes[1:].mean()).sum())
    assert found.rank in (1, 2)
    torch.testing.assert_close(found.left, e.left[:, : found.rank])
    none = replace(e, rows=torch.full((40,), 2 * float(sizes[0]))).significant()
    assert none.rank == 0
    assert none.variance == e.lack


def test_parts_and_the_transposed_say_the_same_of_every_entry():
    e = random_estimate()
    rows, columns = torch.tensor([1, 30]), torch.tensor([0, 5, 7])
    np.testing.assert_allclose(means([e.part(rows, columns)])[0], means([e])[0][rows][:, columns], rtol=1e-6)
    np.testing.assert_array_equal(variances(e.part(rows, columns)), variances(e)[rows][:, columns])
    np.testing.assert_allclose(variances(e.transposed), variances(e).T, rtol=1e-6)
    nothing = Estimate.nothing((40, 24), 0.25)
    assert (nothing.variance, nothing.rank, means([nothing]).any()) == (0.25, 0, False)


def test_the_compiled_loops_are_told_the_same_variances():
    e = random_estimate()
    said = known([e, Estimate.nothing((40, 24), 0.25)], grid_of(torch.bfloat16))
    found = (
        said.q_rows[:, :, None] * said.p_columns[:, None]
        + said.p_rows[:, :, None] * said.q_columns[:, None]
        + said.lack[:, None, None]
    )
    np.testing.assert_allclose(found[0], variances(e), rtol=1e-6)
    assert (found[1] == 0.25).all()
