"""Tensors to bytes that compress well, and back.

A model's tensor is told from its prediction by integers: how many steps of the dtype it lies above. Two things make
them small in zstd. They are put in the order of what the prediction says of them, so that those alike stand together:
first by magnitude, because small entries have fine steps and large residuals, then by how near a tie the prediction
was, because that decides which neighbour is likely. And their bytes are stored plane by plane.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detune.checkpoints.blocks import memory_of
from detune.metrics import from_ordered_bits, ordered_bits
from detune.packing.prediction import IntegerFactors, Prediction

PREDICTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes whose values are predicted; others are stored as they are."""

# Classes of how far a prediction lies from its rounding; sixteen are enough to tell a likely step from an unlikely.
CLASSES = 16
# Bits of the significand, by dtype: what stands above them is the magnitude.
_SIGNIFICAND = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}

Bytes = NDArray[np.uint8]


def encode_tensor(tensor: Tensor) -> bytes:
    """The bytes of a tensor, plane by plane: the first bytes of all entries, then the second."""
    memory = np.frombuffer(memory_of(tensor.contiguous()), dtype=np.uint8)
    return _to_planes(memory, tensor.element_size())


def decode_tensor(data: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The inverse of `encode_tensor`.

    Raises:
        ValueError: The data are not those of such a tensor.
    """
    values = _from_planes(data, dtype.itemsize)
    return torch.from_numpy(values).view(dtype).reshape(shape)


def encode_residual(tensor: Tensor, prediction: Prediction) -> bytes:
    """Encode a tensor's difference from its prediction: all of it, down to the sign of a zero and the bits of a NaN."""
    steps = ordered_bits(tensor) - ordered_bits(prediction.values)
    return _to_planes(_zigzag(steps.numpy().reshape(-1))[_order(prediction)].view(np.uint8), tensor.element_size())


def decode_residual(data: bytes, prediction: Prediction) -> Tensor:
    """The inverse of `encode_residual`.

    Raises:
        ValueError: The data are not of this prediction.
    """
    predicted = ordered_bits(prediction.values)
    signed = predicted.numpy().dtype
    sorted_steps = _unzigzag(_from_planes(data, signed.itemsize).view(signed))
    order = _order(prediction)
    if len(order) != len(sorted_steps):
        raise ValueError(f"{len(sorted_steps)} residuals for {len(order)} entries")
    steps = np.empty_like(sorted_steps)
    steps[order] = sorted_steps
    return from_ordered_bits(predicted + torch.from_numpy(steps).reshape(predicted.shape), prediction.values.dtype)


def encode_factors(factors: IntegerFactors) -> bytes:
    """The integers of both factors, column by column: those of a column have about one size."""
    columns = torch.cat([factors.left, factors.right]).T.contiguous()
    return _to_planes(_zigzag(columns.numpy().reshape(-1)).view(np.uint8), 4)


def decode_factors(data: bytes, rank: int, shape: tuple[int, int], exponent: int) -> IntegerFactors:
    """The inverse of `encode_factors`, for a matrix of this shape.

    Raises:
        ValueError: The data are not those of such factors, or their products are not exact.
    """
    integers = _unzigzag(_from_planes(data, 4).view(np.int32)).reshape(rank, sum(shape))
    columns = torch.from_numpy(integers).T
    return IntegerFactors(columns[: shape[0]].contiguous(), columns[shape[0] :].contiguous(), exponent)


def _order(prediction: Prediction) -> NDArray[np.intp]:
    """Places of the entries, by magnitude and then by class; a stable sort, so that it is the same everywhere."""
    bits = prediction.values.contiguous().view(ordered_bits(prediction.values).dtype).reshape(-1)
    magnitude = (bits & torch.iinfo(bits.dtype).max) >> _SIGNIFICAND[prediction.values.dtype]
    place = (prediction.off_centre.reshape(-1) + 0.5).mul_(CLASSES).floor_().clamp_(0, CLASSES - 1).nan_to_num_(0)
    # The largest is 2047 times 16 and a little more.
    key = magnitude.short().mul_(CLASSES).add_(place.short())
    return np.argsort(key.numpy().view(np.uint16), kind="stable")


def _zigzag(numbers: NDArray[np.signedinteger]) -> NDArray[np.signedinteger]:
    """Small numbers of either sign to small bit patterns: 0, -1, 1, -2, 2 become 0, 1, 2, 3, 4."""
    return (numbers << 1) ^ (numbers >> (8 * numbers.dtype.itemsize - 1))


def _unzigzag(patterns: NDArray[np.signedinteger]) -> NDArray[np.signedinteger]:
    unsigned = patterns.view(f"u{patterns.dtype.itemsize}")
    half: NDArray[np.signedinteger] = (unsigned >> 1).view(patterns.dtype)
    return half ^ -(patterns & 1)


def _to_planes(memory: Bytes, itemsize: int) -> bytes:
    return np.ascontiguousarray(memory.reshape(-1, itemsize).T).tobytes()


def _from_planes(data: bytes, itemsize: int) -> Bytes:
    # A copy in any case: torch takes no memory that it may not write to.
    return np.frombuffer(data, dtype=np.uint8).reshape(itemsize, -1).T.copy().reshape(-1)
