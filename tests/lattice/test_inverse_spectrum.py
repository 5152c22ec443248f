"""The mean of an inverse's eigenvalues against the eigenvalues themselves."""

import pytest
import torch

from detune.lattice.inverse_spectrum import inverse_spectrum
from detune.numerics.random import seeded


@pytest.mark.parametrize(("r", "columns"), [(1, 40), (4, 100), (16, 300), (64, 700)])
def test_the_inverse_spectrum_of_random_rows_is_the_true_one(r, columns):
    """The deterministic equivalent against eigenvalues, with precisions of many sizes and rows of R of all lengths."""
    generator = seeded(r)
    right = torch.randn(columns, r, generator=generator) * (0.2 + torch.rand(columns, 1, generator=generator))
    right = torch.linalg.qr(right).Q * columns**0.5
    precision = torch.exp(2 * torch.randn(5, columns, generator=generator))
    prior = 1 + columns * torch.rand(r, generator=generator)
    variance, curvature = torch.zeros(5), torch.zeros(5)
    energy = right.square().mean(dim=1)
    inverse_spectrum(*(part.numpy() for part in (precision, energy, prior, variance, curvature)))
    normal = torch.einsum("ab,bi,bj->aij", precision, right, right) + torch.diag(prior)
    true = torch.linalg.inv(normal.double()).diagonal(dim1=1, dim2=2).mean(dim=1)
    assert variance.numpy() == pytest.approx(true.numpy(), rel=0.6 / min(r, 16) ** 0.5 if r > 1 else 1e-4)
    assert bool((curvature <= 1.0001 * precision @ energy).all())
