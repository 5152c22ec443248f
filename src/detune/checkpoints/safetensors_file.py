"""safetensors: 8 bytes little-endian length N, N bytes of JSON, then the tensors back to back."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from detune.checkpoints.entries import DAMAGED, Entry, Header, check_name, check_shape, is_text
from detune.checkpoints.stored_dtypes import DTYPE_NAMES, DTYPES
from detune.errors import InputError

__all__ = ["encode_safetensors_header", "parse_safetensors", "read_safetensors"]

# Some 300,000 tensors in one file, and five seconds of reading. The largest models have a quarter of that in all shards
# together.
MAX_HEADER_BYTES = 32 * 2**20


def read_safetensors(path: Path, file: IO[bytes]) -> Header:
    """Read the header of a safetensors file that is opened; see `parse_safetensors`."""
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
        raise InputError(f"{where} is truncated", f"it has {size_bytes} bytes, fewer than any header", DAMAGED)
    length = int.from_bytes(prefix, "little")
    if length > size_bytes - 8:
        raise InputError(
            f"{where} is truncated or not a safetensors file",
            f"its header claims {length} bytes and the file has {size_bytes}",
            DAMAGED,
        )
    if length > MAX_HEADER_BYTES:
        raise InputError(
            f"{where} has a header of {length} bytes",
            f"at most {MAX_HEADER_BYTES} are accepted",
            DAMAGED,
        )
    raw = read(8, length)
    try:
        table = json.loads(raw.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} has a header that is not valid JSON", str(error), DAMAGED) from error
    if not isinstance(table, dict):
        raise InputError(f"{where} has a header that is no table", f"got {type(table).__name__}", DAMAGED)

    metadata = table.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(map(is_text, (*metadata.keys(), *metadata.values()))):
        raise InputError(f"{where} has a malformed __metadata__", "expected text values only", DAMAGED)
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
                DAMAGED,
            )
        end += entry.nbytes
        if end > size_bytes:
            raise InputError(
                f"{where} is truncated",
                f"tensor {entry.name!r} ends at byte {end} and the file has {size_bytes}",
                DAMAGED,
            )
    if end != size_bytes:
        raise InputError(
            f"{where} has bytes no tensor owns", f"tensors end at {end}, the file at {size_bytes}", DAMAGED
        )
    return Header(tuple(entries), metadata, prefix + raw)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name appears twice")
    return table


def _parse_entry(file: str, name: str, fields: Any, data_start: int) -> Entry:
    check_name(file, name)
    where = f"tensor {name!r} in {file}"
    match fields:
        case {"dtype": str(dtype_name), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise InputError(f"{where} has a malformed header entry", "expected dtype, shape, data_offsets", DAMAGED)
    if dtype_name not in DTYPES:
        raise InputError(f"{where} has the unknown dtype {dtype_name}", f"known: {', '.join(DTYPES)}", "convert it")
    entry = Entry(name, DTYPES[dtype_name], check_shape(where, shape), data_start + begin)
    if begin < 0 or end - begin != entry.nbytes:
        raise InputError(
            f"{where} has offsets that do not fit its shape",
            f"got bytes {begin} to {end}, expected {entry.nbytes} bytes for {shape} in {dtype_name}",
            DAMAGED,
        )
    return entry


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
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
