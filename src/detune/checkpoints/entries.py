"""The table of contents of a weight file, whatever its format, and the rules that every such table keeps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from detune.errors import InputError

__all__ = ["Entry", "Header", "check_name", "check_shape", "is_text"]

DAMAGED = "download or copy the file again"

# torch's own: its loops over elements take no more dimensions, and it counts elements in int64.
MAX_DIMENSIONS = 64
MAX_ELEMENTS = 2**63 - 1
# A name of the largest models has some 200 characters.
MAX_NAME_LENGTH = 1000


@dataclass(frozen=True)
class Entry:
    """One tensor inside a weight file.

    Attributes:
        name: The name stored in the file.
        dtype: The stored dtype.
        shape: The stored shape.
        offset: First byte of the tensor, counted from the start of the file.
        stride: Strides in elements; None for a contiguous tensor, as all but pickled views are.
        encoding: What its bytes are, where they are no numbers of the dtype; empty where they are.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    stride: tuple[int, ...] | None = None
    encoding: str = ""

    @property
    def nbytes(self) -> int:
        """Size of the tensor when contiguous."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def span_bytes(self) -> int:
        """Bytes of the file that the tensor's elements stretch over."""
        if self.stride is None or 0 in self.shape:
            return self.nbytes
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """A weight file's table of contents.

    Attributes:
        entries: The tensors in the order of their offsets.
        metadata: The `__metadata__` of a safetensors file.
        raw: The first bytes of a safetensors file, up to the first tensor; None for a file of another format.
    """

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    raw: bytes | None


def check_name(where: object, name: str) -> None:
    """Refuse a tensor's name that other files cannot hold: NUL, half a surrogate pair, a book.

    Raises:
        InputError: It is one.
    """
    if len(name) > MAX_NAME_LENGTH:
        raise InputError(
            f"{where} has a tensor whose name has {len(name)} characters",
            f"expected at most {MAX_NAME_LENGTH}",
            DAMAGED,
        )
    if "\0" in name or not is_text(name):
        raise InputError(
            f"{where} has a tensor whose name is no text",
            f"got {name[:100]!a}, expected neither NUL nor halves of surrogate pairs",
            "rename the tensor, if you trust the model",
        )


def is_text(value: object) -> bool:
    """Whether a value is a text that can be written: JSON and pickles can hold halves of surrogate pairs."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value))


def check_shape(where: object, shape: Sequence[object]) -> tuple[int, ...]:
    """Check that a tensor can have a shape, and return it.

    Raises:
        InputError: None can.
    """
    if len(shape) > MAX_DIMENSIONS:
        raise InputError(f"{where} has {len(shape)} dimensions", f"expected at most {MAX_DIMENSIONS}", DAMAGED)
    sizes = tuple(size for size in shape if type(size) is int and size >= 0)
    if len(sizes) < len(shape):
        raise InputError(f"{where} has the impossible shape {list(shape)}", "expected whole numbers", DAMAGED)
    # Zeros are left out: torch multiplies the other sizes even then, for the strides.
    if math.prod(size for size in sizes if size) > MAX_ELEMENTS:
        raise InputError(
            f"{where} has the impossible shape {list(sizes)}", f"expected at most {MAX_ELEMENTS} elements", DAMAGED
        )
    return sizes
