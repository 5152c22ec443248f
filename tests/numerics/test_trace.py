"""Traces of maps that are known by what they do to random signs."""

import pytest
import torch

from detune.numerics.random import seeded
from detune.numerics.trace import probe

LIKE = torch.zeros(0, dtype=torch.float64)


def test_a_diagonal_map_gives_its_trace_with_every_probe():
    weights = torch.rand(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    figures = probe(lambda z: (z * weights * z).sum(), (6, 5), 3, seeded(0), LIKE)
    torch.testing.assert_close(figures, weights.sum().expand(3))


def test_the_mean_is_the_trace_of_any_map():
    B = torch.randn(30, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    figures = probe(lambda z: (z.flatten() @ B @ z.flatten()).expand(1), (6, 5), 4000, seeded(0), LIKE)
    scatter = float(figures.std()) / len(figures) ** 0.5
    assert float(figures.mean()) == pytest.approx(float(B.trace()), abs=4 * scatter)
    assert scatter < 1


def test_probes_are_signs_in_the_dtype_wanted_and_end_when_it_is_settled():
    seen = []

    def measure(z):
        seen.append(z)
        return z.square().sum()

    figures = probe(measure, (3, 4), 10, seeded(0), LIKE.float(), lambda so_far: len(so_far) == 2)
    assert figures.tolist() == [12.0, 12.0]
    assert all(z.dtype is torch.float32 and set(z.flatten().tolist()) == {-1.0, 1.0} for z in seen)
    assert not seen[0].equal(seen[1])
