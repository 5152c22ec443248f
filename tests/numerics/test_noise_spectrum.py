"""Where the singular values of noise lie."""

import pytest
import torch

from detune.numerics.noise_spectrum import hard_threshold, noise_singular_value
from tests.cases import normal, seeded


@pytest.mark.parametrize(("short", "long"), [(200, 200), (100, 300)])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_shares_of_singular_values_are_those_of_drawn_noise(short, long, share):
    drawn = torch.linalg.svdvals(normal(seeded(), short, long))
    assert noise_singular_value(share, short, long) == pytest.approx(float(drawn.quantile(share)), rel=0.03)


def test_all_lie_below_the_edge():
    assert noise_singular_value(1.0, 100, 300) == pytest.approx(100**0.5 + 300**0.5, rel=1e-3)


@pytest.mark.parametrize("b", [0.1, 0.5, 1.0])
def test_thresholds_are_the_published_ones(b):
    """Against the cubic that Gavish & Donoho give for them (2014, equation 5), 2.86 for square matrices."""
    published = 0.56 * b**3 - 0.95 * b**2 + 1.82 * b + 1.43
    assert hard_threshold(round(1000 * b), 1000) == pytest.approx(published, abs=0.02)
