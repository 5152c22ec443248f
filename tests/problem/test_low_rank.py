"""Low-rank matrices by their factors, and by their singular value decomposition."""

import pytest
import torch

from detune.problem.low_rank import LowRank, SVDFactors
from tests.cases import normal, seeded


@pytest.fixture
def delta() -> LowRank:
    generator = seeded()
    return LowRank(normal(generator, 30, 3), normal(generator, 20, 3))


def test_figures_are_those_of_the_matrix(delta):
    assert delta.rank == 3
    assert delta.energy == pytest.approx(float(delta.dense().square().sum()))
    torch.testing.assert_close(delta.transposed.dense(), delta.dense().mT)


def test_correlation_is_that_of_the_entries(delta):
    other = LowRank(delta.left + normal(seeded(1), 30, 3), delta.right)
    expected = torch.nn.functional.cosine_similarity(delta.dense().flatten(), other.dense().flatten(), dim=0)
    assert delta.correlation(other) == pytest.approx(float(expected))
    assert delta.correlation(LowRank(0 * delta.left, delta.right)) == 0


def test_factors_are_the_singular_value_decomposition(delta):
    found = SVDFactors.of(delta)
    torch.testing.assert_close((found.U * found.S) @ found.V.mT, delta.dense())
    torch.testing.assert_close(found.S, torch.linalg.svdvals(delta.dense())[:3])
    torch.testing.assert_close(found.U.mT @ found.U, torch.eye(3, dtype=torch.float64))


def test_directions_of_rounding_alone_are_dropped(delta):
    twice = LowRank(torch.cat([delta.left, delta.left], dim=1), torch.cat([delta.right, delta.right], dim=1))
    assert len(SVDFactors.of(twice).S) == 3
    assert len(SVDFactors.of(LowRank(torch.zeros(5, 2), torch.zeros(4, 2))).S) == 0
