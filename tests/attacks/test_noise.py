"""Attacks that know of noise: on matrices drawn for the purpose, against what could be had at best."""

import math

import pytest
import torch
from torch import Tensor

from detune.attacks.measured_noise import denoised, is_white, with_measured_noise
from detune.attacks.snap import snapped
from detune.attacks.whiten import whitened
from detune.methods import Mean
from detune.metrics import bit_identical, w_error
from detune.problem import Stack
from tests.cases import normal, seeded

OUT, IN, RANK, N = 96, 80, 4, 5


def problem(seed: int, noise: float, shared: float = 0.0) -> tuple[Tensor, list[Tensor]]:
    """A base, and models whose deltas have singular values of some 2; rows of all share the part `shared`."""
    generator = seeded(seed)
    W = normal(generator, OUT, IN) * 0.1
    common = normal(generator, RANK, IN)
    models = []
    for _ in range(N):
        A = shared * common + (1 - shared**2) ** 0.5 * normal(generator, RANK, IN)
        M = normal(generator, OUT, RANK) @ A * (2 / (OUT * IN) ** 0.5)
        models.append(W + M + noise * normal(generator, OUT, IN))
    return W, models


def floor(noise: float) -> float:
    """W-Error of the mean of the models, had they no adapters."""
    return math.log10(noise**2 / N)


def mean_error(models: list[Tensor], W: Tensor) -> float:
    return w_error(Mean().solve(Stack.of(models)).weight, W)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_the_size_of_the_noise_is_measured(seed, noise):
    _, models = problem(seed, noise)
    (measured, *others) = with_measured_noise(Stack.of(models)).noise_override
    assert measured == pytest.approx(noise, rel=0.15)
    assert others == [measured] * (N - 1)


@pytest.mark.parametrize("shape", [(96, 80), (80, 320), (320, 96)])
class TestSpectrum:
    def test_of_noise_under_adapters(self, shape):
        generator = seeded(7)
        adapters = normal(generator, shape[0], 8) @ normal(generator, 8, shape[1])
        assert is_white(normal(generator, *shape) + adapters)

    def test_of_weights_in_other_units(self, shape):
        """Weights of a trained model have a spectrum that falls."""
        generator = seeded(8)
        U, _, V = torch.linalg.svd(normal(generator, *shape), full_matrices=False)
        W = U * torch.linspace(0, -4, len(V), dtype=torch.float64).exp() @ V
        scales = 1 + 0.05 * normal(generator, shape[0], 1)
        assert not is_white(scales * W - W)

    def test_of_what_does_not_differ(self, shape):
        assert not is_white(torch.zeros(shape))


def test_storage_noise_is_not_told():
    _, models = problem(0, 0.0)
    stack = Stack.of([model.float() for model in models])
    assert with_measured_noise(stack) is stack


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("shared", [0.0, 0.95])
def test_under_noise_the_base_is_had_almost_to_the_noise_of_the_mean(seed, noise, shared):
    W, models = problem(seed, noise, shared)
    found = w_error(denoised(Stack.of(models)), W)
    # Of what the adapters' directions hold, noise is amplified: the more the rows have in common, the more.
    assert found <= floor(noise) + (0.35 if not shared else 1.2)
    assert found < mean_error(models, W) - (1 if noise < 1e-2 else 0.3)


def test_noise_that_hides_all_adapters_leaves_the_mean():
    W, models = problem(0, 1.0)
    assert w_error(denoised(Stack.of(models)), W) <= mean_error(models, W) + 0.01


def test_without_noise_it_is_the_recovery():
    W, models = problem(0, 0.0)
    assert w_error(denoised(Stack.of([model.float() for model in models])), W) < -13


def test_a_stack_that_is_told_of_noise_keeps_it_when_turned():
    stack = with_measured_noise(Stack.of(problem(0, 1e-2)[1]))
    assert stack.transposed.noise_override == stack.noise_override
    torch.testing.assert_close(stack.transposed.noise, stack.noise)


@pytest.mark.parametrize("seed", range(3))
def test_noise_in_some_directions_is_whitened(seed):
    W, models = problem(seed, 0.0)
    generator = seeded(100 + seed)
    loud = torch.linalg.qr(normal(generator, IN, IN // 2))[0]
    noisy = [model + 0.05 * normal(generator, OUT, IN // 2) @ loud.mT for model in models]
    noisy = [(model + 1e-5 * normal(generator, OUT, IN)) for model in noisy]
    stack = Stack.of(noisy)
    quiet = torch.eye(IN, dtype=torch.float64) - loud @ loud.mT
    white, plain = ((answer - W) @ quiet for answer in (whitened(stack), denoised(stack)))
    assert float(white.norm()) < 0.25 * float(plain.norm())


@pytest.mark.parametrize("grid", [torch.bfloat16])
def test_an_estimate_close_to_the_grid_is_snapped(grid):
    generator = seeded(1)
    W = normal(generator, 200, 200).to(grid).double()
    near = W + 0.08 * (W.abs() * torch.finfo(grid).eps / 2) * normal(generator, 200, 200)
    assert bit_identical(snapped(near, grid).float(), W.float()) > 0.99


def test_an_estimate_of_a_base_off_the_grid_is_left_alone():
    W = normal(seeded(2), 200, 200)
    assert torch.equal(snapped(W, torch.bfloat16), W)
