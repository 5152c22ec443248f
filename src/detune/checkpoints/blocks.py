"""Bytes of files and tensors.

Weights are read with `pread` into memory of our own. A memory map would be shorter, but its pages count as
ours for as long as the system likes, and the memory a recovery needs could not be promised.
"""

import ctypes
import hashlib
import os
from pathlib import Path

import torch

from detune.errors import InputError

__all__ = ["copy_block", "file_hash", "memory_of", "new_block", "read_into"]


def memory_of(tensor: torch.Tensor) -> memoryview:
    """View a contiguous CPU tensor of any dtype as bytes; valid while the tensor lives."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def copy_block(tensor: torch.Tensor, start: int, stop: int, out: memoryview | None) -> memoryview:
    """Copy bytes `start` to `stop` of a tensor into `out`, or into new memory."""
    block = new_block(stop - start, out)
    block[:] = memory_of(tensor)[start:stop]
    return block


def file_hash(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}", str(error.strerror or error), "check the file") from error


def new_block(length: int, out: memoryview | None) -> memoryview:
    """Return the first `length` bytes of `out`, or of new memory."""
    if out is None:
        return memoryview(bytearray(max(length, 0)))
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
        raise InputError(
            f"cannot read tensor {name!r} in {path}", str(error.strerror or error), "check it"
        ) from error
