"""Bytes of files and tensors.

Weights are read with `pread` into memory of our own. A memory map would be shorter, but its pages count as
ours for as long as the system likes, and the memory a recovery needs could not be promised.
"""

import ctypes
import hashlib
import os
from pathlib import Path

import torch

from detune.errors import InputError, cannot_read, parsing
from detune.files import open_regular

__all__ = ["copy_block", "file_hash", "memory_of", "new_block", "read_into", "round_to"]


def memory_of(tensor: torch.Tensor) -> memoryview:
    """View a contiguous CPU tensor of any dtype as bytes."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(bytearray())
    array = (ctypes.c_char * size).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]  # keeps the memory alive as long as the view
    return memoryview(array).cast("B")


def round_to(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert to a dtype, rounding to nearest.

    torch converts float64 to the small dtypes by way of float32 and so rounds twice, which is wrong next to a
    tie. Here the first of the two rounds to odd there, which keeps the second on the right side.

    Args:
        tensor: Any values.
        dtype: The wanted dtype.

    Returns:
        The converted tensor.
    """
    if tensor.dtype is not torch.float64 or not dtype.is_floating_point or dtype.itemsize > 2:
        return tensor.to(dtype)
    single = tensor.float()
    bits = single.view(torch.int32)
    # Only a float32 that ends in these zeros can be a tie of a smaller dtype, and it misleads where it is inexact.
    suspects = (((bits & 0xFFF) == 0) & single.ne(tensor)).nonzero(as_tuple=True)
    exact, rounded = tensor[suspects], single[suspects]
    bits[suspects] = (bits[suspects] - (rounded.abs() > exact.abs()).int()) | 1
    return single.to(dtype)


def copy_block(tensor: torch.Tensor, start: int, stop: int, out: memoryview | None) -> memoryview:
    """Copy bytes `start` to `stop` of a tensor into `out`, or into new memory."""
    block = new_block(stop - start, out)
    block[:] = memory_of(tensor)[start:stop]
    return block


def file_hash(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    with parsing(path), open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def new_block(length: int, out: memoryview | None = None) -> memoryview:
    """Return the first `length` bytes of `out`, or of new memory."""
    if out is None:
        return memory_of(torch.empty(max(length, 0), dtype=torch.uint8))
    return out[: max(length, 0)]


def read_into(path: Path, offset: int, memory: memoryview, name: str) -> None:
    """Fill `memory` with the bytes of a file from `offset` on; `name` is the tensor's, for messages."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(memory):
                count = os.preadv(descriptor, [memory[done:]], offset + done)
                if count == 0:
                    raise InputError(
                        f"{path} is shorter than when it was opened",
                        f"tensor {name!r} ends beyond it",
                        "leave the inputs alone while detune runs",
                    )
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise cannot_read(f"tensor {name!r} in {path}", error) from error
