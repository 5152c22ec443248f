import pytest
import torch

from detune.problem.rank_rule import SIGNAL, difference_floor, has_full_rank, is_full_rank, rank_over


def test_a_value_counts_over_the_noise_of_both_models():
    floor = difference_floor(torch.tensor(3.0), torch.tensor(4.0))
    assert floor == pytest.approx(5 * SIGNAL)
    assert rank_over(torch.tensor([9.0, 1.001 * floor, floor, 1.0]), floor) == 2


@pytest.mark.parametrize(
    ("rank", "most", "full"), [(56, 64, False), (57, 64, True), (1024, 4096, False), (1025, 4096, True)]
)
def test_a_rank_is_full_from_seven_eighths_on(rank, most, full):
    assert is_full_rank(rank, most) is full
    assert has_full_rank(torch.full((rank,), 2.0), 1.0, most) is full


@pytest.mark.parametrize(("rank", "full"), [(63, False), (64, True)])
def test_a_spectrum_that_ends_with_a_gap_is_not_full(rank, full):
    assert has_full_rank(torch.full((rank,), 5.0), 1.0, 64) is full


def test_a_gap_helps_no_rank_beyond_the_limit():
    assert has_full_rank(torch.full((1025,), 5.0), 1.0, 4096)
