"""Bytes that come back as the same tensors, and are few."""

import pytest
import torch
import zstandard

from detune.packing.codec import (
    PREDICTABLE,
    decode_factors,
    decode_residual,
    decode_tensor,
    encode_factors,
    encode_residual,
    encode_tensor,
)
from detune.packing.prediction import IntegerFactors, predict
from tests.cases import normal, seeded
from tests.families import same_bits

SHAPE = (40, 30)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def any_bits(dtype: torch.dtype) -> torch.Tensor:
    """Every kind of value: NaNs with their payload, infinities, both zeros, subnormal numbers."""
    integer = INTEGERS[dtype.itemsize]
    info = torch.iinfo(integer)
    bits = torch.randint(info.min, info.max, SHAPE, dtype=integer, generator=seeded(1))
    bits[0, 0], bits[0, 1], bits[0, 2] = info.min, info.max, 0
    return bits.view(dtype)


@pytest.mark.parametrize("dtype", [*PREDICTABLE, torch.float8_e4m3fn, torch.int64, torch.uint8], ids=str)
def test_a_tensor_comes_back(dtype):
    tensor = any_bits(dtype)
    assert same_bits(decode_tensor(encode_tensor(tensor), SHAPE, dtype), tensor)


@pytest.mark.parametrize("dtype", PREDICTABLE, ids=str)
def test_any_tensor_comes_back_from_any_prediction(dtype):
    prediction = predict(normal(seeded(2), *SHAPE).to(dtype), None, dtype)
    tensor = any_bits(dtype)
    assert same_bits(decode_residual(encode_residual(tensor, prediction), prediction), tensor)


@pytest.mark.parametrize("shape", [(), (0, 5), (7,), (2, 3, 1, 1)], ids=str)
def test_any_shape_comes_back(shape):
    tensor = normal(seeded(3), *shape).float()
    assert same_bits(decode_tensor(encode_tensor(tensor), shape, torch.float32), tensor)
    prediction = predict(tensor + 1, None, torch.float32)
    assert same_bits(decode_residual(encode_residual(tensor, prediction), prediction), tensor)


def test_factors_come_back():
    left, right = (torch.randint(-(2**23), 2**23, (rows, 3), dtype=torch.int32, generator=seeded(4)) for rows in SHAPE)
    factors = IntegerFactors(left, right, -31)
    again = decode_factors(encode_factors(factors), 3, SHAPE, -31)
    assert torch.equal(again.left, left)
    assert torch.equal(again.right, right)
    assert again.exponent == -31


def test_data_of_another_tensor_are_refused():
    prediction = predict(normal(seeded(2), *SHAPE), None, torch.float64)
    data = encode_residual(normal(seeded(2), 20, 30), predict(normal(seeded(2), 20, 30), None, torch.float64))
    with pytest.raises(ValueError, match="600 residuals for 1200 entries"):
        decode_residual(data, prediction)
    with pytest.raises(ValueError, match="reshape"):
        decode_factors(data, 2, SHAPE, 0)


def test_the_order_makes_a_residual_smaller():
    """Residuals of values rounded to nearest lie where the prediction was near a tie, and in the small entries."""
    generator = seeded(5)
    base = normal(generator, 400, 400).float()
    exact = base.double() * (1 + 2.0**-25 * normal(generator, 400, 400)) + 2.0**-27 * normal(generator, 400, 400)
    tensor = exact.float()
    prediction = predict(base, None, torch.float32)
    # As if a prediction had known half of the difference.
    halfway = predict((base.double() + exact) / 2, None, torch.float32)
    compress = zstandard.ZstdCompressor().compress
    sizes = [len(compress(encode_residual(tensor, p))) for p in (halfway, prediction)]
    assert sizes[0] < sizes[1] < 0.2 * tensor.nbytes
