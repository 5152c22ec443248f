"""The arithmetic that must give the same bits on every machine."""

import pytest
import torch

from detune.numerics.float_grid import spacing
from detune.packing.prediction import TOLERANCE, IntegerFactors, predict, to_integers
from detune.problem import LowRank
from tests.cases import normal, rms, seeded


def factors(rank: int = 7, shape: tuple[int, int] = (50, 40), scale: float = 0.1) -> LowRank:
    generator = seeded(1)
    return LowRank(scale * normal(generator, shape[0], rank), scale * normal(generator, shape[1], rank))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_product_is_exact_in_any_order(dtype):
    """Python's integers have no rounding; neither have the sums, whichever way the terms are taken."""
    stored = normal(seeded(2), 50, 40).to(dtype)
    integers = to_integers(factors(), stored)
    exact = [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in integers.right.tolist()]
        for row in integers.left.tolist()
    ]
    product = integers.dense() * 2.0**-integers.exponent
    assert product.long().tolist() == exact
    order = torch.randperm(7, generator=seeded(3))
    shuffled = IntegerFactors(integers.left[:, order], integers.right[:, order], integers.exponent)
    assert torch.equal(shuffled.dense(), integers.dense())
    assert torch.equal(
        integers.dense().float(), (integers.left.double() @ integers.right.double().T).float() * 2.0**integers.exponent
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounding_the_factors_costs_a_small_part_of_a_step(dtype):
    stored = normal(seeded(2), 50, 40).to(dtype)
    error = rms(to_integers(factors(), stored).dense() - factors().dense())
    # The unit is a power of two: between the tolerance and half of it.
    assert 0.3 * TOLERANCE < error / rms(spacing(stored, dtype)) < 1.2 * TOLERANCE


def test_factors_are_no_finer_than_sums_allow():
    """Float64 weights have finer steps than exact sums can follow."""
    integers = to_integers(factors(), normal(seeded(2), 50, 40))
    largest = float(integers.left.abs().max()) * float(integers.right.abs().max()) * 7
    assert 2.0**48 < largest < 2.0**53
    with pytest.raises(ValueError, match=r"sums of 7 products .* are not exact"):
        IntegerFactors(integers.left.long() * 64, integers.right.long() * 64, 0)


def test_of_lopsided_shapes_every_integer_fits():
    """Equal norms on both sides make the few entries of the short one large."""
    lopsided = LowRank(normal(seeded(1), 1, 1), normal(seeded(2), 10**6, 1) / 1e3)
    integers = to_integers(lopsided, normal(seeded(3), 1, 10**6))
    assert 2**29 < int(integers.left.abs().max()) < 2**31
    torch.testing.assert_close(integers.dense(), lopsided.dense(), rtol=0, atol=1e-8)


def test_a_prediction_is_the_nearest_value():
    base = normal(seeded(4), 50, 40).bfloat16()
    integers = to_integers(factors(), base)
    prediction = predict(base, integers, torch.bfloat16)
    exact = base.double() + integers.dense()
    assert torch.equal(prediction.values, exact.to(torch.float32).bfloat16())
    assert prediction.off_centre.abs().max() <= 0.5
    torch.testing.assert_close(
        prediction.values.double() + prediction.off_centre * spacing(prediction.values, torch.bfloat16),
        exact,
        rtol=0,
        atol=0,
    )


def test_without_factors_the_base_is_the_prediction():
    base = normal(seeded(4), 5, 4, 3).float()
    prediction = predict(base, None, torch.float32)
    assert torch.equal(prediction.values, base)
    assert not prediction.off_centre.any()
