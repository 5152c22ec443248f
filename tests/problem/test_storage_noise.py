"""The model of storage noise against the rounding that storing does."""

import pytest
import torch

from detune.problem.rank_rule import OVER_EDGE
from detune.problem.storage_noise import (
    as_rounded,
    draw_rounding,
    noise_edge,
    sample_rows,
    storage_energy,
    storage_variance,
)
from tests.cases import normal, seeded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_errors_have_the_variance_that_the_model_gives_them(dtype):
    exact = normal(seeded(), 256, 256)
    stored = exact.to(dtype)
    error = stored.double() - exact
    assert float(error.square().mean()) == pytest.approx(float(storage_variance(stored).mean()), rel=0.05)
    assert float(error.square().sum()) == pytest.approx(storage_energy(stored), rel=0.05)


def test_drawn_errors_are_those_of_rounding():
    deviation = torch.tensor([[1.0], [100.0]], dtype=torch.float64).expand(2, 4000)
    drawn = draw_rounding(deviation, seeded())
    for row, size in zip(drawn, (1.0, 100.0), strict=True):
        assert float(row.square().mean().sqrt()) == pytest.approx(size, rel=0.05)
        assert 0.99 < float(row.abs().max()) / (3**0.5 * size) <= 1


def test_float32_files_of_half_precision_are_told_by_their_values():
    halves = [normal(seeded(seed), 8, 8).bfloat16() for seed in range(2)]
    assert [each.dtype for each in as_rounded([half.float() for half in halves])] == [torch.bfloat16] * 2
    # One alone may be a model that left a half-precision base as it was.
    fine = normal(seeded(2), 8, 8).float()
    assert [each.dtype for each in as_rounded([halves[0].float(), fine])] == [torch.float32] * 2


def test_fp16_files_of_bf16_are_told_by_their_values_where_all_are_so():
    # All but the smallest numbers of bf16 are numbers of fp16 too.
    converted = [(0.05 * normal(seeded(seed), 64, 64)).bfloat16().half() for seed in range(3)]
    assert [each.dtype for each in as_rounded(converted)] == [torch.bfloat16] * 3
    assert [each.dtype for each in as_rounded([converted[0].float(), converted[1], converted[2].bfloat16()])] == [
        torch.bfloat16
    ] * 3
    merged = normal(seeded(3), 64, 64).half()
    assert [each.dtype for each in as_rounded([*converted, merged])] == [torch.float16] * 4


def test_rows_are_sampled_evenly():
    rows = torch.arange(1000)[:, None]
    assert sample_rows(rows, 10).flatten().tolist() == list(range(0, 1000, 100))
    assert sample_rows(rows[:5], 10).equal(rows[:5])


@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (48, 256)])
def test_noise_of_one_variance_ends_at_its_edge(shape):
    edge = noise_edge(shape, 4.0)
    assert edge == pytest.approx(float(noise_edge(shape, torch.full((5, shape[1]), 4.0, dtype=torch.float64))))
    largest = [float(torch.linalg.matrix_norm(2 * normal(seeded(seed), *shape), 2)) for seed in range(20)]
    assert 0.85 * edge < min(largest)
    assert max(largest) < OVER_EDGE * edge


def test_the_edge_of_unequal_variances_is_a_bound():
    variance = torch.rand(96, 64, generator=seeded(), dtype=torch.float64) ** 4
    largest = float(torch.linalg.matrix_norm(variance.sqrt() * normal(seeded(1), 96, 64), 2))
    assert largest < float(noise_edge((96, 64), variance)) < 1.5 * largest
