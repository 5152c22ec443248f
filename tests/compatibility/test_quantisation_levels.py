"""Matrices that were quantised and turned back into floats."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from detune.compatibility.mismatch import Cause, find_mismatch
from detune.compatibility.quantisation_levels import level_noise, to_nf4
from tests.cases import normal, seeded


def weight(rows: int = 128, columns: int = 192) -> Tensor:
    return 0.05 * normal(seeded(1), rows, columns)


def by_rows(matrix: Tensor) -> Tensor:
    scale = matrix.abs().amax(dim=1, keepdim=True) / 127
    return (matrix / scale).round() * scale


def by_blocks(matrix: Tensor) -> Tensor:
    return by_rows(matrix.reshape(-1, 32)).view(matrix.shape)


@pytest.mark.parametrize("quantise", [by_rows, by_blocks, to_nf4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_their_noise_is_seen(quantise: Callable[[Tensor], Tensor], dtype):
    matrix = weight()
    turned_back = quantise(matrix).to(dtype)
    error = float((quantise(matrix) - matrix).square().mean().sqrt())
    assert level_noise(turned_back) == pytest.approx(error, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_other_matrices_lie_on_no_levels(dtype):
    assert level_noise(weight().to(dtype)) is None


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(64, 64),
        torch.ones(64, 64),
        torch.eye(64),
        torch.full((64, 64), float("nan")),
        torch.arange(64.0).expand(64, 64),
        torch.ones(64, 64).int(),
        torch.ones(3, 64),
    ],
    ids=["zeros", "ones", "identity", "nan", "counter", "integers", "few rows"],
)
def test_what_happens_to_be_regular_is_not_taken_for_quantised(matrix):
    noise = level_noise(matrix)
    assert noise is None or noise < 1e-5 or matrix[0, -1] == 63


def test_a_merge_onto_a_base_in_four_bits_is_told():
    matrix = weight()
    change = 0.002 * normal(seeded(2), 128, 2) @ normal(seeded(3), 2, 192)
    other = 0.002 * normal(seeded(4), 128, 2) @ normal(seeded(5), 2, 192)
    assert find_mismatch((to_nf4(matrix) + change).float(), (matrix + other).float()).cause is Cause.FOUR_BITS
    tuned = matrix + 0.005 * normal(seeded(6), *matrix.shape)
    assert find_mismatch(tuned.float(), (matrix + other).float()).cause is Cause.FULL
