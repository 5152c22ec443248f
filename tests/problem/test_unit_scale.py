import pytest
import torch

from detune.numerics.float_grid import times_power_of_two
from detune.problem import Stack
from detune.problem.unit_scale import UnitScale
from tests.cases import normal, seeded

W = normal(seeded(), 40, 30)


@pytest.mark.parametrize("size", [1e-5, 0.02, 1.0, 1e5])
def test_ordinary_matrices_are_not_copied(size):
    stack = Stack.of([(size * W).float(), (size * W + size).float()])
    scale = UnitScale.of(stack)
    assert scale.stack is stack
    assert scale.exponent == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exponent", [-100, -25, 25, 99])
def test_others_are_brought_to_the_order_of_one_exactly(exponent, dtype):
    models = [times_power_of_two(W_i.to(dtype), exponent) for W_i in (W, W + 1)]
    scale = UnitScale.of(Stack.of(models))
    assert 0.5 <= float(scale.stack.typical.max()) < 1
    assert not scale.fixed_step
    for model, scaled in zip(models, scale.stack.matrices, strict=True):
        assert torch.equal(times_power_of_two(scaled, scale.exponent), model)


def test_noise_that_was_told_is_scaled():
    stack = Stack.of([times_power_of_two(W, -300)] * 2, noise=[2.0**-310, 2.0**-309])
    scale = UnitScale.of(stack)
    assert scale.stack.noise_override == (2.0 ** (-310 - scale.exponent), 2.0 ** (-309 - scale.exponent))


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, -149), (torch.bfloat16, -133), (torch.float64, -1074)])
def test_numbers_below_the_normal_ones_have_a_fixed_step(dtype, step):
    models = [times_power_of_two(W_i, step + 4).to(dtype) for W_i in (W, W + 1)]
    scale = UnitScale.of(Stack.of(models))
    assert scale.fixed_step
    assert scale.stack.noise_override == pytest.approx([2.0 ** (step - scale.exponent) / 12**0.5] * 2)


def test_zeros_have_no_scale():
    stack = Stack.of(torch.zeros(2, 40, 30))
    assert UnitScale.of(stack).stack is stack
