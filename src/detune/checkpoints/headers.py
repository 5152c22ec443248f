"""Where every tensor lies inside a weight file, found without reading a single weight.

Both formats end in the same table of `Entry`, so everything after this module reads with plain `pread`:

* safetensors: 8 bytes little-endian length N, N bytes of JSON, then the tensors back to back;
* `torch.save` archives (`.bin`, `.pt`, `.pth`, `.ckpt`): a zip of uncompressed storages and a pickle, which
  is opened with `weights_only=True`, so that it can name tensors but never run code.
"""

import json
import logging
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from detune.errors import InputError

__all__ = [
    "DTYPES",
    "PICKLE_SUFFIXES",
    "Entry",
    "Header",
    "encode_safetensors_header",
    "parse_safetensors",
    "read_header",
    "safetensors_name",
]

logger = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The safetensors library refuses longer headers too: JSON of this size is an attack, not a model.
_MAX_HEADER_BYTES = 100_000_000
_DAMAGED = "download or copy the file again"


@dataclass(frozen=True)
class Entry:
    """One tensor inside a weight file.

    Attributes:
        name: The name stored in the file.
        dtype: The stored dtype.
        shape: The stored shape.
        offset: First byte of the tensor, counted from the start of the file.
        stride: Strides in elements; None for a contiguous tensor, as all but pickled views are.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    stride: tuple[int, ...] | None = None

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
    """What a weight file says about itself.

    Attributes:
        entries: The tensors in the order of their offsets.
        metadata: The `__metadata__` of a safetensors file.
        raw: The first bytes of a safetensors file, up to the first tensor; None for a pickled file.
    """

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    raw: bytes | None


def read_header(path: Path) -> Header:
    """Read the header of a weight file.

    Args:
        path: A `.safetensors` file, or a `torch.save` archive with one of `PICKLE_SUFFIXES`.

    Returns:
        The table of tensors.

    Raises:
        InputError: The file cannot be read, is damaged, or holds something other than plain tensors.
    """
    try:
        if path.suffix in PICKLE_SUFFIXES:
            return _read_pickle(path)
        return _read_safetensors(path)
    except OSError as error:
        raise InputError(f"cannot read {path}", str(error.strerror or error), "check the path") from error


def encode_safetensors_header(entries: list[Entry], metadata: Mapping[str, str]) -> bytes:
    """Build the first bytes of a safetensors file, length prefix included.

    Args:
        entries: The tensors in file order, back to back; their `offset` is ignored.
        metadata: Goes into `__metadata__`.

    Returns:
        The bytes up to the first tensor, padded with spaces to a multiple of 8.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        table[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_safetensors(path: Path) -> Header:
    with path.open("rb") as file:
        # Read in order: the length first, then as much.
        return parse_safetensors(str(path), os.fstat(file.fileno()).st_size, lambda start, length: file.read(length))


def parse_safetensors(where: str, size_bytes: int, read: Callable[[int, int], bytes]) -> Header:
    """Read the header of a safetensors file, wherever it lies.

    Args:
        where: The file, for messages.
        size_bytes: Its size.
        read: Gives `length` bytes from `start` on, or fewer at the end of the file; called with `(start, length)` for
            the 8 bytes of the length, and then for the header.

    Returns:
        The table of tensors.

    Raises:
        InputError: The file is damaged.
    """
    prefix = read(0, 8)
    if len(prefix) < 8:
        raise InputError(f"{where} is truncated", f"it has {size_bytes} bytes, fewer than any header", _DAMAGED)
    length = int.from_bytes(prefix, "little")
    if length > size_bytes - 8:
        raise InputError(
            f"{where} is truncated or not a safetensors file",
            f"its header claims {length} bytes and the file has {size_bytes}",
            _DAMAGED,
        )
    if length > _MAX_HEADER_BYTES:
        raise InputError(
            f"{where} has a header of {length} bytes",
            f"at most {_MAX_HEADER_BYTES} are accepted",
            _DAMAGED,
        )
    raw = read(8, length)
    try:
        table = json.loads(raw.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} has a header that is not valid JSON", str(error), _DAMAGED) from error
    if not isinstance(table, dict):
        raise InputError(f"{where} has a header that is no table", f"got {type(table).__name__}", _DAMAGED)

    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{where} has a malformed __metadata__", "expected text values only", _DAMAGED)
    data_start = 8 + length
    entries = [_parse_entry(where, name, fields, data_start) for name, fields in table.items()]
    # Empty tensors share their offset with the next one, so they have to sort before it.
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    end = data_start
    for entry in entries:
        if entry.offset != end:
            problem = "overlaps another tensor" if entry.offset < end else "leaves a gap before it"
            raise InputError(
                f"tensor {entry.name!r} in {where} {problem}",
                f"it starts at data offset {entry.offset - data_start}, expected {end - data_start}",
                _DAMAGED,
            )
        end += entry.nbytes
        if end > size_bytes:
            raise InputError(
                f"{where} is truncated",
                f"tensor {entry.name!r} ends at byte {end} and the file has {size_bytes}",
                _DAMAGED,
            )
    if end != size_bytes:
        raise InputError(
            f"{where} has bytes no tensor owns", f"tensors end at {end}, the file at {size_bytes}", _DAMAGED
        )
    return Header(tuple(entries), metadata, prefix + raw)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name appears twice")
    return table


def _parse_entry(file: str, name: str, fields: Any, data_start: int) -> Entry:
    where = f"tensor {name!r} in {file}"
    match fields:
        case {"dtype": str(dtype_name), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise InputError(f"{where} has a malformed header entry", "expected dtype, shape, data_offsets", _DAMAGED)
    if dtype_name not in DTYPES:
        raise InputError(f"{where} has the unknown dtype {dtype_name}", f"known: {', '.join(DTYPES)}", "convert it")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise InputError(f"{where} has the impossible shape {shape}", "expected whole numbers", _DAMAGED)
    entry = Entry(name, DTYPES[dtype_name], tuple(shape), data_start + begin)
    if begin < 0 or end - begin != entry.nbytes:
        raise InputError(
            f"{where} has offsets that do not fit its shape",
            f"got bytes {begin} to {end}, expected {entry.nbytes} bytes for {shape} in {dtype_name}",
            _DAMAGED,
        )
    return entry


def _read_pickle(path: Path) -> Header:
    # Fake tensors carry shape, dtype and the place of their storage in the file, and own no memory.
    from torch._subclasses.fake_tensor import FakeTensorMode

    size = path.stat().st_size
    convert = "save it again with a current version of torch, or as safetensors"
    try:
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise InputError(f"{path} is a compressed archive", "expected plain torch.save", convert)
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is damaged, or older than torch 1.6", str(error), convert) from error
    try:
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        logger.debug("refused %s: %s", path, error)
        raise InputError(
            f"{path} is not a plain table of tensors, and detune never runs code from a pickle",
            reason,
            "convert it to safetensors with a tool you trust",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read", str(error).split("\n")[0], _DAMAGED) from error
    if not isinstance(state, dict):
        raise InputError(f"{path} is not a table of tensors", f"got {type(state).__name__}", convert)
    entries = [_pickle_entry(path, name, value) for name, value in state.items()]
    for entry in entries:
        if entry.offset + entry.span_bytes > size:
            raise InputError(f"{path} is truncated", f"tensor {entry.name!r} ends beyond the file", _DAMAGED)
    return Header(tuple(sorted(entries, key=lambda entry: entry.offset)), {}, None)


def _pickle_entry(path: Path, name: Any, value: Any) -> Entry:
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and value.dtype in _DTYPE_NAMES
    if not isinstance(name, str) or not plain:
        raise InputError(
            f"{path} holds something other than plain tensors",
            f"entry {name!r} is {getattr(value, 'dtype', type(value).__name__)}",
            "save the bare state dict of the model",
        )
    # Negated or conjugated views store other numbers than they show.
    if value.is_neg() or value.is_conj():
        raise InputError(f"tensor {name!r} in {path} is a lazy view", "expected stored values", "save a clone")
    offset = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise InputError(f"tensor {name!r} in {path} cannot be located", "it has no storage", "convert to safetensors")
    return Entry(
        name,
        value.dtype,
        tuple(value.shape),
        int(offset) + int(value.storage_offset()) * value.dtype.itemsize,
        None if value.is_contiguous() else tuple(value.stride()),
    )


def safetensors_name(file: str) -> str:
    """Name a weight file or index as safetensors would.

    Args:
        file: A path such as `unet/pytorch_model-00001-of-00002.bin` or `pytorch_model.bin.index.json`.

    Returns:
        The path with the name Hugging Face libraries look for, here `unet/model-00001-of-00002.safetensors`.
    """
    path = PurePosixPath(file)
    name = path.name
    if name.endswith(".json"):
        name = name.replace(".bin.index.", ".safetensors.index.")
    elif path.suffix in PICKLE_SUFFIXES:
        name = path.stem + ".safetensors"
    if name != path.name and name.startswith("pytorch_model"):
        name = name.removeprefix("pytorch_")
    return str(path.with_name(name))
