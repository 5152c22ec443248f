import pytest
import torch

from detune.compatibility.mismatch import Cause, find_mismatch
from tests.cases import normal, seeded
from tests.families import delta

SHAPES = [(64, 64), (96, 256), (256, 96)]


def permuted(W: torch.Tensor, *dims: int) -> torch.Tensor:
    generator = seeded(2)
    for dim in dims:
        W = W.index_select(dim, torch.randperm(W.shape[dim], generator=generator))
    return W


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [0.0, 0.05])
@pytest.mark.parametrize(
    ("dims", "cause"),
    [((0,), Cause.ROWS), ((1,), Cause.COLUMNS), ((0, 1), Cause.BOTH)],
    ids=["rows", "columns", "both"],
)
def test_sees_another_order_under_a_lora(shape, size, dims, cause):
    W = normal(seeded(1), *shape)
    stranger = permuted(W, *dims) + delta(seeded(3), W, 4, size)
    assert find_mismatch(stranger.bfloat16(), (W + delta(seeded(4), W, 4, size)).bfloat16()).cause is cause


def test_sees_heads_in_another_order():
    W = normal(seeded(1), 128, 96)
    heads = torch.cat([W[32:], W[:32]])
    assert find_mismatch(heads, W).cause is Cause.ROWS


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_bases_are_unrelated(shape):
    found = find_mismatch(normal(seeded(1), *shape), normal(seeded(2), *shape))
    assert found.cause is Cause.UNRELATED
    assert abs(found.cosine) < 0.1
    assert found.relative_difference == pytest.approx(2**0.5, rel=0.1)


@pytest.mark.parametrize("size", [0.01, 0.3])
def test_a_full_fine_tune_stays_close(size):
    W = normal(seeded(1), 100, 90)
    found = find_mismatch(W + size * normal(seeded(2), 100, 90), W)
    assert found.cause is Cause.FULL
    assert found.relative_difference == pytest.approx(size, rel=0.1)
    assert found.cosine == pytest.approx((1 + size**2) ** -0.5, rel=0.02)


def test_a_square_matrix_may_be_transposed():
    W = normal(seeded(1), 96, 96)
    assert find_mismatch(W.mT + delta(seeded(3), W, 4, 0.1), W).cause is Cause.TRANSPOSED


def test_a_common_mean_makes_no_relation():
    """Entries that are all positive have a large cosine in any order; rows are compared without it."""
    one, other = (normal(seeded(i), 80, 70).abs() - 0.3 for i in (1, 2))
    assert find_mismatch(one, other).cause is Cause.UNRELATED
