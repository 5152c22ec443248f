"""The header of a GGUF file: the place of every tensor, found without reading a single weight."""

import os
from pathlib import Path
from struct import unpack_from
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from detune._runtime import needs_extra
from detune.checkpoints.entries import DAMAGED, Entry, Header, check_name, check_shape
from detune.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from gguf.gguf_reader import ReaderTensor

__all__ = ["read_gguf"]

_PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}
# Formats that `gguf` cannot dequantise are refused when the file is opened.
_KNOWN = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "MXFP4",
)  # fmt: skip
# Llama 3 has 280,000 merges and 128,000 tokens with a type each, Gemma 3 1.3 million elements in all. The package makes
# 650 bytes of each for transformers.
MAX_ELEMENTS = 2**21
# A model of 405 billion parameters has a thousand tensors, and some forty settings.
MAX_ENTRIES = 100_000


def read_gguf(path: Path, file: IO[bytes]) -> Header:
    """Read the tables of a GGUF file.

    Args:
        path: The file.
        file: The same, opened.

    Returns:
        The table of tensors. Quantised ones are bytes, `(rows, bytes of a row)`, with their format as `encoding`; the
        metadata has the architecture, and how many heads it has.

    Raises:
        InputError: The file is damaged or cut short.
        DetuneError: The extra `gguf` is not installed.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        reader = _bounded_reader(path, size)
        metadata = _metadata(reader)
        entries = [_entry(path, tensor, size) for tensor in reader.tensors]
    except (ValueError, LookupError) as error:
        raise InputError(f"{path} is damaged, cut short, or no GGUF file", str(error), DAMAGED) from error
    return Header(tuple(sorted(entries, key=lambda entry: entry.offset)), metadata, None)


def _bounded_reader(path: Path, size: int) -> "GGUFReader":
    """The library's reader of a file of some bytes, which reads neither beyond its end nor without end."""
    with needs_extra("gguf"):
        from gguf import GGUFEndian, GGUFReader, GGUFValueType

    class Bounded(GGUFReader):
        """Refuses to read beyond the end, where the library would go on with nothing, and counts before it reads.

        Of what an array of settings holds it makes no objects, where the library makes one or two for each element.
        """

        elements = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            stop = offset + int(count) * np.dtype(dtype).itemsize
            if count < 0 or stop > size:
                raise ValueError(f"it ends at byte {size} and should go on to {stop} at least")
            return super()._get(offset, dtype, count, override_order)

        def _build_fields(self, offs: int, count: int) -> int:
            _require_few(count, MAX_ENTRIES, "settings")
            return int(super()._build_fields(offs, count))

        def _build_tensor_info(self, offs: int, count: int) -> Any:
            _require_few(count, MAX_ENTRIES, "tensors")
            return super()._build_tensor_info(offs, count)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            self.elements += int(length[0])
            _require_few(self.elements, MAX_ELEMENTS, "elements in arrays of settings")
            start, dtype = orig_offs + 12, self.gguf_scalar_to_np.get(kind[0])
            if dtype is not None:
                nbytes = int(length[0]) * np.dtype(dtype).itemsize
            elif kind[0] == GGUFValueType.STRING:
                nbytes = self._strings(start, int(length[0]))
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            values = self._get(start, np.uint8, nbytes)
            return 12 + nbytes, [kind, length, values], [2], [GGUFValueType.ARRAY, GGUFValueType(int(kind[0]))]

        def _strings(self, start: int, count: int) -> int:
            """The size of some strings, each behind its length."""
            stop, order, buffer = start, "<Q" if self.endianess == GGUFEndian.LITTLE else ">Q", self.data.data
            for _ in range(count):
                if stop + 8 > size:
                    raise ValueError(f"it ends at byte {size} and should go on to {stop + 8} at least")
                stop += 8 + unpack_from(order, buffer, stop)[0]
            return stop - start

    return Bounded(path)


def _metadata(reader: "GGUFReader") -> dict[str, str]:
    """The architecture, and how many heads it has."""
    found: dict[str, str] = {}
    for key, field in (("architecture", "general.architecture"), ("heads", "{architecture}.attention.head_count")):
        setting = reader.get_field(field.format(**{"architecture": "", **found}))
        if setting is not None:
            found[key] = str(setting.contents())
    return found


def _entry(path: Path, tensor: "ReaderTensor", size: int) -> Entry:
    """A row of the table of tensors of a file of some bytes."""
    from gguf import GGML_QUANT_SIZES

    name, encoding = tensor.name, tensor.tensor_type.name
    check_name(path, name)
    shape = check_shape(f"tensor {name!r} in {path}", [int(length) for length in reversed(tensor.shape)])
    if encoding in _PLAIN:
        entry = Entry(name, _PLAIN[encoding], shape, int(tensor.data_offset))
    else:
        if 0 in shape:
            raise ValueError(f"tensor {name!r} has no elements, and is stored as {encoding}")
        block, nbytes = GGML_QUANT_SIZES[tensor.tensor_type]
        row = (*shape[:-1], shape[-1] // block * nbytes)
        entry = Entry(name, torch.uint8, row, int(tensor.data_offset), encoding=encoding)
    if entry.offset + entry.nbytes > size:
        raise ValueError(f"tensor {name!r} ends at byte {entry.offset + entry.nbytes}, the file at {size}")
    if entry.encoding and encoding not in _KNOWN:
        raise InputError(
            f"tensor {name!r} in {path} is stored as {encoding}",
            f"known are {', '.join((*_PLAIN, *_KNOWN))}",
            "convert it to one of these, or to F16",
        )
    return entry


def _require_few(count: int, most: int, what: str) -> None:
    if count > most:
        raise ValueError(f"it has {count} {what}, expected at most {most}")
